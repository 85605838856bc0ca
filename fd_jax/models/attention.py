"""Attention: one function behind which implementations are exchanged, and the layers around it.

The implementations are files of `fd_jax.models.kernels`. What they compute can also be had in its
parts, logits, weights and values, for diagnostics.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from fd_jax.models import kernels
from fd_jax.models.kernels.xla import attention_logits
from fd_jax.models.layers import Dense, LayerNorm, multiply, zeros
from fd_jax.models.rotary import Rotation

QkvBias = Literal["qkv", "qv", "none"]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None,
    scale: float,
    implementation: str,
    **sums: Any,
) -> jax.Array:
    """Softmax attention: softmax(scale * q k^T + bias) v.

    Args:
      q: [B, N, A, d] queries; `k` and `v` have the same shape.
      k: keys.
      v: values.
      bias: [A, N, N] or [G, A, N, N] float32, added to the logits, or None. G divides B, and
        bias g belongs to the rows g, g + G, g + 2G, ... (the windows of one image are G rows).
      scale: factor on q k^T.
      implementation: key of `kernels.IMPLEMENTATIONS`; all are equal within rounding.
      **sums: further arguments of implementations with `sums_gradients`.

    Returns:
      [B, N, A, d] in the dtype of `v`.
    """
    chosen = kernels.IMPLEMENTATIONS[implementation]
    return chosen.attend(q, k, v, bias=bias, scale=scale, **sums)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "k", "v", "bias", "added"],
    meta_fields=["scale"],
)
@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """What softmax attention is computed from, in one layer.

    Attributes:
      q, k, v: [B, N, A, d]; the windows of a windowed network are rows of the batch. Rotated
        queries and keys have their channels as `Rotation.arranged` orders them.
      bias: [A, N, N] or [G, A, N, N] float32, see `attend`; or None.
      scale: factor on q k^T.
      added: what is in q, k and v already and has its gradient summed by the implementation, see
        `kernels.Implementation.sums_gradients`; () for nothing.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias: jax.Array | None
    scale: float
    added: tuple[jax.Array | None, ...] = ()

    def attend(self, implementation: str) -> jax.Array:
        """The weighted average of values. -> [B, N, A, d]."""
        sums = {"added": self.added} if self.added else {}
        return attend(
            self.q,
            self.k,
            self.v,
            bias=self.bias,
            scale=self.scale,
            implementation=implementation,
            **sums,
        )

    def logits(self) -> jax.Array:
        """The numbers whose softmax over keys weights the values. -> [B, A, N, N] float32."""
        return attention_logits(self.q, self.k, bias=self.bias, scale=self.scale)

    def weights(self) -> jax.Array:
        """The attention weights, whose sum over the last axis is 1. -> [B, A, N, N] float32."""
        return jax.nn.softmax(self.logits(), axis=-1)


