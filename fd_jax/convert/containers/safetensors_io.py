"""Reads and writes safetensors without any package: eight bytes of length, a JSON header, data.

Format: https://github.com/huggingface/safetensors#format
"""

from collections.abc import Mapping
import json
from pathlib import Path
import struct

import numpy as np

from fd_jax.convert.containers.tensors import (
    DTYPES,
    Container,
    MappedFile,
    Tensor,
    check_shape,
    damaged,
)
from fd_jax.errors import ConversionError

_CODES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_NAMES = {name: code for code, name in _CODES.items()}
_MAX_HEADER = 100_000_000  # the limit of the reference implementation


def looks_like(head: bytes) -> bool:
    """Whether the first nine bytes are those of a safetensors file."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER


def read(path: Path) -> Container:
    """Opens a safetensors file; tensors are views of the mapped file."""
    file = MappedFile(path)
    (length,) = struct.unpack("<Q", file.bytes(0, 8, "the header length"))
    if length > _MAX_HEADER:
        raise damaged(path, f"the header claims {length} bytes")
    header = _parse_header(path, file.bytes(8, length, "the header"))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise damaged(path, "__metadata__ is not a dictionary")
    start = 8 + length
    tensors, spans = {}, []
    for name, record in header.items():
        tensors[name], span = _tensor(file, start, name, record)
        spans.append(span)
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise damaged(path, f"the data has a gap or an overlap at byte {first}")
        end = last
    if start + end != file.size:
        raise damaged(path, f"the header describes {start + end} bytes, the file has {file.size}")
    entries = {f"__metadata__/{key}": str(value)[:80] for key, value in metadata.items()}
    texts = {str(key): str(value) for key, value in metadata.items()}
    return Container(path, "safetensors", (path,), tensors, entries, metadata=texts)


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes arrays in the given order; keeps their dtypes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            stream.write(np.ascontiguousarray(array).tobytes())


def _parse_header(path: Path, text: bytes) -> dict[str, object]:
    def unique(pairs):
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            raise ValueError("a name stands twice in the header")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"the header is not valid JSON ({error!s:.80})") from error
    if not isinstance(header, dict):
        raise damaged(path, "the header is not a dictionary")
    return header


def _tensor(file: MappedFile, start: int, name: str, record: object):
    fields = ("dtype", "shape", "data_offsets")
    if not isinstance(record, dict) or set(record) != set(fields):
        raise damaged(file.path, f"the header record of {name!r} should have {', '.join(fields)}")
    code = record["dtype"]
    if not isinstance(code, str) or code not in _CODES:
        raise ConversionError(
            f"{file.path}: tensor {name!r} has the dtype {code!r:.40}; "
            f"expected one of {', '.join(_CODES)}"
        )
    dtype = _CODES[code]
    shape = check_shape(file.path, name, record["shape"])
    span = check_shape(file.path, name, record["data_offsets"])
    size = int(np.prod(shape, dtype=object)) * DTYPES[dtype].itemsize
    if len(span) != 2 or span[1] - span[0] != size or start + span[1] > file.size:
        raise damaged(
            file.path,
            f"tensor {name!r} of shape {list(shape)} and dtype {dtype} needs {size} bytes, "
            f"its header record names {list(span)}",
        )

    def load(offset=start + span[0]):
        return file.array(offset, shape, dtype, f"tensor {name!r}")

    return Tensor(name, shape, dtype, load), span
