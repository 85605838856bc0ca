"""FLOPs per image in closed form: two for each multiply-add of matmuls and convolutions.

A task adds up the FLOPs of its step from the functions here.

Norms (that of responses in a ConvNeXt V2, too), softmax, activations, the optimizer and work that
does not grow with the batch (the bias networks of SwinV2) are left out; they are about 1 % of a
ViT-B step.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import itertools
import math
from typing import Any

from fd_jax.models import convnext, convnext_blocks, sizes, swin
from fd_jax.models.segmenter import decoders
from fd_jax.models.segmenter.network import AUXILIARY_LEVEL
from fd_jax.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one image.

    Attributes:
      forward: forward passes of all networks.
      backward: gradients of weights and inputs, for the networks that train.
      recomputed: forward work that remat repeats in the backward pass. MFU leaves it out, because
        the model itself does not need it.
    """

    forward: float
    backward: float = 0.0
    recomputed: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.forward + other.forward,
            self.backward + other.backward,
            self.recomputed + other.recomputed,
        )

    @property
    def model(self) -> float:
        """FLOPs that MFU counts: forward and backward."""
        return self.forward + self.backward

    @property
    def executed(self) -> float:
        """FLOPs that the chip executes, including recomputed ones."""
        return self.model + self.recomputed


@dataclasses.dataclass(frozen=True)
class _Block:
    """Forward FLOPs of one block, and how many of them remat repeats."""

    weights: float  # matmuls with a parameter
    other: float  # attention (q k^T, probabilities times v), or a depthwise convolution
    last: float  # fc2; the backward pass needs its result only for a layer scale

    def recomputed(self, remat: str | None) -> float:
        if remat == "full":
            return self.weights + self.other - self.last
        return self.other if remat == "dots" else 0.0


def network(spec: ModelSpec, *, trains: bool, remat: str | None = None) -> Flops:
    """FLOPs of an encoder for one image.

    Args:
      spec: spec of the encoder.
      trains: whether its weights get gradients (its input, the image, never does).
      remat: value of `config.remat`.
    """
    embedding, blocks, merging = _FAMILIES[spec.family](spec.arch)
    inner = sum(block.weights + block.other for block in blocks) + merging
    if not trains:
        return Flops(embedding + inner)
    recomputed = sum(block.recomputed(remat or None) for block in blocks)
    return Flops(embedding + inner, backward=embedding + 2 * inner, recomputed=recomputed)


def linear(rows: float, width: int, out: int, *, input_gradient: bool = True) -> Flops:
    """FLOPs of a trained linear layer that is applied to `rows` vectors per image."""
    forward = 2.0 * rows * width * out
    return Flops(forward, backward=forward * (2 if input_gradient else 1))


def segmenter(spec: ModelSpec) -> Flops:
    """FLOPs of the neck, heads and enlarged logits of a segmenter that trains with its encoder."""
    assert spec.segmenter is not None
    arch = spec.segmenter
    work, levels = _neck(arch["neck"], _maps(spec, arch["blocks"]))
    size, classes = sizes.sides(spec.arch["image_size"]), arch["classes"]
    if arch["decoder"] == "upernet":
        work += _upernet(levels, arch["channels"], classes) + _enlarged(levels[0], size, classes)
    else:
        work += _conv(levels[-1], 1, classes) + _enlarged(levels[-1], size, classes)
    if arch["auxiliary_channels"]:
        level = levels[AUXILIARY_LEVEL]
        hidden = dataclasses.replace(level, width=arch["auxiliary_channels"])
        work += _conv(level, 3, hidden.width) + _conv(hidden, 1, classes)
        work += _enlarged(level, size, classes)
    return work


@dataclasses.dataclass(frozen=True)
class _Map:
    """Height, width and channels of a map."""

    grid: tuple[int, int]
    width: int


def _maps(spec: ModelSpec, blocks: Sequence[int]) -> list[_Map]:
    """The maps after some blocks."""
    if spec.family == "vit":
        grid = sizes.patch_grid(spec.arch["image_size"], spec.arch["patch_size"])
        return [_Map(grid, spec.arch["width"]) for _ in blocks]
    stages = _convnext_stages if spec.family == "convnext" else _swin_stages
    pairs = zip(stages(spec.arch), spec.arch["depths"], strict=True)
    of_blocks = [stage for stage, depth in pairs for _ in range(depth)]
    return [of_blocks[block] for block in blocks]


def _swin_stages(arch: dict[str, Any]) -> list[_Map]:
    sides = swin.grids(arch["image_size"], arch["patch_size"], len(arch["depths"]))
    return [
        _Map((side, side), arch["embed_width"] * swin.MERGE**stage)
        for stage, side in enumerate(sides)
    ]


def _convnext_stages(arch: dict[str, Any]) -> list[_Map]:
    grids = convnext.grids(arch["image_size"], arch["patch_size"], len(arch["depths"]))
    return [_Map(grid, width) for grid, width in zip(grids, arch["widths"], strict=True)]


def _neck(neck: str, maps: list[_Map]) -> tuple[Flops, list[_Map]]:
    """FLOPs of a neck, and the levels that it makes of maps."""
    if neck != "pyramid":
        return Flops(0.0), maps
    first = maps[0]
    levels = [_scaled(first, 4), _scaled(first, 2), first, _scaled(first, 0.5)]
    # A deconvolution makes four pixels out of each one.
    deconvs = (first, _scaled(first, 2), first)
    return _total(_conv(each, 1, 4 * each.width) for each in deconvs), levels


