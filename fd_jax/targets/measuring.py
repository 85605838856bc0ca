"""How far stored maps are from those that the teacher returned."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fd_jax import losses

# What is compared: maps as the teacher returns them, and the paper's target, each token whitened.
COMPARED = ("map", "whitened")


def apart(tokens: jax.Array, restored: jax.Array) -> jax.Array:
    """Of each map the four numbers that `summary` takes. [B, T, D] float32 x 2 -> [B, 2, 4]

    They are the sums of squared differences and of squares, the largest difference, and the sum of
    the tokens' cosine similarities, for each of `COMPARED`.
    """
    pairs = [(tokens, restored), (losses.whiten(tokens), losses.whiten(restored))]
    return jnp.stack([_apart(*pair) for pair in pairs], axis=1)


def _apart(tokens: jax.Array, restored: jax.Array) -> jax.Array:
    difference = restored - tokens
    numbers = (
        jnp.sum(jnp.square(difference), axis=(1, 2)),
        jnp.sum(jnp.square(tokens), axis=(1, 2)),
        jnp.max(jnp.abs(difference), axis=(1, 2)),
        jnp.sum(losses.cosine_similarity(tokens, restored), axis=1),
    )
    return jnp.stack(numbers, axis=1)


def added(totals: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Two results of `apart` as one: sums, and the larger of the largest. [2, 4] float64"""
    result = totals + more
    result[:, 2] = np.maximum(totals[:, 2], more[:, 2])
    return result


def nothing() -> np.ndarray:
    """The numbers of no map. [2, 4]"""
    return np.zeros((len(COMPARED), 4))


def summary(parts: Sequence[Sequence[Sequence[float]]], *, tokens: int) -> dict[str, dict]:
    """The error of all maps.

    Args:
      parts: numbers of each shard. [S, 2, 4]
      tokens: number of tokens in all maps.

    Returns:
      For each of `COMPARED` "relative_rms" (of the difference, over that of the teacher's tokens),
      "max" (the largest difference) and "cosine" (mean over the tokens).
    """
    totals = nothing()
    for part in parts:
        totals = added(totals, np.asarray(part, np.float64))
    return {
        name: {
            "relative_rms": float(np.sqrt(squared / squares)) if squares else 0.0,
            "max": float(largest),
            "cosine": float(cosines / tokens),
        }
        for name, (squared, squares, largest, cosines) in zip(COMPARED, totals, strict=True)
    }
