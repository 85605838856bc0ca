"""What every backbone returns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "indices"],
    meta_fields=["cls", "registers", "grid"],
)
@dataclasses.dataclass(frozen=True)
class FeatureMap:
    """The tokens of one network, and how to read them.

    Attributes:
      tokens: [B, cls + registers + P, D]; class token first, then registers, then the P patches:
        all H*W of them row by row from the top left, or those of `indices`.
      cls: 1 with a class token, 0 without.
      registers: number of register (storage) tokens; they are never part of a target.
      grid: (H, W) of the patches of the whole image.
      indices: [B, P] int32, where the network saw only some patches: the place of each patch on
        the grid, counted row by row from the top left. None where it saw all of them.
    """

    tokens: jax.Array
    cls: int
    registers: int
    grid: tuple[int, int]
    indices: jax.Array | None = None

    @property
    def cls_token(self) -> jax.Array:
        """The class token. [B, D]"""
        if not self.cls:
            raise ValueError("this feature map has no class token")
        return self.tokens[:, 0]

    @property
    def patches(self) -> jax.Array:
        """The patch tokens, row-major or as `indices` says. [B, P, D]"""
        return self.tokens[:, self.cls + self.registers :]

    @property
    def full(self) -> jax.Array:
        """Class token (where there is one) and patches, without registers. [B, cls + P, D]"""
        if not self.registers:
            return self.tokens
        return jnp.concatenate([self.tokens[:, : self.cls], self.patches], axis=1)

    def at(self, indices: jax.Array) -> "FeatureMap":
        """The map of some patches, taken from that of all; class token and registers stay.

        Args:
          indices: [B, P] int32, see above.
        """
        if self.indices is not None:
            raise ValueError("patches can only be taken from a feature map of all patches")
        prefix = self.tokens[:, : self.cls + self.registers]
        tokens = jnp.concatenate([prefix, take_patches(self.patches, indices)], axis=1)
        return dataclasses.replace(self, tokens=tokens, indices=indices)

    def on_grid(self, *, fill: float = 0.0) -> jax.Array:
        """The patch tokens in their places, with `fill` where there is none. [B, H*W, D]"""
        if self.indices is None:
            return self.patches
        batch, _, width = self.tokens.shape
        empty = jnp.full((batch, self.grid[0] * self.grid[1], width), fill, self.tokens.dtype)
        return empty.at[jnp.arange(batch)[:, None], self.indices].set(self.patches)


def take_patches(patches: jax.Array, indices: jax.Array) -> jax.Array:
    """Some patches of every image. [B, H*W, D] -> [B, P, D]; NaN for an index beyond the grid."""
    return jnp.take_along_axis(patches, indices[..., None], axis=1)
