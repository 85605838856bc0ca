"""FLOPs per image in closed form: two for each multiply-add of matmuls and convolutions.

A task adds up the FLOPs of its step from the functions here.

Norms (that of responses in a ConvNeXt V2, too), softmax, activations, the optimizer and work that
does not grow with the batch (the bias networks of SwinV2) are left out; they are about 1 % of a
ViT-B step.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import itertools
import math
from typing import Any, Literal

from fd_jax.cost.hardware import Chip, check_matmuls
from fd_jax.models import (
    convnext,
    convnext_blocks,
    linear_layers,
    resnet,
    resnet_blocks,
    sizes,
    swin,
)
from fd_jax.models.lora import Lora
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
      narrow: those of `forward` that are matmuls of narrow numbers, by their key of `narrow.KINDS`.
    """

    forward: float
    backward: float = 0.0
    recomputed: float = 0.0
    narrow: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __add__(self, other: "Flops") -> "Flops":
        kinds = {**self.narrow, **other.narrow}
        return Flops(
            self.forward + other.forward,
            self.backward + other.backward,
            self.recomputed + other.recomputed,
            {kind: self.narrow.get(kind, 0.0) + other.narrow.get(kind, 0.0) for kind in kinds},
        )

    @property
    def model(self) -> float:
        """FLOPs that MFU counts: forward and backward."""
        return self.forward + self.backward

    @property
    def executed(self) -> float:
        """FLOPs that the chip executes, including recomputed ones."""
        return self.model + self.recomputed

    def seconds(self, chip: Chip) -> float:
        """Time in which a chip executes them at its peaks: of bfloat16, and of narrow numbers.

        Raises:
          ConfigError: it has no units for the narrow numbers.
        """
        seconds = (self.executed - sum(self.narrow.values())) / chip.bf16_flops
        for kind, flops in self.narrow.items():
            check_matmuls(kind, chip)
            seconds += flops / (chip.peak(kind) or chip.bf16_flops)
        return seconds


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Forward FLOPs of one layer of a block.

    Attributes:
      name: of the layer, as in `linear_layers.NAMES` where it is one of these.
      flops: forward FLOPs.
      kind: a matmul with a parameter; attention, of two activations; or a depthwise convolution.
      shape: (rows, inputs, outputs) of a matmul that can have a low-rank update.
      normed: whether a norm with parameters of its own comes before it in the same block.
    """

    name: str
    flops: float
    kind: Literal["matmul", "attention", "convolution"] = "matmul"
    shape: tuple[int, int, int] = (0, 0, 0)
    normed: bool = True

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer of attention or an MLP."""
        return self.name in linear_layers.NAMES


@dataclasses.dataclass(frozen=True)
class _Block:
    """The layers of one block in their order; those of a merging or halving of the map as well.

    Attributes:
      layers: of the block, with a halving that comes before it.
      merging: forward FLOPs of a merging that comes after it.
      scaled: whether the backward pass needs the result of the last layer, for a layer scale.
    """

    layers: tuple[_Layer, ...]
    merging: float = 0.0
    scaled: bool = True

    @property
    def forward(self) -> float:
        return sum(layer.flops for layer in self.layers) + self.merging

    def recomputed(self, remat: str | None) -> float:
        """FLOPs that remat repeats: not those of a halving or merging, which is no block's."""
        own = [layer for layer in self.layers if layer.name != "halving"]
        if remat == "dots":  # keeps the results of matmuls with a parameter
            return sum(layer.flops for layer in own if layer.kind != "matmul")
        if remat != "full":
            return 0.0
        return sum(layer.flops for layer in own) - (0.0 if self.scaled else own[-1].flops)


