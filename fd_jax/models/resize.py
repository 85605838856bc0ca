"""Resizing of position tables and images as matrices, equal to what the sources' code does.

Every method here is linear along one axis, so it is written as a [target, source] matrix in float64
and applied to rows and columns; the same code serves tables on the host and images on the device.
"""

from collections.abc import Sequence
import functools
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = TypeVar("Array", np.ndarray, jax.Array)

PositionResize = Literal["size", "offset_0.1", "antialias", "bilinear"]


@functools.lru_cache(maxsize=64)
def cubic_matrix(source: int, target: int, *, scale: float | None = None) -> np.ndarray:
    """Torch's bicubic (a = -0.75, align_corners False, no antialias). [target, source]

    Args:
      source: number of samples.
      target: number of samples wanted.
      scale: samples of the target per sample of the source as the caller stated it; torch takes the
        stated factor, not the ratio of the sizes, for its coordinates. None: the ratio.
    """
    step = source / target if scale is None else 1.0 / scale
    centres = (np.arange(target) + 0.5) * step - 0.5
    first = np.floor(centres).astype(int)
    matrix = np.zeros((target, source))
    for tap in range(-1, 3):
        weights = _cubic(centres - (first + tap), a=-0.75)
        columns = np.clip(first + tap, 0, source - 1)  # torch repeats the border
        np.add.at(matrix, (np.arange(target), columns), weights)
    return matrix


@functools.lru_cache(maxsize=64)
def antialias_matrix(
    source: int, target: int, *, method: Literal["bilinear", "bicubic"]
) -> np.ndarray:
    """Torch's and Pillow's antialiased interpolation: wider when shrinking. [target, source]"""
    step = source / target
    width = max(step, 1.0)
    kernel = functools.partial(_cubic, a=-0.5) if method == "bicubic" else _triangle
    centres = (np.arange(target) + 0.5) * step - 0.5
    matrix = kernel((np.arange(source)[None] - centres[:, None]) / width)
    return matrix / matrix.sum(axis=1, keepdims=True)


def resize_pos_embed(
    table: Array,
    source: tuple[int, int],
    target: tuple[int, int],
    *,
    prefix: int,
    method: PositionResize,
) -> Array:
    """Resizes an absolute position table to another grid.

    See docs/reference.md#pos-embed-resize.

    Args:
      table: [1, prefix + H*W, D]; an array of JAX is computed in float32, and may be traced.
      source: (H, W) of the table's patches.
      target: (H, W) wanted.
      prefix: leading rows that belong to no patch (class token); copied.
      method: "size" is torch's bicubic; "offset_0.1" the same with the scale factors
        (target + 0.1) / source of both axes that DINO and DINOv2 state; "antialias" torch's
        antialiased bicubic; "bilinear", of relative tables, is "size" here.

    Returns:
      [1, prefix + H*W of the target, D] in the dtype of `table`.
    """
    rows = table.shape[1] - prefix
    if source[0] * source[1] != rows:
        raise ValueError(f"{rows} patch positions are not a grid of {source[0]} x {source[1]}")
    if method not in PositionResize.__args__:
        raise ValueError(f"position resize method {method!r}; expected {PositionResize.__args__}")
    if source == target:
        return table
    matrices = [_position_matrix(old, new, method) for old, new in zip(source, target, strict=True)]
    patches = _resize_axes(table[0, prefix:], source, matrices)[None]
    return _concatenate([table[:, :prefix], patches], axis=1)


def _position_matrix(source: int, target: int, method: PositionResize) -> np.ndarray:
    if method == "antialias":
        return antialias_matrix(source, target, method="bicubic")
    scale = (target + 0.1) / source if method == "offset_0.1" else None
    return cubic_matrix(source, target, scale=scale)


def resize_rel_pos_table(
    table: Array,
    source: tuple[int, int],
    target: tuple[int, int],
    *,
    extra: int,
    method: PositionResize = "size",
) -> Array:
    """Resizes a relative position bias table to another grid.

    See docs/reference.md#rel-pos-resize.

    On each axis, source offsets are placed in a geometric progression, dense near zero, so that
    close neighbours keep their bias; the target offsets are read off a tensor-product cubic spline
    through them, or off straight lines between them as timm does. An axis that keeps its length
    keeps its offsets.

    Args:
      table: [(2H - 1)(2W - 1) + extra, A]; an array of JAX as in `resize_pos_embed`.
      source: (H, W) of the table's patches.
      target: (H, W) wanted.
      extra: trailing rows that belong to no pair of patches (3 with a class token); copied.
      method: "antialias", which is timm's way with absolute positions, takes straight lines;
        "bilinear" resizes the table as a picture (transformers); all others take splines.

    Returns:
      [(2H - 1)(2W - 1) + extra, A] for the target's H and W, in the dtype of `table`.
    """
    rows = table.shape[0] - extra
    offsets = (2 * source[0] - 1, 2 * source[1] - 1)
    if offsets[0] * offsets[1] != rows:
        raise ValueError(
            f"{rows} relative positions are not those of a grid of {source[0]} x {source[1]}"
        )
    if source == target:
        return table
    matrices = [_offset_matrix(old, new, method) for old, new in zip(source, target, strict=True)]
    return _concatenate([_resize_axes(table[:rows], offsets, matrices), table[rows:]])


