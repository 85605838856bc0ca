"""Windows over a grid of tokens: cutting, shifting, masking, and the position biases inside.

Everything that depends on sizes alone is a numpy constant, computed once per size.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from fd_jax.models import layers
from fd_jax.models.attention import Attention
from fd_jax.models.rotary import Rotation

# Logit of a pair that the shift brought together from afar (docs/reference.md#swin-shift-mask).
MASKED = -100.0
HIDDEN = 512  # of the continuous position bias
MAX_LOGIT_SCALE = math.log(100.0)


def partition(x: jax.Array, grid: int, window: int, shift: int) -> jax.Array:
    """Rolls by -shift and cuts into windows. [B, g*g, D] -> [B*n*n, w*w, D] with n = g/w."""
    if window == grid:
        return x
    batch, _, width = x.shape
    x = x.reshape(batch, grid, grid, width)
    if shift:
        x = jnp.roll(x, (-shift, -shift), (1, 2))
    n = grid // window
    x = x.reshape(batch, n, window, n, window, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch * n * n, window * window, width)


def join(x: jax.Array, grid: int, window: int, shift: int) -> jax.Array:
    """The inverse of `partition`. [B*n*n, w*w, D] -> [B, g*g, D]."""
    if window == grid:
        return x
    n, width = grid // window, x.shape[-1]
    x = x.reshape(-1, n, n, window, window, width).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(-1, grid, grid, width)
    if shift:
        x = jnp.roll(x, (shift, shift), (1, 2))
    return x.reshape(-1, grid * grid, width)


@functools.lru_cache(maxsize=32)
def shift_mask(grid: int, window: int, shift: int) -> np.ndarray:
    """0 for neighbours, MASKED for tokens that only the roll made neighbours. [n*n, w*w, w*w].

    The rolled grid is labelled by the 3 x 3 regions cut at g - w and g - s on both axes.
    """
    axis = np.digitize(np.arange(grid), (grid - window, grid - shift))
    n = grid // window
    labels = (3 * axis[:, None] + axis).reshape(n, window, n, window)
    labels = labels.transpose(0, 2, 1, 3).reshape(n * n, window * window)
    differs = labels[:, :, None] != labels[:, None, :]
    return np.where(differs, MASKED, 0.0).astype(np.float32)


def expand_offsets(table: jax.Array, window: int) -> jax.Array:
    """One value per head and offset to one per pair of tokens. [(2w-1)^2, A] -> [A, w*w, w*w].

    The row of query (r, c) and key (r', c') is (r - r' + w - 1)(2w - 1) + (c - c' + w - 1). Both
    axes are Toeplitz, so that broadcasts and reshapes do, forward and backward, what is a gather
    and a scatter otherwise.
    """
    side, heads = 2 * window - 1, table.shape[-1]
    x = jnp.moveaxis(table, -1, 0).reshape(heads, side, side)
    x = _toeplitz(x, window)  # [A, 2w-1, c, c']
    x = _toeplitz(jnp.moveaxis(x, 1, -1), window)  # [A, c, c', r, r']
    tokens = window * window
    return x.transpose(0, 3, 1, 4, 2).reshape(heads, tokens, tokens)


def _toeplitz(x: jax.Array, n: int) -> jax.Array:
    """out[..., i, j] = x[..., i - j + n - 1]. [..., 2n-1] -> [..., n, n]."""
    lead, side = x.shape[:-1], 2 * n - 1
    rows = jnp.broadcast_to(x[..., None, ::-1], (*lead, n, side)).reshape(*lead, n * side)
    # Reading with one element less per row moves each row one to the left of the one above.
    rows = rows[..., n - 1 : n - 1 + n * (side - 1)] if n > 1 else rows
    return rows.reshape(*lead, n, -1)[..., :n]


@functools.lru_cache(maxsize=32)
def log_offsets(window: int, pretrained: int) -> np.ndarray:
    """Offsets of a window's tokens on SwinV2's logarithmic scale. [(2w-1)^2, 2], (row, column).

    sign(v) log2(|v| + 1) / 3 with v = 8 o / (p - 1), for the offsets o = -(w-1) .. w-1.

    Args:
      window: w.
      pretrained: p, the window that the scale belongs to; 0 for w itself.
    """
    # A window of one token has the one offset 0; the guard keeps it from being 0 / 0
    # (docs/reference.md#quirk-window-scale).
    reach = max((pretrained or window) - 1, 1)
    v = 8 * np.arange(-(window - 1), window) / reach
    scaled = np.sign(v) * np.log2(np.abs(v) + 1) / 3
    rows, columns = np.meshgrid(scaled, scaled, indexing="ij")
    return np.stack([rows, columns], axis=-1).reshape(-1, 2)


class WindowBias(nnx.Module):
    """Swin's learned bias per head and offset, zero at the start."""

    def __init__(self, window: int, heads: int):
        self.window = window
        self.table = nnx.Param(jnp.zeros(((2 * window - 1) ** 2, heads), jnp.float32))

    def __call__(self) -> jax.Array:
        """The bias of every (query, key) pair. -> [A, N, N] float32."""
        return expand_offsets(self.table[...], self.window)


