"""Reads npz archives, never with pickled objects; bfloat16 as numpy stores it (void of 2 bytes)."""

from pathlib import Path
from tokenize import TokenError

import numpy as np

from fd_jax.convert.containers.tensors import DTYPES, Container, Tensor, check_shape, damaged
from fd_jax.convert.containers.zips import DAMAGE, MappedZip
from fd_jax.errors import ConversionError


def read(path: Path, archive: MappedZip) -> Container:
    """Opens an npz archive; arrays that are not compressed are views of the mapped file."""
    tensors = {}
    for entry in archive.entries:
        if not entry.endswith(".npy"):
            raise damaged(path, f"the zip entry {entry!r} is not an array")
        name = entry[: -len(".npy")]
        tensors[name] = _tensor(path, archive, entry, name)
    return Container(path, "npz", (path,), tensors)


def _tensor(path: Path, archive: MappedZip, entry: str, name: str) -> Tensor:
    shape, fortran, dtype, header = _header(path, archive, entry, name)
    size = int(np.prod(shape, dtype=object)) * DTYPES[dtype].itemsize
    info = archive.entries[entry]
    if header + size != info.file_size:
        raise damaged(
            path,
            f"array {name!r} of shape {list(shape)} and dtype {dtype} needs {size} bytes, "
            f"its entry has {info.file_size - header}",
        )
    order = "F" if fortran else "C"

    def load() -> np.ndarray:
        if info.compress_type == 0:
            start, length = archive.stored(entry)
            archive.check(entry, archive.file.array(start, (length,), "uint8", entry).data)
            flat = archive.file.array(start + header, (size,), "uint8", f"array {name!r}")
        else:
            flat = np.frombuffer(_inflate(path, archive, entry, info.file_size), np.uint8)[header:]
        return flat.view(DTYPES[dtype]).reshape(shape, order=order)

    return Tensor(name, shape, dtype, load)


def _inflate(path: Path, archive: MappedZip, entry: str, size: int) -> bytes:
    try:
        with archive.open(entry) as stream:
            data = stream.read(size + 1)
    except DAMAGE as error:
        raise damaged(path, f"the zip entry {entry!r} cannot be unpacked ({error})") from error
    if len(data) != size:
        raise damaged(path, f"the zip entry {entry!r} has {len(data)} bytes, expected {size}")
    return data


def _header(path: Path, archive: MappedZip, entry: str, name: str):
    try:
        with archive.open(entry) as stream:
            version = np.lib.format.read_magic(stream)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read(stream)
            header = stream.tell()
    except (*DAMAGE, TypeError, SyntaxError, TokenError, RecursionError) as error:
        raise damaged(path, f"array {name!r} has no valid header ({error!s:.80})") from error
    kind = "bfloat16" if dtype.str == "|V2" else dtype.name
    if kind not in DTYPES or not (dtype.isnative or dtype.byteorder == "|"):
        raise ConversionError(f"{path}: array {name!r} has the dtype {dtype}, which is not read")
    return check_shape(path, name, shape), fortran, kind, header
