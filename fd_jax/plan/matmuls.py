"""FLOPs of one matmul or convolution, from the text of its instruction.

On TPUs matmuls are written as convolutions. What has batch dimensions is written with windows and
dilations of which all but one position meet holes or padding, so that only positions that meet
numbers count.
"""

from collections.abc import Sequence
import math
import re

import numpy as np

OPCODES = ("dot", "convolution")


def flops(
    opcode: str, operands: Sequence[tuple[int, ...]], out: tuple[int, ...], attributes: str
) -> int:
    """Two per multiply-add.

    Args:
      opcode: one of OPCODES.
      operands: shapes of both.
      out: shape of the result.
      attributes: the text behind the operands.
    """
    left, right = operands
    if opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
        axes = contracted[1].split(",") if contracted and contracted[1] else []
        return 2 * math.prod(out) * math.prod(left[int(axis)] for axis in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {attributes[:200]}")
    lefts, rights, outs = (
        dict(zip(names, shape, strict=True))
        for names, shape in zip(labels.groups(), (left, right, out), strict=True)
    )
    spatial = sorted(name for name in rights if name.isdigit())
    window = _window(attributes, len(spatial))
    positions = 1
    for axis, name in enumerate(spatial):
        positions *= _meetings(
            lefts[name], rights[name], outs[name], **{k: v[axis] for k, v in window.items()}
        )
    return 2 * outs["b"] * outs["f"] * rights["i"] * positions


def _window(attributes: str, dimensions: int) -> dict[str, list[int]]:
    """Stride, lower padding and dilations of each spatial dimension."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    given = dict(part.split("=") for part in found[1].split()) if found else {}

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


def _meetings(
    left: int,
    right: int,
    out: int,
    *,
    stride: int,
    pad: int,
    left_dilation: int,
    right_dilation: int,
) -> int:
    """How often, in one dimension, a position of the kernel meets a number of the left operand."""
    positions = np.arange(out)[:, None] * stride + np.arange(right) * right_dilation - pad
    inside = (positions >= 0) & (positions <= (left - 1) * left_dilation)
    return int((inside & (positions % left_dilation == 0)).sum())
