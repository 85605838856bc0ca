"""Digests of arrays, by which damage to stored weights is noticed, and arrays that hold NaNs.

The digest of an array is the sum of its words, modulo 2^32: of the bits of its elements, taken as
whole numbers. A flipped bit changes it, and so do zeros in the place of a page. It does not depend
on how an array is split over devices, hosts or files, and takes about as long as reading memory.
"""

from collections.abc import Callable, Mapping
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from fd_jax import sharding
from fd_jax.typing import PyTree

MODULUS = 2**32
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}  # by bytes of an element


def of_array(array: np.ndarray) -> int:
    """The digest of a numpy array of any shape and dtype."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return int(flat.view(_WORDS[flat.dtype.itemsize]).sum(dtype=np.uint32))


def of_tree(tree: PyTree) -> dict[str, int]:
    """The digests of all arrays of a tree by their "a/b" paths; all processes call this.

    Args:
      tree: numpy arrays, or jax arrays on any number of devices and processes.
    """
    return _measured(tree, _of_parts)[0]


def not_finite(tree: PyTree) -> list[str]:
    """The "a/b" paths of arrays that hold NaNs or infinities. Called as `of_tree`."""
    return _named(_measured(tree, _is_not_finite)[0])


def examine(tree: PyTree) -> tuple[dict[str, int], list[str]]:
    """What `of_tree` and `not_finite` return, with each array copied from its device once."""
    found, wrong = _measured(tree, _of_parts, _is_not_finite)
    return found, _named(wrong)


def of_own(tree: PyTree) -> dict[str, int]:
    """The digests of a tree of numpy arrays that this process has, whatever the others do."""
    return {name: of_array(np.asarray(leaf)) for name, leaf in by_path(tree).items()}


def of_text(text: str) -> int:
    """The digest of a text, which also shows characters that have changed places (CRC-32)."""
    return zlib.crc32(text.encode())


def by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their "a/b" paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def _measured(tree: PyTree, *measures: Callable[[list[np.ndarray]], int]) -> list[dict[str, int]]:
    """For each measure the sums over all processes, modulo 2^32, by the path of the array."""
    named = by_path(tree)
    own = [[measure(parts) for measure in measures] for parts in map(_own_parts, named.values())]
    sums = sharding.gathered(np.array(own, np.uint32).reshape(-1, len(measures)))
    sums = sums.sum(axis=0, dtype=np.uint32)
    return [dict(zip(named, map(int, column), strict=True)) for column in sums.T]


def _named(counts: Mapping[str, int]) -> list[str]:
    return [name for name, count in counts.items() if count]


def _own_parts(leaf: Any) -> list[np.ndarray]:
    """The parts of an array that this process, and no other, contributes."""
    if not isinstance(leaf, jax.Array):
        return [np.asarray(leaf)] if jax.process_index() == 0 else []
    return [np.asarray(part.data) for part in leaf.addressable_shards if part.replica_id == 0]


def _of_parts(parts: list[np.ndarray]) -> int:
    return sum(map(of_array, parts)) % MODULUS


def _is_not_finite(parts: list[np.ndarray]) -> int:
    floats = [part for part in parts if jnp.issubdtype(part.dtype, jnp.inexact)]
    with np.errstate(invalid="ignore"):  # inf - inf
        # A sum is not finite if any of its terms is not, and takes no array of its own.
        return not all(np.isfinite(np.sum(part, dtype=np.float64)) for part in floats)


def damaged(found: Mapping[str, int], expected: Mapping[str, int]) -> list[str]:
    """The names of arrays whose digests differ; those that are missing on one side do not count."""
    return [name for name in sorted(found.keys() & expected) if found[name] != expected[name]]