class ContinuousBias(nnx.Module):
    """SwinV2's bias: 16 sigmoid of a small network of the offset, so that any window has one."""

    def __init__(
        self,
        window: int,
        heads: int,
        *,
        pretrained: int,
        dtype: DTypeLike,
        kernel_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ):
        self.window = window
        self.pretrained = pretrained
        # Always in float32 at least: it is a small network, and its output spans 16 logits.
        wide = layers.at_least_float32(dtype)
        common = {"dtype": wide, "kernel_init": kernel_init, "rngs": rngs}
        self.fc1 = layers.Dense(2, HIDDEN, **common)
        self.fc2 = layers.Dense(HIDDEN, heads, use_bias=False, **common)

    def __call__(self) -> jax.Array:
        """The bias of every (query, key) pair. -> [A, N, N] float32."""
        offsets = jnp.asarray(log_offsets(self.window, self.pretrained), self.fc1.dtype)
        with jax.default_matmul_precision("highest"):
            table = self.fc2(jax.nn.relu(self.fc1(offsets)))
        return expand_offsets(16 * jax.nn.sigmoid(table), self.window)


class WindowAttention(Attention):
    """Attention inside windows, which are the rows of the batch."""

    sums_biases = False  # they are added to all three at once

    def project(
        self,
        x: jax.Array,
        biases: Sequence[jax.Array | None],
        rotate: Rotation | None = None,
    ) -> list[jax.Array]:
        """Queries, keys and values, which nothing rotates. [B, N, D] -> 3 x [B, N, A, d]."""
        del rotate
        # One matmul, unlike a ViT, and heads before the axis of three moves: only so does the
        # compiler for TPUs take the softmax of most windows together with the matmul of its
        # logits, without which a step moves a tenth more and a forward pass two fifths.
        batch, tokens, width = x.shape
        qkv = self.qkv(x)  # [B, N, 3, D]
        if any(bias is not None for bias in biases):
            nothing = jnp.zeros((width,))
            rows = [nothing if bias is None else bias for bias in biases]
            qkv = layers.add_parameter(qkv, jnp.stack(rows))
        qkv = qkv.reshape(batch, tokens, 3, self.heads, width // self.heads)
        return list(jnp.moveaxis(qkv, 2, 0))


class CosineAttention(WindowAttention):
    """Attention whose logits are cosines times a learned, bounded scale per head (SwinV2)."""

    def __init__(self, width: int, heads: int, **kwargs: Any):
        super().__init__(width, heads, **kwargs)
        self.logit_scale: Any = nnx.Param(jnp.full((heads,), math.log(10.0), jnp.float32))

    def scaled(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array, float]:
        """Unit queries times exp(logit_scale), and unit keys; normalised in float32."""
        scale = jnp.exp(jnp.minimum(self.logit_scale[...], MAX_LOGIT_SCALE))  # [A]
        scaled = _unit(q) * scale[:, None]
        return scaled.astype(q.dtype), _unit(k).astype(k.dtype), 1.0


def _unit(x: jax.Array) -> jax.Array:
    """X / max(|x|, 1e-12) over the last axis, with a gradient of zero at zero."""
    x = x.astype(layers.at_least_float32(x.dtype))
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))
