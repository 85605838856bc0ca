"""Rotary positions: queries and keys are turned by angles that grow with the place of a patch."""

import copy
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fd_jax.errors import ConfigError, check_choice

RopePairs = Literal["halves", "neighbours"]
RopeAxes = Literal["yx", "xy"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """Which angles there are, and what they turn: the differences between the libraries.

    Attributes:
      theta: base of the frequencies.
      pairs: which channels of a head are a pair that turns: i and i + d/2 ("halves"), or 2i and
        2i + 1 ("neighbours").
      reference: what the n patches of an axis measure. None: their centres lie in [-1, 1], where 1
        is a whole turn (DINOv3). R: patch i is at (i + offset) / n * R radians, so that any grid
        has the range of R patches (EVA-02, Perception Encoder). 0: patch i is at i + offset
        radians, however many there are (RoPE-ViT).
      offset: added to the number of a patch on both axes.
      axes: the axis of the first half of the frequencies: rows ("yx") or columns ("xy").
    """

    theta: float
    pairs: RopePairs = "halves"
    reference: int | None = None
    offset: float = 0.0
    axes: RopeAxes = "yx"

    def check(self, head_width: int) -> None:
        """Refuses what describes no rotation.

        Raises:
          ConfigError: there is no such arrangement, the channels of a head are no pairs on two
            axes, or an offset is given that nothing uses.
        """
        check_choice("rope_pairs", self.pairs, RopePairs.__args__)
        check_choice("rope_axes", self.axes, RopeAxes.__args__)
        if head_width % 4:
            raise ConfigError(
                f"rotary positions turn pairs of channels on two axes, but {head_width} channels "
                "per head are no multiple of 4; change width or heads"
            )
        if self.offset and self.reference is None:
            raise ConfigError(
                f"rope_offset={self.offset} is added to numbers of patches, which only positions "
                "with a rope_reference count; set rope_reference, or rope_offset=0"
            )

    def angles(self, grid: tuple[int, int], head_width: int) -> np.ndarray:
        """The angle of every pair of channels at every patch. [H*W, d/2] float64, radians."""
        frequencies = self.theta ** -(np.arange(head_width // 4) / (head_width // 4))
        places = np.meshgrid(*(self._places(side) for side in grid), indexing="ij")
        ordered = places if self.axes == "yx" else places[::-1]
        coordinates = np.stack(ordered, axis=-1).reshape(-1, 2)
        return (coordinates[:, :, None] * frequencies).reshape(len(coordinates), -1)

    def _places(self, side: int) -> np.ndarray:
        """Coordinates of the patches on an axis of `side` patches, radians."""
        if self.reference is None:
            return 2 * np.pi * ((np.arange(side) + 0.5) / side * 2 - 1)
        numbers = np.arange(side) + self.offset
        return numbers / side * self.reference if self.reference else numbers


class Rotation:
    """Axial rotary position embedding of the patch tokens; prefix tokens stay as they are.

    Pairs of channels are always d/2 apart here. Where a network has them side by side, `arranged`
    reorders the weights that make queries and keys, whose products do not depend on the order. By
    the compiler for TPUs, exchanging neighbours in every token takes a forward pass a third more
    cycles.

    Attributes:
      cos, sin: [H*W, 1, d] float32, or [B, P, 1, d] for the patches of every row, see `at`.
    """

    cos: Any
    sin: Any

    def __init__(self, rope: Rope, grid: tuple[int, int], prefix: int, head_width: int):
        self.prefix = prefix
        self.pairs = rope.pairs
        angles = np.tile(rope.angles(grid, head_width), 2)[:, None]  # [H*W, 1, d]
        self.cos = np.cos(angles).astype(np.float32)
        self.sin = np.sin(angles).astype(np.float32)

    def at(self, indices: jax.Array) -> "Rotation":
        """The rotation for rows that have some patches only. indices: [B, P] int32."""
        taken = copy.copy(self)
        taken.cos, taken.sin = (jnp.asarray(table)[indices] for table in (self.cos, self.sin))
        return taken

    def arranged(self, parameter: jax.Array, heads: int) -> jax.Array:
        """A kernel or bias of queries or keys whose pairs are d/2 apart. [..., D] -> [..., D]."""
        if self.pairs == "halves":
            return parameter
        pairs = parameter.reshape(*parameter.shape[:-1], heads, -1, 2)
        return jnp.swapaxes(pairs, -1, -2).reshape(parameter.shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Rotates arranged queries or keys. [B, N, A, d] -> [B, N, A, d], in float32 inside."""
        patches = x[:, self.prefix :].astype(jnp.float32)
        first, second = jnp.split(patches, 2, axis=-1)
        turned = jnp.concatenate([-second, first], axis=-1)
        rotated = patches * self.cos + turned * self.sin
        return jnp.concatenate([x[:, : self.prefix], rotated.astype(x.dtype)], axis=1)