class Attention(nnx.Module):
    """Multi-head self-attention; one qkv kernel [D, 3, D] (axis 1: q, k, v; head-major).

    With `norm_eps`, a LayerNorm stands between the heads and the output projection.

    Attributes:
      sums_biases: whether a kernel may sum the gradients of the biases of q, k and v.
    """

    sums_biases = True

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: QkvBias,
        rel_pos_bias: Callable[..., jax.Array] | None,
        norm_eps: float | None = None,
        implementation: str,
        dtype: DTypeLike,
        grad_dtype: DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer,
        out_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.implementation = implementation
        common = {"dtype": dtype, "grad_dtype": grad_dtype, "rngs": rngs}
        self.qkv = Dense(width, (3, width), use_bias=False, kernel_init=kernel_init, **common)
        # Separate vectors, since which of them exist differs between families and since weight
        # decay spares tensors of one dimension.
        self.q_bias = None if qkv_bias == "none" else zeros(width)
        self.k_bias = zeros(width) if qkv_bias == "qkv" else None
        self.v_bias = None if qkv_bias == "none" else zeros(width)
        self.rel_pos_bias = rel_pos_bias
        self.norm = (
            None if norm_eps is None else LayerNorm(width, eps=norm_eps, dtype=dtype, rngs=rngs)
        )
        self.proj = Dense(width, width, kernel_init=out_init, **common)

    def qkv_heads(
        self, x: jax.Array, rotate: Rotation | None, biases: Sequence[jax.Array | None]
    ) -> tuple[jax.Array, ...]:
        """Queries, keys and values per head. [B, N, D] -> 3 x [B, N, A, d]."""
        q, k, v = self.project(x, biases, rotate)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        return q, k, v

    def project(
        self,
        x: jax.Array,
        biases: Sequence[jax.Array | None],
        rotate: Rotation | None = None,
    ) -> list[jax.Array]:
        """Queries, keys and values, arranged for a rotation. [B, N, D] -> 3 x [B, N, A, d]."""
        # A matmul each: of one result [B, N, 3, D] a TPU copies every part before its first use.
        batch, tokens, width = x.shape
        rows, kernel, lora = x.reshape(-1, width), self.qkv.kernel[...], self.qkv.lora
        reduced, scales = None if lora is None else lora.reduce(rows), self.qkv.scale

        def arranged(parameter: jax.Array, index: int) -> jax.Array:
            if rotate is None or index == 2:  # values are not rotated
                return parameter
            return rotate.arranged(parameter, self.heads)

        parts = []
        for index, bias in enumerate(biases):
            weights = arranged(kernel[:, index], index)
            bias = None if bias is None else arranged(bias, index)
            scale = None if scales is None else arranged(scales[index], index)
            part = multiply(rows, weights, scale, bias, self.qkv.dtype, self.qkv.grad_dtype)
            if lora is not None:
                part = part + lora.expand(reduced, arranged(lora.b[...][:, index], index))
            parts.append(part.reshape(batch, tokens, self.heads, width // self.heads))
        return parts

    def _biases(self) -> list[jax.Array | None]:
        """Those of queries, keys and values, [D] float32."""
        biases = (self.q_bias, self.k_bias, self.v_bias)
        return [None if bias is None else bias[...] for bias in biases]

    def _summed(self, rotate: Rotation | None) -> tuple[jax.Array | None, ...]:
        """The biases whose gradients the kernel sums: it does not see those that are rotated."""
        sums = kernels.IMPLEMENTATIONS[self.implementation].sums_gradients
        if not sums or not self.sums_biases:
            return ()
        q, k, v = self._biases()
        return (q, k, v) if rotate is None else (None, None, v)

    def scaled(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array, float]:
        """What the logits are the scaled product of: queries, keys, and the factor."""
        return q, k, q.shape[-1] ** -0.5

    def inputs(
        self,
        x: jax.Array,
        *,
        shared_bias: jax.Array | None,
        rotate: Rotation | None = None,
        mask: jax.Array | None = None,
        indices: jax.Array | None = None,
    ) -> AttentionInputs:
        """What attention is computed from; arguments as in `__call__`."""
        return self._inputs(x, self._bias(shared_bias, mask, indices), rotate)

    def _inputs(self, x, bias, rotate, added=()) -> AttentionInputs:
        biases = self._biases()
        if added:  # those get their gradient there, and none here
            pairs = zip(biases, added, strict=True)
            biases = [b if a is None else jax.lax.stop_gradient(b) for b, a in pairs]
        q, k, v = self.qkv_heads(x, rotate, biases)
        q, k, scale = self.scaled(q, k)
        return AttentionInputs(q, k, v, bias, scale, added)

    def _bias(self, shared, mask, indices) -> jax.Array | None:
        bias = shared
        if self.rel_pos_bias is not None:
            bias = self.rel_pos_bias() if indices is None else self.rel_pos_bias(indices)
        if mask is not None:
            bias = jnp.zeros((self.heads, 1, 1)) if bias is None else bias
            bias = bias + mask[:, None]
        return bias

    def __call__(
        self,
        x: jax.Array,
        *,
        shared_bias: jax.Array | None,
        rotate: Rotation | None = None,
        mask: jax.Array | None = None,
        indices: jax.Array | None = None,
    ) -> jax.Array:
        """[B, N, D] -> [B, N, D].

        Args:
          x: tokens; the windows of a windowed network are rows of the batch.
          shared_bias: [A, N, N] or [B, A, N, N] for attention without a bias of its own, or None.
          rotate: rotary position embedding, or None.
          mask: [G, N, N] added to the bias of row g of every G, see `attend`; or None.
          indices: [B, P] int32, the places of patches on the grid of the bias table, where rows
            have patches of their own; None where every row has all of them.
        """
        tokens, bias = x.shape[1], self._bias(shared_bias, mask, indices)
        added = kernels.IMPLEMENTATIONS[self.implementation].padding(tokens, bias is not None)
        if bias is None or not added or rotate is not None:
            return self.output(self._inputs(x, bias, rotate, self._summed(rotate)))
        # What a kernel needs beside the real tokens is added before there are queries, keys and
        # values, and taken off after the projection: two copies instead of eight.
        x = jnp.pad(x, ((0, 0), (0, added), (0, 0)))
        return self.output(self._inputs(x, kernels.mask_keys(bias, added), None))[:, :tokens]

    def output(self, inputs: AttentionInputs) -> jax.Array:
        """Weighted averages of values through the output projection. -> [B, N, D]."""
        average = inputs.attend(self.implementation)
        average = average.reshape(*average.shape[:2], -1)
        if self.norm is not None:
            # One row per token, as everywhere outside attention, see `block.Block`.
            rows = average.reshape(-1, average.shape[-1])
            average = self.norm(rows).reshape(average.shape)
        return self.proj(average)


class RelativePositionBias(nnx.Module):
    """One learned bias per head and relative position (BEiT's table), zero at the start."""

    def __init__(self, grid: tuple[int, int], heads: int, *, cls_token: bool):
        self.grid = grid
        self.cls_token = cls_token
        rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + (3 if cls_token else 0)
        self.table = nnx.Param(jnp.zeros((rows, heads), jnp.float32))

    def __call__(self, indices: jax.Array | None = None) -> jax.Array:
        """The bias of every (query, key) pair.

        Args:
          indices: [B, P] int32, the patches of every row, counted row by row from the top left;
            None where every row has all of them.

        Returns:
          [A, N, N] float32, or [B, A, N, N] for the patches of every row.
        """
        if indices is None:
            index = relative_position_index(self.grid, cls_token=self.cls_token)
            return self.table[...].T[:, index]
        tokens = indices
        if self.cls_token:
            tokens = jnp.pad(indices, ((0, 0), (1, 0)), constant_values=CLASS)
        index = _table_rows(tokens, self.grid, jnp.where)
        return jnp.moveaxis(self.table[...][index], -1, 1)


CLASS = -1  # place of the class token, where those of patches count from 0


@functools.lru_cache(maxsize=32)
def relative_position_index(grid: tuple[int, int], *, cls_token: bool) -> np.ndarray:
    """Row of the bias table for every query and key. [N, N] int32, N = cls + H*W.

    Patch to patch: (dr + H - 1)(2W - 1) + (dc + W - 1). The last three rows are class query to
    patch key, patch query to class key, and class to class.
    """
    tokens = np.arange(CLASS if cls_token else 0, grid[0] * grid[1])
    return _table_rows(tokens, grid, np.where).astype(np.int32)


def _table_rows(tokens: Any, grid: tuple[int, int], where: Callable[..., Any]) -> Any:
    """Row of the bias table for the places of queries and keys. [..., N] -> [..., N, N]."""
    height, width = grid
    query, key = tokens[..., :, None], tokens[..., None, :]
    dr = query // width - key // width + height - 1
    dc = query % width - key % width + width - 1
    pairs = (2 * height - 1) * (2 * width - 1)
    index = where(key == CLASS, pairs + 1, dr * (2 * width - 1) + dc)
    return where(query == CLASS, where(key == CLASS, pairs + 2, pairs), index)
