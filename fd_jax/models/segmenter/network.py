"""A whole segmenter, and what it takes from each family of encoders."""

from collections.abc import Sequence
import dataclasses
from typing import Any, Literal, NamedTuple, get_args

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fd_jax.errors import ConfigError, check_choice
from fd_jax.models.backbone import Backbone
from fd_jax.models.batch_norm import Statistics, fresh_statistics
from fd_jax.models.features import FeatureMap
from fd_jax.models.segmenter import decoders, necks
from fd_jax.models.vit import ViT
from fd_jax.typing import PyTree

Neck = Literal["pyramid", "stage_norms", "none"]
Decoder = Literal["upernet", "linear"]

AUXILIARY_LEVEL = 2  # counted from 0: stride 16


class Levels(NamedTuple):
    """Which maps of an encoder a UPerNet takes.

    Attributes:
      blocks: for `Backbone.intermediates`.
      widths: channels of each map.
      neck: the neck of `Segmenter` that makes levels of them.
    """

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    neck: Neck


def levels(encoder: Backbone) -> Levels:
    """The four maps of an encoder (docs/reference.md#ade20k-pyramid).

    A ViT gives the maps after 1/3, 1/2, 2/3 and all of its blocks, which are 3, 5, 7, 11 of 12 and
    7, 11, 15, 23 of 24; a network with stages gives that of each stage.

    Args:
      encoder: the network, or its abstract form.

    Raises:
      ConfigError: it has no four maps, or too few patches for four levels.
    """
    if not isinstance(encoder, ViT):
        return _stage_levels(encoder)
    depth = encoder.depth
    if depth < 3:
        raise ConfigError(f"a ViT of {depth} blocks has no four levels; use at least 3 blocks")
    if min(encoder.grid) < 2:
        raise ConfigError(
            f"a ViT with a grid of {encoder.grid[0]} x {encoder.grid[1]} patches has no four "
            "levels, since the last one has half its size; use a larger image_size"
        )
    if len(encoder.widths) > 1:
        raise ConfigError(
            f"a ViT whose last block has {encoder.widths[-1]} channels, and {encoder.widths[0]} "
            "before it, has no four levels of one width; use segment.decoder='linear'"
        )
    blocks = (depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1, depth - 1)
    return Levels(blocks, (encoder.width,) * 4, "pyramid")


def maps_of(
    encoder: Backbone, images: jax.Array, blocks: Sequence[int], *, drops: jax.Array | None = None
) -> list[FeatureMap]:
    """The maps that a segmenter reads, after the final norm if the encoder has one.

    Args:
      encoder: the network.
      images: [B, H, W, 3] normalised float.
      blocks: see `Backbone.intermediates`.
      drops: as in the encoder's call.
    """
    maps, norm = encoder.intermediates(images, blocks, drops=drops), encoder.norm
    if norm is None:
        return maps
    return [dataclasses.replace(each, tokens=norm(each.tokens)) for each in maps]


def _stage_levels(encoder: Backbone) -> Levels:
    stages = len(encoder.depths)
    if stages != 4:
        raise ConfigError(f"a network of {stages} stages has no four levels; use one of 4 stages")
    blocks = tuple(sum(encoder.depths[: stage + 1]) - 1 for stage in range(stages))
    return Levels(blocks, widths_of(encoder, blocks), "stage_norms")


def widths_of(encoder: Backbone, blocks: Sequence[int]) -> tuple[int, ...]:
    """Channels of the maps after the named blocks, which are counted as in `intermediates`.

    Raises:
      ValueError: the encoder has no such block.
    """
    outside = [number for number in blocks if not 0 <= number < encoder.depth]
    if outside:
        raise ValueError(f"blocks {outside} are named, but the encoder has {encoder.depth}")
    stages = zip(encoder.widths, encoder.depths, strict=True)
    widths = [width for width, depth in stages for _ in range(depth)]
    return tuple(widths[number] for number in blocks)


class Segmentation(NamedTuple):
    """What a segmenter returns.

    Attributes:
      logits: [B, h, w, K] float32 at the size of the finest level.
      auxiliary: [B, h, w, K] float32 of the auxiliary head, at the size of its level; None in
        evaluation, or if there is no such head.
      running: the running statistics after this pass; in evaluation, those before it.
    """

    logits: jax.Array
    auxiliary: jax.Array | None
    running: PyTree