def network(
    spec: ModelSpec,
    *,
    trains: bool,
    remat: str | None = None,
    freeze_blocks: int = 0,
    lora: Lora | None = None,
    patches: int | None = None,
    until: int | None = None,
    matmuls: str = "",
) -> Flops:
    """FLOPs of an encoder for one image.

    Args:
      spec: spec of the encoder.
      trains: whether its weights get gradients (its input, the image, never does).
      remat: value of `config.remat`.
      freeze_blocks: number of first blocks that are held, with the embedding.
      lora: low-rank updates of the other blocks, which then train alone.
      patches: number of patches that the blocks of a ViT see; None for all.
      until: number of first blocks that run; None for all.
      matmuls: of a network that does not train: what its linear layers multiply, a key of
        `narrow.KINDS`; "" for the compute dtype.
    """
    if spec.arch.get("lift"):
        plain = dataclasses.replace(spec, arch={**spec.arch, "lift": None})
        rest = {"trains": trains, "remat": remat, "freeze_blocks": freeze_blocks, "lora": lora}
        work = network(plain, **rest, patches=patches, until=until, matmuls=matmuls)
        if until is not None:  # the maps of blocks are not lifted
            return work
        return work + _lift(spec, trains=trains, held=lora is not None, patches=patches)
    if patches is None:
        embedding, blocks = _FAMILIES[spec.family](spec.arch)
    else:
        embedding, blocks = _vit(spec.arch, patches)
    blocks = blocks[:until]
    inner = sum(block.forward for block in blocks)
    if not trains:
        narrow = sum(each.flops for block in blocks for each in block.layers if each.is_linear)
        return Flops(embedding + inner, narrow={matmuls: narrow} if matmuls else {})
    held, free = blocks[:freeze_blocks], blocks[freeze_blocks:]
    if lora is not None:
        before = Flops(embedding + sum(block.forward for block in held))
        return before + _updated(free, lora, remat or None)
    recomputed = sum(block.recomputed(remat or None) for block in free)
    backward = 2 * sum(block.forward for block in free)
    # Nothing before the first layer that trains needs a gradient, so none passes through that one.
    backward += _without_input_gradient(free[0]) if held else embedding
    return Flops(embedding + inner, backward=backward, recomputed=recomputed)


def _lift(spec: ModelSpec, *, trains: bool, held: bool, patches: int | None) -> Flops:
    """The map of all last tokens to more channels; where it is held, its input has a gradient."""
    arch = spec.arch
    depth = arch["depth"] if "depth" in arch else sum(arch["depths"])
    (last,) = _maps(spec, [depth - 1])
    tokens = math.prod(last.grid) if patches is None else patches
    tokens += int(arch.get("cls_token", 0)) + arch.get("registers", 0)
    work = linear(tokens, last.width, arch["lift"], input_gradient=not held)
    return work if trains else Flops(work.forward)


def _without_input_gradient(block: _Block) -> float:
    """Minus the FLOPs of the input's gradient of a block's first layers, if no norm needs it."""
    first = itertools.takewhile(lambda layer: not layer.normed, block.layers)
    return -sum(layer.flops for layer in first)


def _updated(blocks: Sequence[_Block], lora: Lora, remat: str | None) -> Flops:
    """FLOPs of blocks in which nothing but low-rank updates trains.

    With remat "dots", a little less of attention is repeated than counted if "proj" has no update.
    """
    forward = backward = recomputed = 0.0
    passes = False  # whether the gradient goes on to what is before the layer
    for block in blocks:
        block = dataclasses.replace(block, scaled=False)
        hidden = 0.0  # matmuls before the first update, whose results "dots" does not see to keep
        for layer in block.layers:
            forward += layer.flops
            hidden += layer.flops if layer.kind == "matmul" and not passes else 0.0
            operands = 2 if layer.kind == "attention" else 1  # that need a gradient
            backward += operands * layer.flops if passes else 0.0
            if layer.name in lora.targets:
                rows, width, out = layer.shape
                into, from_ = (2.0 * rows * lora.rank * channels for channels in (width, out))
                forward += into + from_
                # Of a [D, r] and b [r, out], of what is between them, and of the input.
                backward += into + 2 * from_ + (into if passes else 0.0)
                if remat == "full":
                    recomputed += into + (0.0 if layer is block.layers[-1] else from_)
                passes = True
        forward += block.merging
        backward += block.merging if passes else 0.0
        if passes:
            recomputed += block.recomputed(remat) + (hidden if remat == "dots" else 0.0)
    return Flops(forward, backward=backward, recomputed=recomputed)


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
        arch = spec.arch
        grid = sizes.patch_grid(arch["image_size"], arch["patch_size"])
        widths = [arch["width"]] * (arch["depth"] - 1) + [arch.get("last_width") or arch["width"]]
        return [_Map(grid, widths[block]) for block in blocks]
    stages = {"convnext": _convnext_stages, "resnet": _resnet_stages}.get(spec.family, _swin_stages)
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


