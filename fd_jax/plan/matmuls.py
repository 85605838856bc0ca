"""FLOPs of one matmul or convolution, from the text of its instruction.

On TPUs, matmuls are written as convolutions. A batched matmul becomes a convolution with a large
window and dilation, in which all but one position of the kernel fall on padding or on the holes of
the dilation. Therefore only positions that fall on numbers count.
"""

from collections.abc import Sequence
import math
import re

import numpy as np

OPCODES = ("dot", "convolution")


def flops(
    opcode: str, operands: Sequence[tuple[int, ...]], out: tuple[int, ...], attributes: str
) -> int:
    """FLOPs of one instruction, two per multiply-add.

    Args:
      opcode: one of OPCODES.
      operands: shapes of both operands.
      out: shape of the result.
      attributes: text after the operands.
    """
    left, right = operands
    if opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
        axes = contracted[1].split(",") if contracted and contracted[1] else []
        return 2 * math.prod(out) * math.prod(left[int(axis)] for axis in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if labels is None:
        raise ValueError(f"a convolution has no dim_labels: {attributes[:200]}")
    lefts, rights, outs = (
        dict(zip(names, shape, strict=True))
        for names, shape in zip(labels.groups(), (left, right, out), strict=True)
    )
    spatial = sorted(name for name in rights if name.isdigit())
    window = _window(attributes, len(spatial))
    positions = 1
    for axis, name in enumerate(spatial):
        positions *= _multiplied_positions(
            lefts[name], rights[name], outs[name], **{k: v[axis] for k, v in window.items()}
        )
    return 2 * outs["b"] * outs["f"] * rights["i"] * positions


def _window(attributes: str, dimensions: int) -> dict[str, list[int]]:
    """Stride, lower padding and dilations of each spatial dimension."""
    window = re.search(r"window=\{([^}]*)\}", attributes)
    given = dict(part.split("=") for part in window[1].split()) if window else {}

    def numbers(name: str, default: int) -> list[int]:
        if name not in given:
            return [default] * dimensions
        return [int(value.split("_")[0]) for value in given[name].split("x")]

    return {
        "stride": numbers("stride", 1),
        "pad": numbers("pad", 0),
        "left_dilation": numbers("lhs_dilate", 1),
        "right_dilation": numbers("rhs_dilate", 1),
    }


def _multiplied_positions(
    left: int,
    right: int,
    out: int,
    *,
    stride: int,
    pad: int,
    left_dilation: int,
    right_dilation: int,
) -> int:
    """How many pairs of result and kernel positions in one dimension fall on a number.

    The others fall on padding or on the holes of a dilated left operand.
    """
    positions = np.arange(out)[:, None] * stride + np.arange(right) * right_dilation - pad
    inside = (positions >= 0) & (positions <= (left - 1) * left_dilation)
    return int((inside & (positions % left_dilation == 0)).sum())
