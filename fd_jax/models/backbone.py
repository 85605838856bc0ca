"""What all networks offer: their feature map, those of their blocks, and the blocks' attention."""

import collections
from collections.abc import Callable, Generator, Iterator, Sequence
import dataclasses
from typing import Any, NamedTuple

from flax import nnx
import jax

from fd_jax.errors import ConfigError, check_choice
from fd_jax.models import layers, sizes
from fd_jax.models.attention_map import AttentionMap
from fd_jax.models.features import FeatureMap
from fd_jax.models.resize import PositionResize
from fd_jax.typing import PyTree

REMAT_POLICIES = {
    "full": None,  # recompute the whole block
    "dots": "dots_with_no_batch_dims_saveable",  # keep the results of weight matmuls
}


def check_remat(remat: str | None) -> None:
    """Refuses a `remat` that is neither None nor a key of REMAT_POLICIES, as a ConfigError."""
    if remat is not None:
        check_choice("remat", remat, REMAT_POLICIES)


class Visit(NamedTuple):
    """One block in a run of a network.

    Attributes:
      block: the block; where there is attention, it has `attention_inputs(before, *positions)`.
      before: [B, N, D] the tokens that enter it.
      after: [B, N, D] the tokens that leave it.
      positions: what its attention knows about the places of tokens.
      grid: (H, W) of the patches.
      indices: [B, P] of the patches, see `FeatureMap`; or None.
      window, shift: of its attention, see `AttentionMap`.
    """

    block: Any
    before: jax.Array
    after: jax.Array
    positions: tuple[Any, ...]
    grid: tuple[int, int]
    indices: jax.Array | None = None
    window: int | None = None
    shift: int = 0