def _upernet(levels: list[_Map], channels: int, classes: int) -> Flops:
    *finer, coarsest = levels
    outputs = [_Map(level.grid, channels) for level in levels]
    work = []
    for bins in decoders.BINS:
        pooled = _Map((bins, bins), coarsest.width)
        work += [_resized(coarsest, pooled.grid), _conv(pooled, 1, channels)]
        work.append(_resized(_Map(pooled.grid, channels), coarsest.grid))
    pooled_width = coarsest.width + len(decoders.BINS) * channels
    work.append(_conv(_Map(coarsest.grid, pooled_width), 3, channels))
    for level, output, above in zip(finer, outputs, outputs[1:], strict=False):
        work += [_conv(level, 1, channels), _resized(above, level.grid), _conv(output, 3, channels)]
    work += [_resized(output, levels[0].grid) for output in outputs]
    work.append(_conv(_Map(levels[0].grid, len(levels) * channels), 3, channels))
    return _total([*work, _conv(outputs[0], 1, classes)])


def _scaled(level: _Map, factor: float) -> _Map:
    height, width = (int(side * factor) for side in level.grid)
    return _Map((height, width), level.width)


def _conv(level: _Map, size: int, out: int) -> Flops:
    return linear(math.prod(level.grid), size**2 * level.width, out)


def _enlarged(level: _Map, size: tuple[int, int], classes: int) -> Flops:
    return _resized(_Map(level.grid, classes), size)


def _resized(level: _Map, size: tuple[int, int]) -> Flops:
    """Two matmuls, rows first; the matrices themselves get no gradient."""
    (height, width), (new_height, new_width) = level.grid, size
    rows = new_height * height * width if new_height != height else 0
    columns = new_width * width * new_height if new_width != width else 0
    forward = 2.0 * level.width * (rows + columns)
    return Flops(forward, backward=forward)


def _total(parts: Iterable[Flops]) -> Flops:
    return sum(parts, start=Flops(0.0))


def resize(side: int, new_side: int) -> Flops:
    """FLOPs to resize an image [side, side, 3] on the device by two matmuls, rows first."""
    return Flops(2.0 * 3 * (new_side * side * side + new_side * new_side * side))


def resized_map(
    grid: tuple[int, int], new_grid: tuple[int, int], width: int, *, trains: bool
) -> Flops:
    """FLOPs to resize a feature map of `width` channels in the same way.

    Args:
      grid: (H, W) before.
      new_grid: (H, W) after.
      width: number of channels.
      trains: whether the map gets a gradient.
    """
    (height, columns), (new_height, new_columns) = grid, new_grid
    forward = 2.0 * width * new_height * columns * (height + new_columns)
    return Flops(forward, backward=forward if trains else 0.0)


def _vit(arch: dict[str, Any]) -> tuple[float, list[_Block], float]:
    width, hidden = arch["width"], arch["mlp_width"]
    patches = math.prod(sizes.patch_grid(arch["image_size"], arch["patch_size"]))
    tokens = patches + int(arch["cls_token"]) + arch["registers"]
    embedding = 2.0 * patches * 3 * arch["patch_size"] ** 2 * width
    block = _block(
        tokens,
        tokens,
        width,
        hidden,
        gated=arch.get("gated_mlp", False),
        scaled=arch["layer_scale"] is not None,
    )
    return embedding, [block] * arch["depth"], 0.0


def _swin(arch: dict[str, Any]) -> tuple[float, list[_Block], float]:
    grids = swin.grids(arch["image_size"], arch["patch_size"], len(arch["depths"]))
    embedding = 2.0 * grids[0] ** 2 * 3 * arch["patch_size"] ** 2 * arch["embed_width"]
    blocks, merging = [], 0.0
    for stage, (grid, depth) in enumerate(zip(grids, arch["depths"], strict=True)):
        width = arch["embed_width"] * swin.MERGE**stage
        window = min(arch["window"], grid) ** 2
        hidden = arch["mlp_ratio"] * width
        # SwinV2 ends its branches with a norm; like a layer scale, its gradient needs their result.
        scaled = "residual_scale" in arch
        blocks += [_block(grid**2, window, width, hidden, scaled=scaled)] * depth
        if stage < len(grids) - 1:
            merging += 2.0 * grids[stage + 1] ** 2 * 4 * width * 2 * width
    return embedding, blocks, merging


def _block(
    tokens: int, keys: int, width: int, hidden: int, *, scaled: bool, gated: bool = False
) -> _Block:
    last = 2.0 * tokens * hidden * width
    return _Block(
        weights=2.0 * tokens * width * (4 * width + hidden * (2 if gated else 1)) + last,
        other=4.0 * tokens * keys * width,
        last=0.0 if scaled else last,
    )


def _convnext(arch: dict[str, Any]) -> tuple[float, list[_Block], float]:
    stages = _convnext_stages(arch)
    first = stages[0]
    embedding = 2.0 * math.prod(first.grid) * 3 * arch["patch_size"] ** 2 * first.width
    blocks, halving = [], 0.0
    for stage, depth in zip(stages, arch["depths"], strict=True):
        numbers = math.prod(stage.grid) * stage.width
        last = 2.0 * numbers * convnext_blocks.MLP_RATIO * stage.width
        block = _Block(
            weights=2 * last,
            other=2.0 * numbers * arch["kernel_size"] ** 2,
            last=last if arch["layer_scale"] is None else 0.0,
        )
        blocks += [block] * depth
    for before, after in itertools.pairwise(stages):
        inputs = convnext_blocks.HALF**2 * before.width
        halving += 2.0 * math.prod(after.grid) * inputs * after.width
    return embedding, blocks, halving


# Forward FLOPs of (patch embedding, each block, matmuls between stages), for each family.
_FAMILIES: dict[str, Callable[[dict[str, Any]], tuple[float, list[_Block], float]]] = {
    "vit": _vit,
    "swin": _swin,
    "swin_v2": _swin,
    "convnext": _convnext,
}
