"""Normalisations of a teacher's tokens before a student learns them: one table.

docs/several_teachers.md#normalisations says which paper uses which. Three kinds need nothing but
the token; `standardize` measures while the run goes; the others are a fixed map, fitted by
`python -m fd_jax.target_stats`.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from fd_jax import losses
from fd_jax.normalization import hadamard
from fd_jax.normalization.spectrum import Spectrum

Kind = Literal["whiten", "l2", "none", "standardize", "phi_s", "pca", "zca", "hadamard"]
Constants = Mapping[str, jax.Array]  # what a normalisation knows of the tokens of one group

EPS = 1e-5  # added to the variance of a channel by `standardize`
# Directions whose variance is below this share of the largest are rounding noise: the norm before
# a ViT's output leaves at least one. Dividing by their deviation would make noise the target.
SMALLEST_SHARE = 1e-6


@dataclasses.dataclass(frozen=True)
class Normalization:
    """One way to normalise tokens.

    Attributes:
      apply: (tokens [..., D], constants) -> [..., D] float32.
      constants: "none"; "running" if a run measures mean and variance itself; "fitted" if they come
        from a file of statistics.
      fit: (spectrum of the tokens) -> the matrix [D, D] by which the difference of a token (a row)
        from the mean is multiplied; None unless fitted.
      every_direction: whether `fit` divides by the deviation along each direction, so that there
        have to be more tokens than channels.
    """

    apply: Callable[[jax.Array, Constants], jax.Array]
    constants: Literal["none", "running", "fitted"] = "none"
    fit: Callable[[Spectrum], np.ndarray] | None = None
    every_direction: bool = False


def _standardize(tokens: jax.Array, constants: Constants) -> jax.Array:
    """Subtracts each channel's mean and divides by its deviation."""
    centred = tokens.astype(jnp.float32) - constants["mean"]
    return centred * jax.lax.rsqrt(constants["variance"] + EPS)


def _affine(tokens: jax.Array, constants: Constants) -> jax.Array:
    """Subtracts the mean and multiplies by a matrix."""
    rows = tokens.reshape(-1, tokens.shape[-1]).astype(jnp.float32) - constants["mean"]
    return jnp.matmul(rows, constants["matrix"], precision="highest").reshape(tokens.shape)


def _per_direction(spectrum: Spectrum) -> np.ndarray:
    """Coordinates along the principal directions, each with variance 1. [D, D]"""
    kept = spectrum.values > SMALLEST_SHARE * spectrum.values[0]
    gain = np.where(kept, 1 / np.sqrt(np.where(kept, spectrum.values, 1.0)), 0.0)
    return spectrum.vectors * gain


def _rotation(width: int) -> np.ndarray:
    found = hadamard.matrix(width)
    if found is None:
        raise ValueError(
            f"no Hadamard matrix of {width} rows is known here, so that 'phi_s' and 'hadamard' "
            "cannot spread directions over the channels; use 'pca', 'zca' or 'standardize'"
        )
    return found / np.sqrt(width)


def _phi_s(spectrum: Spectrum) -> np.ndarray:
    spread = spectrum.vectors @ _rotation(len(spectrum.values)).T
    return spread / np.sqrt(spectrum.values.mean())


def _zca(spectrum: Spectrum) -> np.ndarray:
    return _per_direction(spectrum) @ spectrum.vectors.T


def _hadamard(spectrum: Spectrum) -> np.ndarray:
    return _per_direction(spectrum) @ _rotation(len(spectrum.values)).T


def _fitted(fit: Callable[[Spectrum], np.ndarray], *, every_direction: bool) -> Normalization:
    return Normalization(_affine, "fitted", fit, every_direction)


KINDS: dict[str, Normalization] = {
    "whiten": Normalization(lambda tokens, _: losses.whiten(tokens)),
    "l2": Normalization(lambda tokens, _: losses.l2_normalize(tokens)),
    "none": Normalization(lambda tokens, _: tokens.astype(jnp.float32)),
    "standardize": Normalization(_standardize, "running"),
    "phi_s": _fitted(_phi_s, every_direction=False),
    "pca": _fitted(_per_direction, every_direction=True),
    "zca": _fitted(_zca, every_direction=True),
    "hadamard": _fitted(_hadamard, every_direction=True),
}
assert tuple(KINDS) == get_args(Kind)


def fitted_constants(kind: str, spectrum: Spectrum) -> dict[str, np.ndarray]:
    """The constants of a fitted kind, float32: "mean" [D] and "matrix" [D, D].

    Raises:
      ValueError: the tokens are too few or do not differ, or there is no such matrix; the message
        is meant to follow the name of what was measured.
    """
    normalization, width = KINDS[kind], len(spectrum.mean)
    assert normalization.fit is not None
    if normalization.every_direction and spectrum.tokens <= width:
        raise ValueError(
            f"{spectrum.tokens} tokens have no variance along some of {width} directions, and "
            f"{kind!r} divides by it; measure more pictures, or use 'phi_s'"
        )
    if not spectrum.values[0] > 0:
        raise ValueError(f"{spectrum.tokens} tokens are all the same; measure other pictures")
    constants = {"mean": spectrum.mean, "matrix": normalization.fit(spectrum)}
    return {name: value.astype(np.float32) for name, value in constants.items()}


def fitted_shapes(width: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of `fitted_constants`."""
    shapes = {"mean": (width,), "matrix": (width, width)}
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def first_constants(width: int) -> dict[str, jax.Array]:
    """The constants of a running kind before any token is measured, which change nothing."""
    return {"mean": jnp.zeros(width), "variance": jnp.ones(width)}


def measured_constants(
    before: Constants, tokens: jax.Array, weight: jax.Array, steps: jax.Array
) -> dict[str, jax.Array]:
    """Mean and variance of each channel over all steps, which count alike.

    Args:
      before: those of the steps before.
      tokens: tokens of this step, of the whole global batch. [B, T, D]
      weight: 1 for an image, 0 for padding. [B]
      steps: number of steps before, int32 scalar.
    """
    share = (weight / jnp.sum(weight))[:, None]
    wide = tokens.astype(jnp.float32)
    mean = jnp.sum(share * jnp.mean(wide, axis=1), axis=0)
    variance = jnp.sum(share * jnp.mean(jnp.square(wide - mean), axis=1), axis=0)
    new = 1 / (steps + 1.0)
    apart = mean - before["mean"]
    between = new * (1 - new) * jnp.square(apart)
    return {
        "mean": before["mean"] + new * apart,
        "variance": (1 - new) * before["variance"] + new * variance + between,
    }