def _resnet_stages(arch: dict[str, Any]) -> list[_Map]:
    grids = resnet.grids(arch["image_size"], len(arch["depths"]))
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


def _vit(arch: dict[str, Any], kept: int | None = None) -> tuple[float, list[_Block]]:
    """All patches are embedded, of which the blocks see `kept`; None for all of them."""
    width, hidden = arch["width"], arch["mlp_width"]
    patches = math.prod(sizes.patch_grid(arch["image_size"], arch["patch_size"]))
    tokens = (patches if kept is None else kept) + int(arch["cls_token"]) + arch["registers"]
    embedding = 2.0 * patches * 3 * arch["patch_size"] ** 2 * width
    block = _block(
        tokens,
        tokens,
        width,
        hidden,
        gated=arch.get("gated_mlp", False),
        scaled=arch["layer_scale"] is not None,
    )
    blocks = [block] * arch["depth"]
    if last := arch.get("last_width"):
        wide = _block(
            tokens,
            tokens,
            last,
            hidden * last // width,
            gated=arch.get("gated_mlp", False),
            scaled=arch["layer_scale"] is not None,
        )
        widening = _Layer("halving", 2.0 * tokens * width * last, normed=False)
        blocks[-1] = dataclasses.replace(wide, layers=(widening, *wide.layers))
    return embedding, blocks


def _swin(arch: dict[str, Any]) -> tuple[float, list[_Block]]:
    grids = swin.grids(arch["image_size"], arch["patch_size"], len(arch["depths"]))
    embedding = 2.0 * grids[0] ** 2 * 3 * arch["patch_size"] ** 2 * arch["embed_width"]
    keys = [window.side**2 for window in swin.windows_of(arch)]
    blocks: list[_Block] = []
    for stage, (grid, depth) in enumerate(zip(grids, arch["depths"], strict=True)):
        width = arch["embed_width"] * swin.MERGE**stage
        hidden = arch["mlp_ratio"] * width
        # SwinV2 ends its branches with a norm; like a layer scale, its gradient needs their result.
        is_v2 = "residual_scale" in arch
        block = _block(grid**2, keys[stage], width, hidden, scaled=is_v2, norm_first=not is_v2)
        blocks += [block] * depth
        if stage < len(grids) - 1:
            merging = 2.0 * grids[stage + 1] ** 2 * 4 * width * 2 * width
            blocks[-1] = dataclasses.replace(block, merging=merging)
    return embedding, blocks


def _block(
    tokens: int,
    keys: int,
    width: int,
    hidden: int,
    *,
    scaled: bool,
    gated: bool = False,
    norm_first: bool = True,
) -> _Block:
    def matmul(name: str, inputs: int, outputs: int, *, normed: bool = True) -> _Layer:
        flops = 2.0 * tokens * inputs * outputs
        return _Layer(name, flops, shape=(tokens, inputs, outputs), normed=normed)

    return _Block(
        layers=(
            matmul("qkv", width, 3 * width, normed=norm_first),
            _Layer("attention", 4.0 * tokens * keys * width, "attention"),
            matmul("proj", width, width),
            *([matmul("gate", width, hidden)] if gated else []),
            matmul("fc1", width, hidden),
            matmul("fc2", hidden, width),
        ),
        scaled=scaled,
    )


