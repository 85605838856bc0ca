"""ResNets: stages of convolutions with BatchNorm, the grid halved by the first block of a stage.

Depth, widths and the kind of block are arguments, as are the variants that libraries publish: the
stem of three convolutions and the pooled shortcut of "ResNet-D" (arXiv 1812.01187), and which
convolution of a bottleneck strides. The features are the last map as it is.

As a frozen teacher, and wherever else a network only runs, BatchNorms use the running statistics
that they hold. `measured` is a pass in training: it normalises with the statistics of the batch,
and returns the running ones after it.
"""

import collections
from collections.abc import Generator, Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fd_jax.errors import ConfigError, check_choice
from fd_jax.models import batch_norm, kernels, layers, sizes
from fd_jax.models.backbone import Visit, check_remat
from fd_jax.models.batch_norm import KeptBatchNorm, Statistics, kept_statistics
from fd_jax.models.convolution import Conv, he_normal_fan_out, max_pool
from fd_jax.models.convolutional import Convolutional, tokens_of
from fd_jax.models.features import FeatureMap
from fd_jax.models.resnet_blocks import Block, NormedConv, Shortcut, StrideAt
from fd_jax.models.sizes import ImageSize
from fd_jax.typing import PyTree

PATCH = 4  # pixels on a side of a token of the first stage: stem and pooling halve the image
STEMS = {1: 7, 3: 3}  # side of the stem's kernels, by their number


class Stage(nnx.Module):
    """Blocks, one after another, by the text of their numbers."""

    def __init__(self, blocks: Sequence[Block]):
        # Text keys: see the note on nnx.merge in vit.py.
        self.blocks = nnx.Dict({str(index): block for index, block in enumerate(blocks)})


