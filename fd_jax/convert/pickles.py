"""Reads the pickles inside torch files without running anything they name.

A pickle is a small program: it names classes and calls them. Here a name becomes an inert handle,
and a call is looked up in `_CALLS`, a table of the few that torch's own files need; none of them
imports or runs foreign code. Anything else is refused by name. Python's own interpreter of the
opcodes does the rest, except for the opcodes that call, import or allocate, which are replaced.
"""

from collections.abc import Callable
import dataclasses
import io
import pickle
from typing import Any, BinaryIO

from fd_jax.errors import ConversionError

# What a damaged pickle makes the interpreter raise.
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,  # covers Unicode errors
    RecursionError,
)

_STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": "float64",
        "Float": "float32",
        "Half": "float16",
        "BFloat16": "bfloat16",
        "Long": "int64",
        "Int": "int32",
        "Short": "int16",
        "Char": "int8",
        "Byte": "uint8",
        "Bool": "bool",
        "ComplexFloat": "complex64",
    }.items()
}


@dataclasses.dataclass(frozen=True)
class Storage:
    """A run of numbers that a pickle refers to: its key in the file, dtype and length."""

    key: str
    dtype: str
    length: int


@dataclasses.dataclass(frozen=True)
class StridedTensor:
    """A tensor as the pickle describes it: a strided window on a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Inert:
    """An object of a class that is known but not needed: its name and what it was filled with."""

    def __init__(self, name: str):
        self.name = name
        self.state: Any = None
        self.items: dict[Any, Any] = {}

    def __setitem__(self, key, value):
        self.items[key] = value

    def append(self, value):
        """Takes a list item, so that APPEND works on subclasses of list."""
        self.items[len(self.items)] = value


@dataclasses.dataclass(frozen=True)
class _Global:
    """A class or function a pickle names; never imported."""

    name: str


def _rebuild_tensor(storage, offset, shape, strides, *_):
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    sizes = tuple(shape), tuple(strides)
    if len(sizes[0]) != len(sizes[1]) or not _naturals((offset, *sizes[0], *sizes[1])):
        raise ValueError(f"a tensor of shape {shape!r:.60} and strides {strides!r:.60}")
    return StridedTensor(storage, offset, *sizes)


def _naturals(values) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 48 for value in values)


def _first(value, *_):
    return value


def _dictionary(*_):
    return {}


def _tuple(values=()):
    return tuple(values)


_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.jit._pickle.restore_type_tag": _first,
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_doublelist": _first,
    "torch.jit._pickle.build_boollist": _first,
    "torch.jit._pickle.build_tensorlist": _first,
    "torch.Size": _tuple,
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": _dictionary,
    "builtins.set": _tuple,
    "__builtin__.set": _tuple,
}

# Classes that stand in checkpoints beside the weights and whose values nothing here needs.
_INERT = frozenset(
    (
        "argparse.Namespace",
        "yacs.config.CfgNode",
        "_codecs.encode",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.WindowsPath",
        "torch.device",
    )
)
# Attribute classes of TorchScript archives; their code is in the archive and is not read.
SCRIPT = "__torch__."


class Refused(ConversionError):
    """A pickle names a class or function that is not allowed."""


class _Interpreter(pickle._Unpickler):  # the pure Python one: its opcodes can be replaced
    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> _Global:
        return _Global(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage_class, key, _, length = pid[:5]
        if kind != "storage" or (len(pid) > 5 and pid[5] is not None):
            raise ValueError(f"a reference {pid!r:.80} that is not a plain storage")
        dtype = _STORAGES.get(storage_class.name)
        if dtype is None:
            raise Refused(f"a storage of class {storage_class.name}, which fd_jax does not read")
        if not isinstance(key, str) or not _naturals((length,)):
            raise ValueError(f"a storage {key!r:.40} of length {length!r:.40}")
        return Storage(key, dtype, length)

    def get_extension(self, code):
        raise Refused(f"the registered extension {code}")

    def load_reduce(self):
        arguments = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], arguments)

    def load_newobj_ex(self):
        keywords = self.stack.pop()
        if keywords:
            raise Refused("a class called with keywords")
        self.load_reduce()

    def load_inst(self):
        module = self.readline()[:-1].decode("ascii")
        name = self.readline()[:-1].decode("ascii")
        self.append(_call(self.find_class(module, name), self.pop_mark()))

    def load_obj(self):
        arguments = self.pop_mark()
        self.append(_call(arguments[0], arguments[1:]))

    def load_build(self):
        state = self.stack.pop()
        filled = self.stack[-1]
        if isinstance(filled, Inert):
            filled.state = state
        elif not isinstance(filled, dict):  # an OrderedDict's attributes are of no interest
            raise ValueError(f"attributes set on a {type(filled).__name__}")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_reduce
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.INST[0]] = load_inst
    dispatch[pickle.OBJ[0]] = load_obj
    dispatch[pickle.BUILD[0]] = load_build
    # Allocates its declared length before reading it; torch writes no bytearrays.
    del dispatch[pickle.BYTEARRAY8[0]]


def _call(called: Any, arguments: Any) -> Any:
    if not isinstance(called, _Global):
        raise ValueError(f"a {type(called).__name__} is called")
    if called.name in _CALLS:
        return _CALLS[called.name](*arguments)
    if called.name in _INERT or called.name.startswith(SCRIPT):
        return Inert(called.name)
    raise Refused(
        f"{called.name}, which loading would import and run. Nothing was run. If you trust the "
        "file, load it with its own code and save its plain state dict"
    )


def load(stream: BinaryIO, where: str) -> Any:
    """Reads one pickle from a stream positioned at it; leaves the stream behind it.

    Args:
      stream: binary file object.
      where: names the file in errors.

    Returns:
      Dictionaries, lists, numbers, text, `StridedTensor` and `Inert`.

    Raises:
      ConversionError: damaged, or names a class that is not on the list.
    """
    try:
        return _Interpreter(stream).load()
    except Refused as error:
        raise ConversionError(f"{where}: refused: its pickle names {error}") from error
    except _DAMAGE as error:
        raise ConversionError(
            f"{where}: damaged or truncated pickle ({type(error).__name__}: {error!s:.120})"
        ) from error


def loads(data: bytes, where: str) -> Any:
    """Reads one pickle from memory, see `load`."""
    return load(io.BytesIO(data), where)
