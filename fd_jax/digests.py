"""Digests of arrays, by which damage to stored weights is noticed, and arrays that hold NaNs.

The digest of an array is the sum of its words, modulo 2^32: of the bits of its elements, taken as
whole numbers. A flipped bit changes it, and so do zeros in the place of a page. It does not depend
on how an array is split over devices, hosts or files, and takes about as long as reading memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any
import zlib

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

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
    named = by_path(tree)
    sums = _over_processes([_of_own_part(leaf) for leaf in named.values()])
    return dict(zip(named, map(int, sums), strict=True))


def not_finite(tree: PyTree) -> list[str]:
    """The "a/b" paths of arrays that hold NaNs or infinities; all processes call this.

    Args:
      tree: numpy arrays, or jax arrays on any number of devices and processes.
    """
    named = by_path(tree)
    wrong = _over_processes([not _is_finite(leaf) for leaf in named.values()])
    return [name for name, count in zip(named, wrong, strict=True) if count]


def _over_processes(values: Sequence[int]) -> np.ndarray:
    """Sums of a list of numbers over all processes, modulo 2^32."""
    own = np.array(values, np.uint32)
    if jax.process_count() == 1:
        return own
    return multihost_utils.process_allgather(own).sum(axis=0, dtype=np.uint32)


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


def _of_own_part(leaf: Any) -> int:
    """The sum over the parts that this process, and no other, contributes."""
    if not isinstance(leaf, jax.Array):
        return of_array(np.asarray(leaf)) if jax.process_index() == 0 else 0
    return sum(of_array(part) for part in _own_parts(leaf)) % MODULUS


def _is_finite(leaf: Any) -> bool:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return True
    parts = _own_parts(leaf) if isinstance(leaf, jax.Array) else [np.asarray(leaf)]
    with np.errstate(invalid="ignore"):  # inf - inf
        # A sum is not finite if any of its terms is not, and takes no array of its own.
        return all(np.isfinite(np.sum(part, dtype=np.float64)) for part in parts)


def _own_parts(array: jax.Array) -> list[np.ndarray]:
    return [np.asarray(part.data) for part in array.addressable_shards if part.replica_id == 0]


def damaged(found: Mapping[str, int], expected: Mapping[str, int]) -> list[str]:
    """The names of arrays whose digests differ; those that are missing on one side do not count."""
    return [name for name in sorted(found.keys() & expected) if found[name] != expected[name]]