def _offset_matrix(source: int, target: int, method: PositionResize) -> np.ndarray:
    """From a bias per offset of `source` tokens in a row to one of `target`; both 2n - 1."""
    if source == target:
        return np.eye(2 * source - 1)
    if method == "bilinear":
        return bilinear_matrix(2 * source - 1, 2 * target - 1)
    offsets = geometric_offsets(source - 1, target - 1)
    queries = np.arange(-(target - 1), target, dtype=np.float64)
    through = linear_matrix if method == "antialias" else spline_matrix
    return through(offsets, np.clip(queries, offsets[0], offsets[-1]))


def bilinear_matrix(source: int, target: int) -> np.ndarray:
    """Torch's bilinear (align_corners False, no antialias) along one axis. [target, source]"""
    centres = (np.arange(target) + 0.5) * source / target - 0.5
    return linear_matrix(np.arange(source), np.clip(centres, 0, source - 1))


def resize_patch_kernel(kernel: np.ndarray, size: int) -> np.ndarray:
    """Resizes the kernel of a patch embedding (docs/reference.md#ade20k-patch-14).

    The new kernel gives an enlarged patch the token that the old kernel gives the patch: it is the
    old one times the pseudo-inverse of the resizing (FlexiViT, arXiv 2212.08013). Where patches
    shrink, that holds in the sense of least squares.

    Args:
      kernel: [P, P, 3, D].
      size: wanted side of a patch.

    Returns:
      [size, size, 3, D] in the dtype of `kernel`.
    """
    enlarge = antialias_matrix(kernel.shape[0], size, method="bicubic")
    inverse = np.linalg.pinv(enlarge.T)  # [size, P]
    resized = np.einsum("ip,jq,pqcd->ijcd", inverse, inverse, kernel.astype(np.float64))
    return resized.astype(kernel.dtype)


def _resize_axes(rows: Any, grid: tuple[int, int], matrices: Sequence[np.ndarray]) -> Any:
    """Applies a [target, source] matrix to each axis of a row-major grid. [H*W, D]

    NumPy computes in float64, JAX in float32.
    """
    image, equation = rows.reshape(*grid, -1), "ip,jq,pqd->ijd"
    if isinstance(rows, jax.Array):
        factors = [jnp.asarray(matrix, jnp.float32) for matrix in matrices]
        resized = jnp.einsum(
            equation, *factors, image.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
    else:
        resized = np.einsum(equation, *matrices, image.astype(np.float64), optimize=True)
    return resized.reshape(-1, rows.shape[-1]).astype(rows.dtype)


def _concatenate(parts: list[Any], *, axis: int = 0) -> Any:
    join = jnp.concatenate if isinstance(parts[0], jax.Array) else np.concatenate
    return join(parts, axis=axis)


def geometric_offsets(half: int, reach: int) -> np.ndarray:
    """Positions 0, +-p_k: p_1 = 1, p_{k+1} = p_k + q^k, p_half near `reach`. [2*half + 1]

    q comes from a bisection on [1.01, 1.5]; its floor of 1.01 stays when shrinking
    (docs/reference.md#quirk-bias-resize).
    """
    low, high, ratio = 1.01, 1.5, 1.01
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**half) / (1 - ratio) > reach:
            high = ratio
        else:
            low = ratio
    positions = np.cumsum(ratio ** np.arange(half))
    return np.concatenate([-positions[::-1], [0.0], positions])


def linear_matrix(knots: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Straight lines between knots as a matrix; queries lie between the outer ones. [Q, n]"""
    return np.stack([np.interp(queries, knots, unit) for unit in np.eye(len(knots))], axis=1)


def spline_matrix(knots: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Cubic spline interpolation with not-a-knot ends as a matrix. [Q, n] for n >= 4 knots."""
    n = len(knots)
    if n < 4:  # too few points for a cubic: the polynomial through all of them
        return _lagrange(knots, queries)
    h = np.diff(knots)
    # Second derivatives m solve A m = R y: continuity of the slope inside, and equal third
    # derivatives across the second and the last but one knot.
    a, r = np.zeros((n, n)), np.zeros((n, n))
    for i in range(1, n - 1):
        a[i, i - 1 : i + 2] = h[i - 1], 2 * (h[i - 1] + h[i]), h[i]
        r[i, i - 1 : i + 2] = 6 / h[i - 1], -6 / h[i - 1] - 6 / h[i], 6 / h[i]
    a[0, :3] = h[1], -(h[0] + h[1]), h[0]
    a[-1, -3:] = h[-1], -(h[-2] + h[-1]), h[-2]
    curvature = np.linalg.solve(a, r)
    i = np.clip(np.searchsorted(knots, queries, side="right") - 1, 0, n - 2)
    left, right, step = knots[i + 1] - queries, queries - knots[i], h[i]
    eye = np.eye(n)
    return (
        (left / step)[:, None] * eye[i]
        + (right / step)[:, None] * eye[i + 1]
        + ((left**3 / step - left * step) / 6)[:, None] * curvature[i]
        + ((right**3 / step - right * step) / 6)[:, None] * curvature[i + 1]
    )


def _lagrange(knots: np.ndarray, queries: np.ndarray) -> np.ndarray:
    matrix = np.ones((len(queries), len(knots)))
    for j, knot in enumerate(knots):
        for other in np.delete(knots, j):
            matrix[:, j] *= (queries - other) / (knot - other)
    return matrix


def _cubic(x: np.ndarray, *, a: float) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1.0 - np.abs(x))
