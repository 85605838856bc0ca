"""Reads torch files without torch: zip checkpoints, TorchScript archives, legacy `.pth`.

All three hold a pickle that describes tensors as windows on numbered storages, and the storages as
raw bytes; the bytes are mapped, so only what is asked for is touched. The code inside a TorchScript
archive is never looked at (`torch.jit.load` would run its `__setstate__` methods).
"""

from collections.abc import Mapping
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np

from fd_jax.convert.containers import pickles
from fd_jax.convert.containers.pickles import Inert, Name, Storage, StridedTensor
from fd_jax.convert.containers.tensors import DTYPES, Container, MappedFile, Tensor, damaged, walk
from fd_jax.convert.containers.zips import MappedZip
from fd_jax.errors import ConversionError

LEGACY_HEAD = b"\x80\x02\x8a\x0a"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_zip(path: Path, archive: MappedZip) -> Container:
    """Opens a `torch.save` zip file or a TorchScript archive."""
    root = next(name for name in archive.entries if name.endswith("/data.pkl"))[: -len("data.pkl")]
    if archive.entries.get(f"{root}byteorder") and archive.read(f"{root}byteorder") != b"little":
        raise ConversionError(f"{path}: big-endian, which fd_jax does not read")
    tree = pickles.loads(archive.read(f"{root}data.pkl"), str(path))

    def storage_array(storage: Storage) -> np.ndarray:
        name = f"{root}data/{storage.key}"
        start, length = archive.stored(name)
        _check_length(path, storage, length)
        data = archive.file.array(start, (length,), "uint8", name)
        archive.check(name, data.data)
        return data.view(DTYPES[storage.dtype])

    script = f"{root}constants.pkl" in archive.entries
    kind = "TorchScript archive" if script else "torch zip"
    return _container(path, kind, tree, functools.cache(storage_array))


def read_legacy(path: Path) -> Container:
    """Opens a file written by torch before 1.6 (or with its old format asked for)."""
    file = MappedFile(path)
    stream = file.data  # as a stream it gives no more than there is, whatever length is asked for
    if pickles.load(stream, str(path)) != _LEGACY_MAGIC:
        raise ConversionError(f"{path}: a pickle, but not one written by torch.save")
    pickles.load(stream, str(path))  # protocol version
    system = pickles.load(stream, str(path))
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ConversionError(f"{path}: not written by torch on a little-endian machine")
    tree = pickles.load(stream, str(path))
    keys = pickles.load(stream, str(path))
    position = stream.tell()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise damaged(path, "the list of storages is not a list of names")
    itemsizes = {
        leaf.storage.key: DTYPES[leaf.storage.dtype].itemsize
        for _, leaf in _leaves(path, tree)
        if isinstance(leaf, StridedTensor)
    }
    starts: dict[str, tuple[int, int]] = {}
    for key in keys:
        length = int.from_bytes(file.bytes(position, 8, f"storage {key!r}"), "little")
        if key not in itemsizes:
            raise damaged(path, f"storage {key!r} belongs to no tensor")
        starts[key] = position + 8, length * itemsizes[key]
        position += 8 + length * itemsizes[key]

    def storage_array(storage: Storage) -> np.ndarray:
        if storage.key not in starts:
            raise damaged(path, f"storage {storage.key!r} is missing")
        start, length = starts[storage.key]
        _check_length(path, storage, length)
        return file.array(start, (storage.length,), storage.dtype, f"storage {storage.key!r}")

    return _container(path, "torch legacy", tree, storage_array)


def _container(path: Path, kind: str, tree: Any, storage_array) -> Container:
    tensors, entries = {}, {}
    for name, leaf in _leaves(path, tree):
        if isinstance(leaf, StridedTensor):
            load = functools.partial(_load, path, name, leaf, storage_array)
            tensors[name] = Tensor(name, leaf.shape, leaf.storage.dtype, load)
        else:
            entries[name] = _describe(leaf)
    return Container(path, kind, (path,), tensors, entries)


def _leaves(path: Path, tree: Any):
    script = isinstance(tree, Inert)
    try:
        yield from walk(_plain(tree), join="." if script else "/")
    except ValueError as error:
        raise damaged(path, str(error)) from error


class _ScriptModule(Mapping):
    """Attributes of a TorchScript object as a mapping, submodules included."""

    def __init__(self, attributes: dict):
        self.attributes = attributes

    def __getitem__(self, key):
        return _plain(self.attributes[key])

    def __iter__(self):
        return iter(self.attributes)

    def __len__(self):
        return len(self.attributes)


def _plain(node: Any) -> Any:
    script = isinstance(node, Inert) and node.name.startswith(pickles.SCRIPT)
    return _ScriptModule(node.state) if script and isinstance(node.state, dict) else node


def _load(path: Path, name: str, tensor: StridedTensor, storage_array) -> np.ndarray:
    window = 0
    if math.prod(tensor.shape):
        last = (
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)
        )
        window = tensor.offset + 1 + sum(last)
    if window > tensor.storage.length:
        raise damaged(
            path,
            f"tensor {name!r} of shape {list(tensor.shape)} reaches item {window} of a storage "
            f"of {tensor.storage.length}",
        )
    flat = storage_array(tensor.storage)
    strides = [stride * flat.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(
        flat[tensor.offset :], tensor.shape, strides, writeable=False
    )


def _check_length(path: Path, storage: Storage, found: int) -> None:
    expected = storage.length * DTYPES[storage.dtype].itemsize
    if found != expected:
        raise damaged(path, f"storage {storage.key!r} has {found} bytes, expected {expected}")


def _describe(leaf: Any) -> str:
    if isinstance(leaf, Inert | Name):
        return leaf.name
    if isinstance(leaf, int) and leaf.bit_length() > 64:
        return "int of many digits"
    if isinstance(leaf, bool | int | float | str) or leaf is None:
        return f"{type(leaf).__name__} {leaf!r:.60}"
    if isinstance(leaf, list | tuple | Mapping):
        return f"{type(leaf).__name__} of {len(leaf)}"
    return type(leaf).__name__
