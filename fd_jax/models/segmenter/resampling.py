"""Bilinear resizing and adaptive average pooling, as PyTorch defines them.

Both are linear along one axis, so each is a [target, source] matrix that is applied to rows and to
columns: two small matmuls, with no gathers in either direction.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.lru_cache(maxsize=64)
def bilinear_matrix(source: int, target: int, *, align_corners: bool) -> np.ndarray:
    """Linear interpolation between neighbours, without antialiasing. float64 [target, source]

    Args:
      source: number of samples.
      target: number of samples wanted.
      align_corners: True puts the centres of the first and last samples on top of each other;
        False does that with the outer edges of the two rows, and repeats the border.
    """
    places = np.arange(target, dtype=np.float64)
    if align_corners:
        places *= (source - 1) / max(target - 1, 1)
    else:
        places = np.clip((places + 0.5) * source / target - 0.5, 0, source - 1)
    left = np.minimum(np.floor(places).astype(int), max(source - 2, 0))
    right = np.minimum(left + 1, source - 1)
    matrix = np.zeros((target, source))
    rows = np.arange(target)
    np.add.at(matrix, (rows, left), 1 - (places - left))
    np.add.at(matrix, (rows, right), places - left)
    return matrix


@functools.lru_cache(maxsize=64)
def pooling_matrix(source: int, bins: int) -> np.ndarray:
    """Adaptive average pooling. float64 [bins, source]

    Bin i covers samples floor(i * source / bins) to ceil((i + 1) * source / bins) - 1. If `bins`
    does not divide `source`, neighbouring bins share samples.
    """
    matrix = np.zeros((bins, source))
    for i in range(bins):
        start, stop = i * source // bins, -(-(i + 1) * source // bins)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def resize(x: jax.Array, size: tuple[int, ...], *, align_corners: bool = False) -> jax.Array:
    """Bilinear resizing, see `bilinear_matrix`. [B, H, W, C] -> [B, h, w, C] in the dtype of `x`.

    Args:
      x: [B, H, W, C].
      size: (h, w) wanted.
      align_corners: see `bilinear_matrix`; False in all of semantic segmentation here
        (docs/reference.md#upernet).
    """
    matrix = functools.partial(bilinear_matrix, align_corners=align_corners)
    return _apply(matrix, x, size)


def adaptive_mean(x: jax.Array, bins: int) -> jax.Array:
    """The means of bins x bins areas, see `pooling_matrix`. [B, H, W, C] -> [B, bins, bins, C]."""
    return _apply(pooling_matrix, x, (bins, bins))


def _apply(matrix, x, size):
    # Results that people see (logits at the size of a picture) are float32, and TPUs would round
    # the factors of a float32 matmul to bfloat16.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    height, width = x.shape[1:3]
    if height != size[0]:
        x = product("ih,bhwc->biwc", jnp.asarray(matrix(height, size[0]), x.dtype), x)
    if width != size[1]:
        x = product("jw,bhwc->bhjc", jnp.asarray(matrix(width, size[1]), x.dtype), x)
    return x