class Segmenter(nnx.Module):
    """Neck, decoder and auxiliary head on the maps of an encoder.

    Architecture:
      widths: channels of the maps.
      classes: number of classes K.
      neck: "pyramid" makes four levels of a ViT's maps, "stage_norms" normalises those of stages
        (both docs/reference.md#ade20k-pyramid), "none" takes maps as they are.
      decoder: "upernet" (docs/reference.md#upernet), or "linear": BatchNorm and a 1x1 convolution
        on the last map.
      channels: of the UPerNet.
      auxiliary_channels: of the fully convolutional head on the third level; 0 for none.
      dropout: probability that a channel is dropped before the last convolution of the UPerNet and
        of the auxiliary head.

    Run time:
      dtype: of convolutions and activations; parameters and logits are float32.
      grad_dtype: of the kernels' gradients until they are summed over devices.

    Attributes:
      droppable: number of uniform numbers per example that a training pass needs.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        classes: int,
        neck: Neck,
        decoder: Decoder,
        channels: int = 512,
        auxiliary_channels: int = 256,
        dropout: float = 0.1,
        dtype: DTypeLike = jnp.float32,
        grad_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check(widths, neck, decoder, auxiliary_channels)
        common: dict[str, Any] = {"dtype": dtype, "grad_dtype": grad_dtype, "rngs": rngs}
        self.neck = _make_neck(neck, widths, common)
        if decoder == "upernet":
            self.decoder = decoders.UPerNet(
                widths, classes, channels=channels, dropout=dropout, **common
            )
        else:
            self.decoder = decoders.Linear(widths[-1], classes, grad_dtype=grad_dtype, rngs=rngs)
        self.auxiliary = (
            decoders.FCN(
                widths[AUXILIARY_LEVEL],
                classes,
                channels=auxiliary_channels,
                dropout=dropout,
                **common,
            )
            if auxiliary_channels
            else None
        )
        self.droppable = self.decoder.droppable + auxiliary_channels

    def fresh_statistics(self) -> PyTree:
        """The running statistics before the first step, for `running` of `__call__`."""
        return fresh_statistics(self)

    def __call__(
        self, maps: Sequence[FeatureMap], running: PyTree, drops: jax.Array | None = None
    ) -> Segmentation:
        """Logits for every class at every place of the finest level.

        Args:
          maps: of the encoder's blocks; those of a UPerNet without the encoder's final norm (see
            `levels`).
          running: running statistics of the BatchNorms, as `fresh_statistics` or an earlier pass
            gave them.
          drops: [B, droppable] uniform numbers in [0, 1) in training, also where `droppable` is 0;
            the BatchNorms then use the statistics of the batch. None in evaluation: they use
            `running`, and nothing is dropped.

        Raises:
          ConfigError: the maps have too few patches for four levels, or a training batch has a
            single example.
        """
        statistics = Statistics(running, training=drops is not None)
        pyramid = self._levels(maps, statistics)
        main, side = _split(drops, self.decoder.droppable)
        logits = self.decoder(pyramid, statistics["decoder"], main)
        auxiliary = None
        if self.auxiliary is not None and drops is not None:
            level = pyramid[AUXILIARY_LEVEL]
            auxiliary = self.auxiliary(level, statistics["auxiliary"], side)
        return Segmentation(logits, auxiliary, statistics.updated())

    def _levels(self, maps, statistics):
        grids = [x.on_grid().reshape(len(x.tokens), *x.grid, -1) for x in maps]
        if isinstance(self.neck, necks.Pyramid):
            return self.neck(grids, statistics["neck"])
        return grids if self.neck is None else self.neck(grids)


def _make_neck(name, widths, common):
    if name == "pyramid":
        return necks.Pyramid(widths[0], **common)
    if name == "stage_norms":
        return necks.StageNorms(widths, dtype=common["dtype"], rngs=common["rngs"])
    return None


def _split(drops, count):
    return (None, None) if drops is None else (drops[:, :count], drops[:, count:])


def _check(widths, neck, decoder, auxiliary_channels):
    check_choice("neck", neck, get_args(Neck))
    check_choice("decoder", decoder, get_args(Decoder))
    if (neck == "pyramid" or decoder == "upernet") and len(widths) != 4:
        raise ConfigError(f"neck={neck!r}, decoder={decoder!r}: {len(widths)} maps; expected 4")
    if neck == "pyramid" and len(set(widths)) > 1:
        raise ConfigError(f"neck='pyramid': maps of widths {list(widths)}; expected one width")
    if auxiliary_channels and len(widths) <= AUXILIARY_LEVEL:
        raise ConfigError(
            f"the auxiliary head reads map {AUXILIARY_LEVEL + 1} of {len(widths)}; set "
            "auxiliary_channels=0"
        )
