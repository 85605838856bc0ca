"""Metrics as (sum, count) pairs, added up over steps, devices and hosts and divided once."""

import collections
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def weighted(values: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns weighted sum and sum of weights of per-example values. [B], [B] -> scalars"""
    return jnp.sum(values * weight), jnp.sum(weight)


class Mean:
    """Adds up (sum, count) pairs by name and divides once.

    Args:
      totals: result of `totals` of another instance to continue from.
    """

    def __init__(self, totals: Mapping[str, list[float]] | None = None):
        copies = {name: list(pair) for name, pair in (totals or {}).items()}
        self._totals = collections.defaultdict(lambda: [0.0, 0.0], copies)

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Reads the metrics of one step from the device and adds them."""
        for name, (total, count) in jax.device_get(dict(metrics)).items():
            self._totals[name][0] += float(total)
            self._totals[name][1] += float(count)

    def totals(self) -> dict[str, list[float]]:
        """Returns [sum, count] by name, JSON-serializable.

        They are copies: a checkpoint writes them in the background, while `add` continues.
        """
        return {name: list(pair) for name, pair in self._totals.items()}

    def result(self) -> dict[str, float]:
        """Returns the weighted means by name; names whose count is 0 are left out."""
        return {name: total / count for name, (total, count) in self._totals.items() if count}
