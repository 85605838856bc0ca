"""Reads the initialisers of an ONNX graph, with the `onnx` package.

An exporter that folds a transposed weight leaves it without its name ("onnx::MatMul_1966"); what
it is follows from the node that uses it, so such an initialiser is named after the first one.
"""

import functools
from pathlib import Path

import numpy as np

from fd_jax.convert.containers.tensors import DTYPES, Container, Tensor, check_shape, damaged
from fd_jax.errors import ConversionError

_ANONYMOUS = "onnx::"


def read(path: Path) -> Container:
    """Opens an ONNX file; anonymous initialisers get the dotted name of the node that uses them."""
    try:
        import onnx
    except ImportError as error:
        raise ConversionError(
            f"{path}: reading ONNX needs the package onnx; pip install onnx"
        ) from error
    from google.protobuf.message import DecodeError

    if not path.stat().st_size:
        raise damaged(path, "the file is empty")
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except (DecodeError, UnicodeDecodeError, ValueError) as error:
        raise damaged(path, f"not an ONNX graph ({error!s:.80})") from error
    users = _first_users(path, graph)
    tensors = {}
    for initializer in graph.initializer:
        name = _text(path, initializer.name)
        if name.startswith(_ANONYMOUS):
            name = users.get(name, name)
        if name in tensors:
            raise damaged(path, f"two initialisers are named {name!r:.120}")
        tensors[name] = _tensor(path, name, initializer)
    if not tensors:
        raise damaged(path, "the graph has no initialisers")
    entries = {f"input {_text(path, value.name)}": "graph input" for value in graph.input}
    return Container(path, "ONNX", (path,), tensors, entries)


def _first_users(path: Path, graph) -> dict[str, str]:
    users: dict[str, str] = {}
    for node in graph.node:
        name = _text(path, node.name).strip("/").replace("/", ".")
        for argument in node.input:
            users.setdefault(argument, name)
    return users


def _text(path: Path, name: str | bytes) -> str:
    # protobuf hands out text that is not UTF-8 as bytes
    if isinstance(name, bytes):
        raise damaged(path, "a name in the graph is not text")
    return name


def _tensor(path: Path, name: str, initializer) -> Tensor:
    import onnx

    known = {
        onnx.TensorProto.FLOAT: "float32",
        onnx.TensorProto.FLOAT16: "float16",
        onnx.TensorProto.BFLOAT16: "bfloat16",
        onnx.TensorProto.DOUBLE: "float64",
        onnx.TensorProto.INT64: "int64",
        onnx.TensorProto.INT32: "int32",
        onnx.TensorProto.BOOL: "bool",
    }
    if initializer.data_type not in known:
        raise ConversionError(
            f"{path}: initialiser {name!r} has the ONNX data type {initializer.data_type}, "
            f"expected one of {sorted(known.values())}"
        )
    if initializer.data_location == onnx.TensorProto.EXTERNAL:
        raise ConversionError(
            f"{path}: initialiser {name!r} is stored in another file; save the model with its "
            "weights inside"
        )
    dtype = known[initializer.data_type]
    shape = check_shape(path, name, list(initializer.dims))
    load = functools.partial(_load, path, name, shape, dtype, initializer)
    return Tensor(name, shape, dtype, load)


def _load(path: Path, name: str, shape, dtype: str, initializer) -> np.ndarray:
    from onnx import numpy_helper

    size = int(np.prod(shape, dtype=object)) * DTYPES[dtype].itemsize
    if initializer.HasField("raw_data"):
        if len(initializer.raw_data) != size:
            raise damaged(
                path, f"initialiser {name!r} has {len(initializer.raw_data)} bytes, expected {size}"
            )
        return np.frombuffer(initializer.raw_data, DTYPES[dtype]).reshape(shape)
    try:
        return numpy_helper.to_array(initializer)
    except ValueError as error:
        raise damaged(path, f"initialiser {name!r} cannot be read ({error!s:.80})") from error
