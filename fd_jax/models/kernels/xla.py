"""Attention as XLA compiles it: the reference for all others, on every platform and dtype.

Logits and weights [B, A, N, N] are arrays of the program. The forward pass that a gradient follows
keeps the weights in the dtype of the values and recomputes nothing.
"""

import jax
import jax.numpy as jnp

from fd_jax.models.kernels.base import Implementation
from fd_jax.models.layers import at_least_float32


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *, bias: jax.Array | None, scale: float
) -> jax.Array:
    """Softmax attention, see `fd_jax.models.attention.attend`."""
    return softmax_average(attention_logits(q, k, bias=bias, scale=scale), v)


def attention_logits(
    q: jax.Array, k: jax.Array, *, bias: jax.Array | None, scale: float
) -> jax.Array:
    """The numbers whose softmax over keys weights the values.

    Args:
      q: [B, N, A, d]; `k` has the same shape.
      k: keys.
      bias: [A, N, N] or [G, A, N, N], see `fd_jax.models.attention.attend`; or None.
      scale: factor on q k^T.

    Returns:
      [B, A, N, N] float32.
    """
    wide = at_least_float32(q.dtype)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q * scale, k, preferred_element_type=wide)
    if bias is None:
        return logits
    grouped = logits.reshape(-1, *bias.shape) if bias.ndim == 4 else logits
    return (grouped + bias).reshape(logits.shape)


@jax.custom_vjp
def softmax_average(logits: jax.Array, v: jax.Array) -> jax.Array:
    """Averages of values, weighted by the softmax of logits over keys.

    Where a gradient is taken, the weights are rounded to the dtype of `v`, summed after that, and
    their sum divides at the end. So they sum to one however coarse that dtype is, and the backward
    pass, which keeps them and no logits, lets nothing through that all keys share.

    Args:
      logits: [B, A, N, N] float32.
      v: [B, N, A, d].

    Returns:
      [B, N, A, d] in the dtype of `v`.
    """
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def _softmax_average_forward(logits, v):
    finfo = jnp.finfo(v.dtype)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    # Explicit, as XLA may skip the rounding of a mere cast where it sums.
    weights = jax.lax.reduce_precision(weights, finfo.nexp, finfo.nmant)
    total = jnp.sum(weights, axis=-1)  # [B, A, N]
    weights = weights.astype(v.dtype)
    average = _per_query(jnp.einsum("bhqk,bkhd->bqhd", weights, v), total)
    return average, (weights, total, v)


def _softmax_average_backward(residuals, g):
    weights, total, v = residuals
    g = _per_query(g, total)
    dv = jnp.einsum("bhqk,bqhd->bkhd", weights, g)
    dp = jnp.einsum("bqhd,bkhd->bhqk", g, v).astype(total.dtype)
    w = jax.lax.optimization_barrier(weights).astype(total.dtype)  # as in layers._activate_backward
    mean = jnp.sum(w * dp, axis=-1) / total
    return w * (dp - mean[..., None]), dv


def _per_query(x, total):
    """Divides [B, N, A, d] by [B, A, N] in the latter's dtype; the result in the former's."""
    return (x.astype(total.dtype) / total.swapaxes(1, 2)[..., None]).astype(x.dtype)


softmax_average.defvjp(_softmax_average_forward, _softmax_average_backward)


IMPLEMENTATION = Implementation("xla", attend, refuses=lambda platform, dtype, widths: None)
