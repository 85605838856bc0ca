"""(sum, count) arithmetic: metrics add up over steps, devices and hosts and are divided once."""

import collections
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def weighted(values: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum, count) of per-example values [B] under the weights [B]."""
    return jnp.sum(values * weight), jnp.sum(weight)


class Mean:
    """Adds up (sum, count) pairs by name and divides once.

    Args:
      totals: of another one, to go on from.
    """

    def __init__(self, totals: Mapping[str, list[float]] | None = None):
        self._totals = collections.defaultdict(lambda: [0.0, 0.0], totals or {})

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Adds the metrics of one step; reads them from the device."""
        for name, (total, count) in jax.device_get(dict(metrics)).items():
            self._totals[name][0] += float(total)
            self._totals[name][1] += float(count)

    def totals(self) -> dict[str, list[float]]:
        """[sum, count] by name, JSON-able."""
        return dict(self._totals)

    def result(self) -> dict[str, float]:
        """The weighted mean of everything added; names without any weight are left out."""
        return {name: total / count for name, (total, count) in self._totals.items() if count}
