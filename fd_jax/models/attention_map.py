"""The attention of one block, for diagnostics: its weights, and where its tokens are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from fd_jax.models import windows
from fd_jax.models.attention import AttentionInputs


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs", "indices"],
    meta_fields=["cls", "registers", "grid", "window", "shift"],
)
@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """The attention of one block for a batch of images.

    Attention takes place within the rows of a batch. The rows of a ViT are its B images. The rows
    of a Swin are windows: those of the first image, row by row from the top left of its shifted
    grid, then those of the second image, and so on. R is the number of rows, A of heads, N of
    tokens in a row, and P of patches among them; d is the number of channels per head.

    A map holds what attention is computed from. Logits and weights, which are far larger, are
    computed when they are asked for, so that under `jax.jit` only what is used takes memory. They
    do not depend on the implementation that the network itself uses.

    Attributes:
      inputs: queries, keys, values and bias, as the block itself has them.
      cls: 1 where the first token of every row is a class token, 0 elsewhere.
      registers: number of register tokens that follow it; all further tokens are patches.
      grid: (H, W) of the patches of the whole image.
      window: side of the windows in patches; None where a row is an image.
      shift: by how many patches the grid was rolled up and left before it was cut into windows.
      indices: [B, P] int32, the patches in every row where the network saw only some of them, see
        `features.FeatureMap`; or None.
    """

    inputs: AttentionInputs
    cls: int
    registers: int
    grid: tuple[int, int]
    window: int | None = None
    shift: int = 0
    indices: jax.Array | None = None

    @property
    def prefix(self) -> int:
        """Number of tokens in front of the patches, class token and registers."""
        return self.cls + self.registers

    @property
    def values(self) -> jax.Array:
        """What is averaged. [R, N, A, d] in the network's dtype."""
        return self.inputs.v

    def logits(self) -> jax.Array:
        """The numbers whose softmax over keys gives the weights. -> [R, A, N, N] float32."""
        return self.inputs.logits()

    def weights(self) -> jax.Array:
        """Weight of every key (last axis) for every query; rows sum to 1. -> [R, A, N, N] float32.

        Pairs that a shifted window holds without being neighbours have a weight near 0.
        """
        return self.inputs.weights()

    def of_class_token(self) -> jax.Array:
        """Weight of every patch for the class token, the mean over heads. -> [R, P] float32.

        Only this row of the weights is computed. Class token and registers have the rest, so that
        the weights of the patches sum to less than 1.
        """
        if not self.cls:
            raise ValueError("this attention has no class token")
        bias = None if self.inputs.bias is None else self.inputs.bias[..., :1, :]
        row = dataclasses.replace(self.inputs, q=self.inputs.q[:, :1], bias=bias).weights()
        return jnp.mean(row[:, :, 0, self.prefix :], axis=1)

    def weighted_values(self) -> jax.Array:
        """The average of values for every query, by these weights. -> [R, N, A, d] float32."""
        weights = self.weights()
        return jnp.einsum("rhqk,rkhd->rqhd", weights, self.values.astype(weights.dtype))

    def positions(self) -> jax.Array:
        """Row and column of every patch on the grid of its image. -> [G, P, 2] int32.

        The patches of row r of the weights are those of entry r % G. For a Swin G is the number of
        windows in an image, and shifted windows give the places before the shift. For a ViT G is 1,
        or B where every image has patches of its own.
        """
        places = jnp.asarray(np.indices(self.grid, np.int32).reshape(2, -1).T)
        if self.indices is not None:
            return places[self.indices]
        if self.window is None:
            return places[None]
        return windows.partition(places[None], self.grid[0], self.window, self.shift)

    def join(self, x: jax.Array) -> jax.Array:
        """Puts the tokens of an image together again: the windows of a Swin become its grid.

        Args:
          x: [R, N, ...], one entry per token of every row.

        Returns:
          [B, N, ...] as it is for a ViT, [B, H*W, ...] row-major for a Swin.
        """
        if self.window is None:
            return x
        rows = x.reshape(*x.shape[:2], -1)
        joined = windows.join(rows, self.grid[0], self.window, self.shift)
        return joined.reshape(*joined.shape[:2], *x.shape[2:])
