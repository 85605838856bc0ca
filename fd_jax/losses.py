"""Losses on arrays, always computed in float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fd_jax.data.base import IGNORED
from fd_jax.models.segmenter import resampling


def whiten(features: jax.Array, *, eps: float = 1e-5) -> jax.Array:
    """Normalises each token over its channels with no learned scale (docs/reference.md#whitening).

    This is the paper's LayerNorm without affine parameters: biased variance, torch's default eps.
    [..., D] -> [..., D] float32.
    """
    x = features.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + eps)


def l2_normalize(features: jax.Array, *, eps: float = 1e-12) -> jax.Array:
    """Scales tokens to unit length (docs/reference.md#table-3). [..., D] -> [..., D] float32."""
    x = features.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    return x / jnp.maximum(norm, eps)


def smooth_l1(prediction: jax.Array, target: jax.Array, *, beta: float = 2.0) -> jax.Array:
    """Element-wise smooth L1, float32: `d^2 / (2 beta)` below beta, `|d| - beta/2` above."""
    distance = jnp.abs(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    quadratic = jnp.square(distance) / (2 * beta)
    return jnp.where(distance < beta, quadratic, distance - beta / 2)


def cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Cross entropy against a distribution. logits, target: [B, K] -> [B] float32."""
    return -jnp.sum(target * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def pixel_cross_entropy(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Cross entropy of each example, the mean over its pixels (docs/reference.md#upernet).

    The logits are resized to the mask bilinearly. Ignored pixels have the loss 0, and count in the
    mean: mmsegmentation divides by all pixels, so pictures with few labels weigh less.

    Args:
      logits: [B, h, w, K], of any size.
      mask: uint8 [B, H, W], classes and `IGNORED`.

    Returns:
      [B] float32.
    """
    logits = resampling.resize(logits.astype(jnp.float32), mask.shape[1:])
    # A comparison with all classes in place of a gather, whose gradient would be a scatter.
    chosen = mask[..., None] == jnp.arange(logits.shape[-1])
    own = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
    each = jax.nn.logsumexp(logits, axis=-1) - own
    return jnp.mean(jnp.where(mask == IGNORED, 0.0, each), axis=(1, 2))


def cosine_similarity(a: jax.Array, b: jax.Array, *, eps: float = 1e-12) -> jax.Array:
    """Cosine similarity of corresponding tokens. [..., D] x 2 -> [...] float32."""
    return jnp.sum(l2_normalize(a, eps=eps) * l2_normalize(b, eps=eps), axis=-1)


def similarities(tokens: jax.Array) -> jax.Array:
    """Cosine of every token of an image with every other. [B, T, D] -> [B, T, T] float32."""
    unit = l2_normalize(tokens)
    return jnp.einsum("bid,bjd->bij", unit, unit, precision="highest")


# The distances that a student can reduce, by name: (prediction, target, beta) -> mean of each
# example. [B, T, D] x 2 -> [B] float32. Only smooth L1 has a beta.
DISTANCES: dict[str, Callable[[jax.Array, jax.Array, float], jax.Array]] = {
    "smooth_l1": lambda p, t, beta: jnp.mean(smooth_l1(p, t, beta=beta), axis=(1, 2)),
    "mse": lambda p, t, _: jnp.mean(
        jnp.square(p.astype(jnp.float32) - t.astype(jnp.float32)), axis=(1, 2)
    ),
    "cosine": lambda p, t, _: 1 - jnp.mean(cosine_similarity(p, t), axis=1),
    "relation": lambda p, t, _: jnp.mean(
        jnp.square(similarities(p) - similarities(t)), axis=(1, 2)
    ),
}
