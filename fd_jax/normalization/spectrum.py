"""Mean and principal directions of a teacher's tokens, summed batch by batch."""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """What is known of the distribution of some tokens; all arrays are float64.

    Attributes:
      tokens: number of tokens that were measured.
      mean: their mean. [D]
      values: variances along the principal directions, the largest first. [D]
      vectors: these directions, one in each column, of unit length. The entry of largest size in
        each is positive, since a direction has no sign. [D, D]
    """

    tokens: int
    mean: np.ndarray
    values: np.ndarray
    vectors: np.ndarray

    @classmethod
    def of(cls, tokens: int, mean: np.ndarray, covariance: np.ndarray) -> Self:
        """The spectrum of a covariance matrix. [D], [D, D]"""
        values, vectors = np.linalg.eigh(covariance)
        values, vectors = values[::-1], vectors[:, ::-1]
        largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(len(values))]
        return cls(tokens, mean, np.maximum(values, 0.0), vectors * np.sign(largest))

    @property
    def covariance(self) -> np.ndarray:
        """The covariance matrix. [D, D]"""
        return (self.vectors * self.values) @ self.vectors.T


class Moments:
    """Sums over all tokens so far, from which their mean and covariance follow.

    A batch is summed in float32 on the devices, and batches are added up in float64 on the host.
    Sums are taken about a point near the mean: squares of tokens that share a large part would lose
    the part that differs. The covariance divides by the number of tokens.

    Args:
      near: the point. [D]
    """

    def __init__(self, near: np.ndarray):
        self._near = np.asarray(near, np.float64)
        self._count, self._total, self._products = 0.0, np.zeros(()), np.zeros(())

    def add(self, sums: "Sums") -> None:
        """Adds the result of `sums_about(near)` of one batch."""
        count, total, products = (np.asarray(value, np.float64) for value in sums)
        self._count += float(count)
        self._total = self._total + total
        self._products = self._products + products

    @property
    def tokens(self) -> int:
        """Number of tokens so far."""
        return round(self._count)

    def spectrum(self) -> Spectrum:
        """The spectrum of all tokens that were added; there has to be one."""
        mean = self._total / self._count
        covariance = self._products / self._count - np.outer(mean, mean)
        return Spectrum.of(self.tokens, self._near + mean, covariance)


class Sums(NamedTuple):
    """Sums over the tokens of one batch, float32: their number, [D] and [D, D]."""

    count: jax.Array
    total: jax.Array
    products: jax.Array

    @property
    def mean(self) -> jax.Array:
        """The mean, as a difference from the point; 0 without tokens. [D]"""
        return self.total / jnp.maximum(self.count, 1.0)


def sums_about(near: jax.Array, tokens: jax.Array, weight: jax.Array) -> Sums:
    """Number of tokens, their sum and that of their outer products, as differences from a point.

    Args:
      near: the point. [D]
      tokens: [B, T, D].
      weight: 1 for an image, 0 for padding. [B]
    """
    apart = (tokens.astype(jnp.float32) - near) * weight[:, None, None]
    rows = apart.reshape(-1, tokens.shape[-1])
    products = jnp.matmul(rows.T, rows, precision="highest")
    return Sums(jnp.sum(weight) * tokens.shape[1], jnp.sum(rows, axis=0), products)
