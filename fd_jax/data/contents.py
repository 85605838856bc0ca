"""What a split consists of, by which a run that resumes notices that its data have changed."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import hashlib
import os
from typing import Any

from fd_jax.errors import DataError, first_few, printable

LISTED = 10_000  # files of a split up to which their names are kept
_THREADS = 16  # that ask for sizes, which a file server answers one by one

File = tuple[str, str]  # name within the split, and path


def of_files(files: Iterable[File], examples: int) -> dict[str, Any]:
    """Number, digest and, if there are few, names and sizes of the files of a split.

    The contents of the files are not read. In a bucket sizes are not asked for.

    Args:
      files: names and paths.
      examples: number of examples in the split.

    Returns:
      JSON-serializable: "examples", "files", "digest", and "sizes" by name or None.

    Raises:
      DataError: the size of a file cannot be read.
    """
    ordered = sorted(files)
    sizes = _sizes([path for _, path in ordered])
    digest = hashlib.sha256()
    for (name, _), size in zip(ordered, sizes, strict=True):
        digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    few = len(ordered) <= LISTED
    names = [name for name, _ in ordered] if few else []
    return {
        "examples": examples,
        "files": len(ordered),
        "digest": digest.hexdigest(),
        "sizes": dict(zip(names, sizes, strict=True)) if few else None,
    }


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two results of `of_files`, one line each; [] if nothing does."""
    if old.get("digest") == new["digest"] and old.get("examples") == new["examples"]:
        return []
    lines = [
        f"{name}: {old.get(name)} -> {new[name]}"
        for name in ("examples", "files")
        if old.get(name) != new[name]
    ]
    before, after = old.get("sizes"), new["sizes"]
    if not isinstance(before, dict) or after is None:
        return lines or ["the same number of files, with other names or sizes"]
    same = before.keys() & after.keys()
    kinds = {
        "added": sorted(after.keys() - before.keys()),
        "removed": sorted(before.keys() - after.keys()),
        "of another size": sorted(name for name in same if before[name] != after[name]),
    }
    return lines + [
        f"{len(names)} {kind}: {first_few(names)}" for kind, names in kinds.items() if names
    ]


def _sizes(paths: Sequence[str]) -> list[int | None]:
    parts = [paths[start::_THREADS] for start in range(_THREADS)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(_sizes_of_some, parts))
    return [found[index % _THREADS][index // _THREADS] for index in range(len(paths))]


def _sizes_of_some(paths: Sequence[str]) -> list[int | None]:
    return [None if "://" in path else _size(path) for path in paths]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        # A digest of what is there today would refuse the same data tomorrow.
        raise DataError(
            f"{printable(path)}: {error.strerror}, so it cannot be compared with the data of "
            "another start; make it readable, or remove it"
        ) from error