def _convnext(arch: dict[str, Any]) -> tuple[float, list[_Block]]:
    stages = _convnext_stages(arch)
    first = stages[0]
    embedding = 2.0 * math.prod(first.grid) * 3 * arch["patch_size"] ** 2 * first.width
    blocks: list[_Block] = []
    for number, (stage, depth) in enumerate(zip(stages, arch["depths"], strict=True)):
        tokens, width = math.prod(stage.grid), stage.width
        hidden = convnext_blocks.MLP_RATIO * width
        convolution = 2.0 * tokens * width * arch["kernel_size"] ** 2
        block = _Block(
            layers=(
                _Layer("dwconv", convolution, "convolution", normed=False),
                _Layer("fc1", 2.0 * tokens * width * hidden, shape=(tokens, width, hidden)),
                _Layer("fc2", 2.0 * tokens * hidden * width, shape=(tokens, hidden, width)),
            ),
            scaled=arch["layer_scale"] is not None,
        )
        blocks += [block] * depth
        if number:
            inputs = convnext_blocks.HALF**2 * stages[number - 1].width
            halving = _Layer("halving", 2.0 * tokens * inputs * width)
            blocks[-depth] = dataclasses.replace(block, layers=(halving, *block.layers))
    return embedding, blocks


def _resnet(arch: dict[str, Any]) -> tuple[float, list[_Block]]:
    """Of the stem only the first convolution counts as the embedding: the others get gradients."""
    stages, stem = _resnet_stages(arch), arch["stem_widths"]
    size = resnet.STEMS[len(stem)]
    pixels = math.prod(resnet.halved(sizes.sides(arch["image_size"])))
    embedding = 2.0 * pixels * 3 * size**2 * stem[0]
    more = [2.0 * pixels * size**2 * a * b for a, b in itertools.pairwise(stem)]
    blocks: list[_Block] = []
    for number, depth in enumerate(arch["depths"]):
        before = stages[number - 1] if number else _Map(stages[0].grid, stem[-1])
        for index in range(depth):
            blocks.append(_residual(arch, before if index == 0 else stages[number], number))
    rest = tuple(_Layer("halving", flops) for flops in more)
    blocks[0] = dataclasses.replace(blocks[0], layers=(*rest, *blocks[0].layers))
    return embedding, blocks


def _residual(arch: dict[str, Any], before: _Map, number: int) -> _Block:
    """A block of a stage, whose input is the map `before`."""
    after, inner = _resnet_stages(arch)[number], arch["inner_widths"][number]
    kernels = resnet_blocks.SIZES[arch["bottleneck"]]
    ends = [before.width, *[inner] * (len(kernels) - 1), after.width]
    first_grid = before.grid if arch["stride_at"] == "second" else after.grid

    def convolution(name: str, grid: tuple[int, int], size: int, a: int, b: int, *, normed: bool):
        kind = "matmul" if size == 1 else "convolution"
        return _Layer(name, 2.0 * math.prod(grid) * size**2 * a * b, kind, normed=normed)

    layers = [
        convolution(
            "branch", after.grid if i else first_grid, size, ends[i], ends[i + 1], normed=i > 0
        )
        for i, size in enumerate(kernels)
    ]
    if resnet_blocks.has_shortcut(before.width, after.width, 2 if before.grid != after.grid else 1):
        shortcut = convolution("shortcut", after.grid, 1, before.width, after.width, normed=False)
        layers.insert(0, shortcut)
    return _Block(tuple(layers))


# Forward FLOPs of the patch embedding, and the blocks, for each family.
_FAMILIES: dict[str, Callable[[dict[str, Any]], tuple[float, list[_Block]]]] = {
    "vit": _vit,
    "swin": _swin,
    "swin_v2": _swin,
    "convnext": _convnext,
    "resnet": _resnet,
}
