"""Work on a batch in equal parts, one after another, whose activations need less memory."""

from collections.abc import Callable
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")  # an array, or a tree of arrays


def in_parts(function: Callable[..., T], parts: int, *arrays: Any) -> T:
    """Applies a function to equal parts of a batch, one after another.

    Part j has the rows j, j + parts, ..., so that no row moves to another device. A batch that the
    number does not divide, as some in reports, has the largest number of parts that does.

    Args:
      function: (*arrays) -> arrays whose rows depend on the same rows of the arguments only.
      parts: number of parts.
      *arrays: [B, ...] each, or None.
    """
    rows = len(arrays[0])
    parts = math.gcd(parts, rows)
    if parts == 1:
        return function(*arrays)

    def divided(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(-1, parts, *array.shape[1:]), 1, 0)

    def joined(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array, 0, 1).reshape(rows, *array.shape[2:])

    result = jax.lax.map(lambda part: function(*part), jax.tree.map(divided, arrays))
    return jax.tree.map(joined, result)