class ResNet(Convolutional):
    """ResNet that returns the map of its last stage as tokens; there is no class token.

    Architecture:
      image_size: side of a square input in pixels, or a pair of height and width; fixed at
        construction. Sides need no divisor: every halving rounds up, since zeros are around the
        image.
      patch_size: 4, the pixels on a side of a token of the first stage.
      stem_widths: channels of the convolutions of the stem: one of 7 x 7, or three of 3 x 3.
      widths, depths: channels and blocks of each stage.
      inner_widths: channels inside of the blocks of each stage.
      bottleneck: whether blocks have three convolutions, of 1 x 1, 3 x 3 and 1 x 1, rather than two
        of 3 x 3.
      stride_at: which convolution of a stage's first block halves the grid: "first", as in the
        ResNet of 2015, or "second", the 3 x 3 of a bottleneck, as in torchvision (v1.5).
      shortcut: how its shortcut does: a "strided" convolution, or one of the "pooled" map.
      activation, norm_eps: as the source has them.

    Run time: drop_path (of the last block, linear in depth from 0), dtype, grad_dtype and remat as
    in `vit.ViT`. `init` and `attention` are taken for the sake of that interface and change
    nothing: all networks of this family start alike, and none has attention.
    """

    KIND = "ResNet"

    # Running statistics do not train, and are not to decay where vectors do.
    NO_DECAY = (r"norm/(mean|var)$",)

    norm = None

    def __init__(
        self,
        *,
        image_size: ImageSize,
        patch_size: int,
        stem_widths: Sequence[int],
        widths: Sequence[int],
        inner_widths: Sequence[int],
        depths: Sequence[int],
        bottleneck: bool,
        stride_at: StrideAt,
        shortcut: Shortcut,
        activation: layers.Activation,
        norm_eps: float,
        drop_path: float = 0.0,
        init: str = "finetune",
        dtype: DTypeLike = jnp.float32,
        grad_dtype: DTypeLike = jnp.float32,
        attention: str = kernels.NONE,
        remat: str | None = None,
        rngs: nnx.Rngs,
    ):
        del init, attention
        _check_sizes(image_size, patch_size, stem_widths, widths, inner_widths, depths)
        check_choice("stride_at", stride_at, StrideAt.__args__)
        check_choice("shortcut", shortcut, Shortcut.__args__)
        check_choice("activation", activation, layers.ACTIVATIONS)
        check_remat(remat)
        if not bottleneck and stride_at != "first":
            raise ConfigError(
                f"stride_at={stride_at!r}: blocks without a bottleneck halve the grid in their "
                "first convolution; set stride_at='first', or bottleneck=True"
            )
        height, wide = sizes.sides(image_size)
        self.image_size = height if height == wide else (height, wide)
        self.widths, self.depths = tuple(widths), tuple(depths)
        self.width, self.depth = widths[-1], sum(depths)
        self.grids = grids(image_size, len(depths))
        self.grid = self.grids[-1]
        self.stem_widths = tuple(stem_widths)
        self.activation: layers.Activation = activation
        self.remat = remat
        common: dict[str, Any] = {"norm_eps": norm_eps, "dtype": dtype, "grad_dtype": grad_dtype}

        def block(stage: int, index: int) -> Block:
            before = widths[stage - 1] if stage else stem_widths[-1]
            number = sum(depths[:stage]) + index
            return Block(
                widths[stage] if index else before,
                inner_widths[stage],
                widths[stage],
                bottleneck=bottleneck,
                stride=2 if stage and not index else 1,
                stride_at=stride_at,
                shortcut=shortcut,
                activation=activation,
                drop_path=drop_path * number / max(self.depth - 1, 1),
                rngs=rngs,
                **common,
            )

        self._add_stem(stem_widths, rngs=rngs, **common)
        self.stages = nnx.Dict(
            {
                str(stage): Stage([block(stage, index) for index in range(depth)])
                for stage, depth in enumerate(depths)
            }
        )

    def _add_stem(self, widths, *, norm_eps, dtype, grad_dtype, rngs):
        size = STEMS[len(widths)]
        self.patch_embed = Conv(
            3,
            widths[0],
            size=size,
            stride=2,
            use_bias=False,
            kernel_init=he_normal_fan_out,
            dtype=dtype,
            grad_dtype=grad_dtype,
            rngs=rngs,
        )
        self.patch_norm = KeptBatchNorm(widths[0], dtype=dtype, eps=norm_eps)
        runtime: dict[str, Any] = {"norm_eps": norm_eps, "dtype": dtype, "grad_dtype": grad_dtype}
        more = {
            str(i): NormedConv(widths[i], widths[i + 1], size=size, rngs=rngs, **runtime)
            for i in range(len(widths) - 1)
        }
        self.stem = nnx.Dict(more) if more else None

    @staticmethod
    def layer_id(path: str, arch: dict[str, Any]) -> int:
        """Layer of an encoder parameter for layer-wise decay (docs/reference.md#layer-decay).

        0 for the stem; then one for each block; one more for what comes after the blocks.
        """
        return ResNet.block_of(path, arch) + 1

    @staticmethod
    def block_of(path: str, arch: dict[str, Any]) -> int:
        """See `Backbone`; the stem is the embedding."""
        parts = path.split("/")
        if parts[0] in ("patch_embed", "patch_norm", "stem"):
            return -1
        if parts[0] != "stages":
            return sum(arch["depths"])
        return sum(arch["depths"][: int(parts[1])]) + int(parts[3])

    @staticmethod
    def is_statistic(path: str) -> bool:
        """See `Backbone`."""
        return batch_norm.is_statistic(path)

    @staticmethod
    def first_stages(arch: dict[str, Any], stages: int) -> dict[str, Any]:
        """The architecture of the first stages; three end at 1/16 of the input's side."""
        staged = ("widths", "inner_widths", "depths")
        return {k: v[:stages] if k in staged else v for k, v in arch.items()}

    @staticmethod
    def first_stages_params(
        params: dict[str, Any], arch: dict[str, Any], stages: int
    ) -> dict[str, Any]:
        """The parameters for `first_stages(arch, stages)`."""
        del arch
        kept = {str(number): params["stages"][str(number)] for number in range(stages)}
        return {**params, "stages": kept}

    def embed(self, images: jax.Array) -> jax.Array:
        """Tokens as they enter the first block. [B, H, W, 3] -> [B, N, D]."""
        statistics = Statistics(kept_statistics(self), training=False)
        return tokens_of(self._stem_of(images, statistics))

    def measured(
        self, images: jax.Array, *, drops: jax.Array | None = None, keep: jax.Array | None = None
    ) -> tuple[FeatureMap, PyTree]:
        """See `Backbone`.

        Raises:
          ConfigError: only some patches are to be kept, or the batch has a single value for each
            channel of the last map.
        """
        self._check_all_kept(keep)
        statistics = Statistics(kept_statistics(self), training=True)
        visit = collections.deque(self._run(images, drops, statistics), maxlen=1).pop()
        return self._features(visit), statistics.updated()

    def _visits(self, images, drops, keep):
        self._check_all_kept(keep)
        yield from self._run(images, drops, Statistics(kept_statistics(self), training=False))

    def _run(
        self, images: jax.Array, drops: jax.Array | None, statistics: Statistics
    ) -> Generator[Visit, jax.Array | None, None]:
        x = self._stem_of(images, statistics)
        number = 0
        for index, depth in enumerate(self.depths):
            for name in map(str, range(depth)):
                block = self.stages[str(index)].blocks[name]
                known = statistics["stages"][str(index)]["blocks"][name]
                block_drops = None if drops is None else drops[:, number]
                before, x = x, self._run_with(block, x, block_drops, known)
                number += 1
                grid = self.grids[index]
                sent = yield Visit(block, tokens_of(before), tokens_of(x), (), grid)
                x = x if sent is None else sent.reshape(x.shape)

    def _run_with(self, block, x, drops, statistics):
        """The block's result; its statistics go through `remat` as arrays, and back."""

        def run(block, x, drops, running):
            return block(x, drops, running, statistics.training)

        x, statistics.running = self._recomputed(run)(block, x, drops, statistics.running)
        return x

    def _stem_of(self, images: jax.Array, statistics: Statistics) -> jax.Array:
        self._check_images(images)
        x: jax.Array = self.patch_norm(self.patch_embed(images), statistics["patch_norm"])
        x = layers.activate(x, self.activation)
        for part in map(str, range(len(self.stem_widths) - 1)):
            assert self.stem is not None
            x = self.stem[part](x, statistics["stem"][part])
            x = layers.activate(x, self.activation)
        return max_pool(x)


def grids(image_size: ImageSize, stages: int) -> tuple[tuple[int, int], ...]:
    """(H, W) of the grid of each stage."""
    found = [halved(halved(sizes.sides(image_size)))]
    while len(found) < stages:
        found.append(halved(found[-1]))
    return tuple(found)


def halved(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of what a stride of 2 leaves of a map."""
    height, width = size
    return -(-height // 2), -(-width // 2)


def _check_sizes(image_size, patch_size, stem_widths, widths, inner_widths, depths):
    if patch_size != PATCH:
        raise ConfigError(
            f"patch_size={patch_size!r}: the stem of a ResNet makes a token of {PATCH} x {PATCH} "
            f"pixels; use {PATCH}"
        )
    if len(stem_widths) not in STEMS:
        raise ConfigError(
            f"stem_widths={list(stem_widths)}: expected the channels of one convolution of 7 x 7, "
            "or of three of 3 x 3"
        )
    if not widths or not len(widths) == len(inner_widths) == len(depths):
        raise ConfigError(
            f"widths={list(widths)}, inner_widths={list(inner_widths)} and depths={list(depths)}: "
            "expected one of each for every stage"
        )
    sizes.check_halved(image_size, patch_size, len(depths) - 1)
