"""What every backbone returns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens"],
    meta_fields=["cls", "registers", "grid"],
)
@dataclasses.dataclass(frozen=True)
class FeatureMap:
    """The tokens of one network, and how to read them.

    Attributes:
      tokens: [B, cls + registers + H*W, D]; class token first, then registers, then patches
        row by row from the top left.
      cls: 1 with a class token, 0 without.
      registers: number of register (storage) tokens; they are never part of a target.
      grid: (H, W) of the patches.
    """

    tokens: jax.Array
    cls: int
    registers: int
    grid: tuple[int, int]

    @property
    def cls_token(self) -> jax.Array:
        """The class token. [B, D]"""
        if not self.cls:
            raise ValueError("this feature map has no class token")
        return self.tokens[:, 0]

    @property
    def patches(self) -> jax.Array:
        """The patch tokens, row-major. [B, H*W, D]"""
        return self.tokens[:, self.cls + self.registers :]

    @property
    def full(self) -> jax.Array:
        """Class token (where there is one) and patches, without registers. [B, cls + H*W, D]"""
        if not self.registers:
            return self.tokens
        return jnp.concatenate([self.tokens[:, : self.cls], self.patches], axis=1)
