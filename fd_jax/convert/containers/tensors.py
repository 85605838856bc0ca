"""What every reader of weight files returns: named tensors that load when asked."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import hashlib
import math
import mmap
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from fd_jax.errors import ConversionError

# Names as torch, numpy and `model.json` spell them.
DTYPES = {
    name: np.dtype(name)
    for name in (
        "float64 float32 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex64"
    ).split()
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}

_HASH_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: known by name, shape and dtype, read only by `load()`.

    Attributes:
      name: full name; levels of nested dictionaries are joined by "/".
      shape: as stored.
      dtype: a key of `DTYPES`.
      load: returns the array; where the file allows it, a read-only view of the mapped file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes the tensor takes in memory."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class Container:
    """An opened file (or folder) of weights.

    Attributes:
      path: what was opened.
      kind: the container in words, such as "torch zip" or "safetensors".
      files: the files that hold the weights; their bytes are what `sha256` covers.
      tensors: all tensors by name, in file order.
      entries: everything else in the file: name -> type or short value.
      config: the `config.json` of a Hugging Face folder, otherwise None.
      beside: the other files of that folder that say something of the network, by their names.
      metadata: the texts in the header of a safetensors file.
    """

    path: Path
    kind: str
    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]
    entries: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, object] | None = None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    beside: Mapping[str, Mapping[str, object]] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self.files)

    def sha256(self, read: Callable[[int], object] = lambda count: None) -> str:
        """Checksum of the weight file, or of the `<sum>  <name>` lines of its shards.

        `read` is called after every piece with the number of its bytes.
        """
        sums = [file_sha256(file, read) for file in self.files]
        if len(sums) == 1:
            return sums[0]
        lines = [f"{digest}  {file.name}\n" for digest, file in zip(sums, self.files, strict=True)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_sha256(path: Path, read: Callable[[int], object] = lambda count: None) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces; `read` is called with the bytes of each."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(_HASH_CHUNK):
            digest.update(chunk)
            read(len(chunk))
    return digest.hexdigest()


class MappedFile:
    """A file mapped read-only; every request is checked against its size first."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as stream:
                self.size = os.fstat(stream.fileno()).st_size
                if not self.size:
                    raise damaged(path, "the file is empty")
                self.data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ConversionError(f"{path}: cannot be read ({error.strerror})") from error

    def bytes(self, offset: int, count: int, what: str) -> bytes:
        """Copies `count` bytes out of the file."""
        self._check(offset, count, what)
        return self.data[offset : offset + count]

    def array(self, offset: int, shape: tuple[int, ...], dtype: str, what: str) -> np.ndarray:
        """A read-only array over the mapped bytes, not copied."""
        kind = DTYPES[dtype]
        self._check(offset, math.prod(shape) * kind.itemsize, what)
        flat = np.frombuffer(self.data, kind, math.prod(shape), offset)
        return flat.reshape(shape)

    def _check(self, offset: int, count: int, what: str) -> None:
        if offset < 0 or count < 0 or offset + count > self.size:
            raise damaged(
                self.path,
                f"{what} should take bytes {offset} to {offset + count}, "
                f"but the file ends at {self.size}",
            )


def damaged(path: Path, detail: str) -> ConversionError:
    """The error for a file whose structure cannot be read."""
    return ConversionError(f"{path}: damaged or truncated file: {detail}; fetch it again")


def check_shape(path: Path, name: str, shape: object) -> tuple[int, ...]:
    """A shape read from a file, as a tuple of sizes; refuses anything else."""
    sizes = tuple(shape) if isinstance(shape, list | tuple) else None
    if sizes is None or not all(type(size) is int and 0 <= size < 1 << 48 for size in sizes):
        raise damaged(path, f"tensor {name!r} has the shape {shape!r:.60}")
    return sizes


def walk(tree: object, join: str = "/", limit: int = 200_000) -> Iterator[tuple[str, object]]:
    """Leaves of nested mappings as (joined name, value).

    Depth and number of leaves are bounded, since a small file can hold references that expand to
    astronomically many paths.

    Raises:
      ValueError: if a bound is passed or two paths have the same joined name.
    """
    seen: set[str] = set()
    visited = 0
    stack: list[tuple[str, int, object]] = [("", 0, tree)]
    while stack:
        name, depth, node = stack.pop()
        visited += 1
        if visited > limit or depth > 64:
            raise ValueError("the dictionaries in it are nested without bound")
        if isinstance(node, Mapping) and (node or not depth):
            for key in list(node)[::-1]:
                if not isinstance(key, str | int):
                    raise ValueError(f"a dictionary key of type {type(key).__name__}")
                stack.append((f"{name}{join}{key}" if depth else str(key), depth + 1, node[key]))
            continue
        if name in seen:
            raise ValueError(f"two entries are named {name!r:.120}")
        seen.add(name)
        yield name, node