class Backbone(nnx.Module):
    """A network of blocks, one after another, that returns whole feature maps.

    Attributes:
      image_size: side of a square input in pixels, or (height, width).
      grid: (H, W) of the patches at the end.
      width: channels at the end.
      depth: number of blocks.
      depths, widths: blocks and channels of each stage; a ViT has one.
      cls: 1 with a class token, 0 without.
      registers: number of register tokens.
      norm: the final norm, or None.
      lift: a linear map of the normalised tokens to more channels, which are then the `width` of
        the features; None without one. It is a distillation's projector that was kept.
      remat: key of REMAT_POLICIES, or None: what a block recomputes in the backward pass.
    """

    image_size: int | tuple[int, int]
    grid: tuple[int, int]
    width: int
    depth: int
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    cls: int
    registers: int
    norm: layers.LayerNorm | None
    remat: str | None
    lift: Any = None

    def __call__(
        self,
        images: jax.Array,
        *,
        final_norm: bool = True,
        drops: jax.Array | None = None,
        keep: jax.Array | None = None,
    ) -> FeatureMap:
        """The feature map of the last block.

        Args:
          images: [B, H, W, 3] normalised float.
          final_norm: whether the encoder's own final norm (if it has one) is applied.
          drops: [B, depth, 2] uniform numbers for drop path; None in evaluation.
          keep: [B, P] int32, the patches that the blocks see, counted row by row from the top
            left, each once per image and in any order; None for all of them.
        """
        visit = collections.deque(self._visits(images, drops, keep), maxlen=1).pop()
        return self._features(visit, final_norm=final_norm)

    def normed(self, features: FeatureMap) -> FeatureMap:
        """The map of the last block after the encoder's own final norm, if it has one."""
        if self.norm is None:
            return features
        return dataclasses.replace(features, tokens=self.norm(features.tokens))

    def _features(self, visit: Visit, *, final_norm: bool = True) -> FeatureMap:
        """The feature map of the last block, normalised and lifted where the network does that."""
        features = self._feature_map(visit.after, visit)
        if final_norm:
            features = self.normed(features)
        if self.lift is None:
            return features
        if not final_norm and self.norm is not None:
            raise ConfigError(
                "features before the final norm are asked for (target.after_norm=False), but "
                "this network lifts its tokens after it; set target.after_norm=True"
            )
        return dataclasses.replace(features, tokens=self.lift(features.tokens))

    def measured(
        self, images: jax.Array, *, drops: jax.Array | None = None, keep: jax.Array | None = None
    ) -> tuple[FeatureMap, PyTree]:
        """The map in training, and the running statistics of BatchNorms after it.

        A network without BatchNorms computes what `__call__` does, and has no statistics: {}.

        Args:
          images: [B, H, W, 3] normalised float; in a network with BatchNorms the whole batch.
          drops: as in `__call__`.
          keep: as in `__call__`.
        """
        return self(images, drops=drops, keep=keep), {}

    def intermediates(
        self,
        images: jax.Array,
        blocks: Sequence[int],
        *,
        drops: jax.Array | None = None,
        keep: jax.Array | None = None,
    ) -> list[FeatureMap]:
        """The feature maps after the named blocks, without the final norm.

        Args:
          images: [B, H, W, 3] normalised float.
          blocks: numbers of blocks, 0-based and over all stages; the maps are in their order.
          drops: as in `__call__`.
          keep: as in `__call__`.
        """
        kept = {
            number: self._feature_map(visit.after, visit)
            for number, visit in self._visits_of(blocks, images, drops, keep)
        }
        return [kept[number] for number in blocks]

    def intermediates_and_attention(
        self,
        images: jax.Array,
        blocks: Sequence[int],
        *,
        drops: jax.Array | None = None,
        keep: jax.Array | None = None,
    ) -> tuple[list[FeatureMap], AttentionMap]:
        """`intermediates`, and the attention of the last of these blocks, in one run.

        Arguments as in `intermediates`; at least one block.
        """
        visits = dict(self._visits_of(blocks, images, drops, keep))
        maps = [self._feature_map(visits[number].after, visits[number]) for number in blocks]
        return maps, self._attention_map(visits[max(blocks)])

    def attention_maps(
        self, images: jax.Array, blocks: Sequence[int], *, keep: jax.Array | None = None
    ) -> list[AttentionMap]:
        """The attention of the named blocks, without drop path.

        Args:
          images: [B, H, W, 3] normalised float.
          blocks: numbers of blocks, 0-based and over all stages; the maps are in their order.
          keep: as in `__call__`.
        """
        kept = {
            number: self._attention_map(visit)
            for number, visit in self._visits_of(blocks, images, None, keep)
        }
        return [kept[number] for number in blocks]

    def measure_attention(
        self, images: jax.Array, measure: Callable[[int, AttentionMap], PyTree]
    ) -> list[PyTree]:
        """What a function makes of the attention of each block, without drop path.

        Every block's attention is measured before the next block runs. So no more than one block's
        weights take memory at a time, while a compiler may compute the weights of all blocks of
        `attention_maps` before it uses any.

        Args:
          images: [B, H, W, 3] normalised float.
          measure: from the number of a block and its attention to arrays.

        Returns:
          The results of `measure`, by block.
        """
        visits, x, results = self._visits(images, None, None), None, []
        for number in range(self.depth):
            if results:
                x, results[-1] = jax.lax.optimization_barrier((x, results[-1]))
            visit = visits.send(x)
            results.append(measure(number, self._attention_map(visit)))
            x = visit.after
        return results

    def _visits(
        self, images: jax.Array, drops: jax.Array | None, keep: jax.Array | None
    ) -> Generator[Visit, jax.Array | None, None]:
        """Runs the blocks in their order; arguments as in `__call__`.

        Tokens that are sent to the generator go on in the place of those that left the last block.
        """
        raise NotImplementedError

    def _visits_of(
        self,
        blocks: Sequence[int],
        images: jax.Array,
        drops: jax.Array | None,
        keep: jax.Array | None,
    ) -> Iterator[tuple[int, Visit]]:
        """The visits of the named blocks; blocks after the last of them do not run."""
        outside = [number for number in blocks if not 0 <= number < self.depth]
        if outside:
            raise ValueError(f"blocks {outside} asked for, but this model has {self.depth}")
        runs = range(max(blocks, default=-1) + 1)  # first in zip, so that no block runs for nothing
        for number, visit in zip(runs, self._visits(images, drops, keep), strict=False):
            if number in blocks:
                yield number, visit

    def _run_block(
        self,
        block: Any,
        x: jax.Array,
        drops: jax.Array | None,
        shared_bias: jax.Array | None,
        *places: Any,
    ) -> jax.Array:
        """The block's result; in a backward pass, what `remat` does not keep is recomputed."""

        def run(block, x, drops, shared_bias):
            return block(x, drops, shared_bias, *places)

        return self._recomputed(run)(block, x, drops, shared_bias)

    def _recomputed(self, run: Callable) -> Callable:
        """The same function, of which a backward pass recomputes what `remat` does not keep."""
        if self.remat is None:
            return run
        name = REMAT_POLICIES[self.remat]
        policy = None if name is None else getattr(jax.checkpoint_policies, name)
        return jax.checkpoint(run, policy=policy)

    @staticmethod
    def resize_positions(
        params: dict[str, Any],
        arch: dict[str, Any],
        image_size: sizes.ImageSize,
        *,
        method: PositionResize,
    ) -> dict[str, Any]:
        """The same parameters, in a network whose parameters serve any size."""
        del arch, image_size, method
        return params

    @staticmethod
    def block_of(path: str, arch: dict[str, Any]) -> int:
        """The first block that reads a parameter, where blocks are counted over all stages.

        -1 for the embedding; the number of all blocks for what comes after them. What stands
        between two stages belongs to a block of the stage that holds it.
        """
        raise NotImplementedError

    @staticmethod
    def is_statistic(path: str) -> bool:
        """Whether a parameter is a running statistic of a BatchNorm, which no gradient trains."""
        del path
        return False

    @staticmethod
    def untied(arch: dict[str, Any]) -> dict[str, Any]:
        """The same architecture, in a network whose blocks share no position bias."""
        return arch

    @staticmethod
    def untie_positions(params: dict[str, Any], arch: dict[str, Any]) -> dict[str, Any]:
        """The parameters for `untied(arch)`."""
        del arch
        return params

    def _attention_map(self, visit: Visit) -> AttentionMap:
        return AttentionMap(
            visit.block.attention_inputs(visit.before, *visit.positions),
            cls=self.cls,
            registers=self.registers,
            grid=visit.grid,
            window=visit.window,
            shift=visit.shift,
            indices=visit.indices,
        )

    def _feature_map(self, tokens: jax.Array, visit: Visit) -> FeatureMap:
        return FeatureMap(
            tokens,
            cls=self.cls,
            registers=self.registers,
            grid=visit.grid,
            indices=visit.indices,
        )

    def _check_images(self, images: jax.Array) -> None:
        size = sizes.sides(self.image_size)
        if images.shape[1:3] != size:
            raise ValueError(
                f"images of {images.shape[1:3]} pixels; this model was built for {size}"
            )
