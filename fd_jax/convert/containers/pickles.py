"""Reads the pickles inside torch files without running anything they name.

A pickle is a small program for a stack machine: it names classes and calls them. `pickletools` of
the standard library takes the program apart without running it; the machine here knows the opcodes
that build values, keeps every name as inert text, and answers a call from `_CALLS`, a table of the
few that torch's own files need. None of them imports or runs foreign code; any other is refused by
its name.
"""

from collections.abc import Callable
import dataclasses
import io
import pickletools
import struct
from typing import Any

from fd_jax.errors import ConversionError

# What a damaged pickle makes the machine raise.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,  # covers Unicode errors
    struct.error,
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

    def append(self, value):
        """Takes a list item, so that APPEND works on subclasses of list."""
        self.items[len(self.items)] = value


@dataclasses.dataclass(frozen=True)
class Name:
    """A class, function or constant a pickle names; never imported."""

    name: str


def _rebuild_tensor(storage, offset, shape, strides, *_):
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    sizes = tuple(shape), tuple(strides)
    if len(sizes[0]) != len(sizes[1]) or not _naturals((offset, *sizes[0], *sizes[1])):
        raise ValueError("a tensor whose shape or strides are no sizes")
    return StridedTensor(storage, offset, *sizes)


def _naturals(values) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 48 for value in values)


def _first(value, *_):
    return value


def _ordered_dict(pairs=()):
    return {_checked_key(key): value for key, value in pairs}


def _default_dict(*_):
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
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": _default_dict,
    "builtins.set": _tuple,
    "__builtin__.set": _tuple,
}

# Classes found in checkpoints beside the weights, whose values nothing here needs.
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


class _Machine:
    """The stack machine: `run` executes the opcodes of one pickle."""

    def __init__(self):
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each MARK
        self.memo: dict[int, Any] = {}

    def run(self, stream: Any) -> Any:
        """The value a pickle builds; leaves the stream behind its last opcode."""
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in _VALUES:
                self.stack.append(argument)
            elif opcode.name in _OPCODES:
                _OPCODES[opcode.name](self, argument)
            else:
                raise ValueError(f"the opcode {opcode.name}, which torch does not write")
        return self.stack.pop()  # genops ends at STOP or raises

    def push(self, value: Any):
        """Puts a value on the stack."""
        self.stack.append(value)

    def pop_to_mark(self) -> list[Any]:
        """Everything above the last MARK, which goes too."""
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self, _):
        """Opcode MARK."""
        self.marked.append(self.stack)
        self.stack = []

    def put(self, index):
        """Opcodes PUT, BINPUT, LONG_BINPUT, MEMOIZE."""
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def push_tuple(self, count: int):
        """Opcodes TUPLE1 to TUPLE3."""
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def set_items(self, items: list[Any]):
        """Opcodes SETITEM, SETITEMS: key, value, key, value, ..."""
        filled = self.stack[-1].items if isinstance(self.stack[-1], Inert) else self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            filled[_checked_key(key)] = value

    def add(self, items: list[Any]):
        """Opcodes APPEND, APPENDS, ADDITEMS."""
        for item in items:
            self.stack[-1].append(item)

    def call(self, _):
        """Opcodes REDUCE, NEWOBJ: a name and a tuple of arguments."""
        arguments = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], arguments)

    def build(self, _):
        """Opcode BUILD: attributes of the object below."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].state = state
        elif not isinstance(self.stack[-1], dict):  # those of an OrderedDict are of no interest
            raise ValueError(f"attributes set on a {type(self.stack[-1]).__name__}")

    def stack_global(self, _):
        """Opcode STACK_GLOBAL: module and name from the stack."""
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_named(f"{module}.{name}"))


# Opcodes whose argument is the value.
_VALUES = frozenset(
    (
        "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING "
        "SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE "
        "BINUNICODE8"
    ).split()
)

_OPCODES: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "STOP": lambda m, _: None,
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_SET": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "MARK": _Machine.mark,
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.pop_to_mark(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.put,
    "GET": lambda m, index: m.push(m.memo[index]),
    "BINGET": lambda m, index: m.push(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.push(m.memo[index]),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, _: m.push_tuple(1),
    "TUPLE2": lambda m, _: m.push_tuple(2),
    "TUPLE3": lambda m, _: m.push_tuple(3),
    "LIST": lambda m, _: m.push(m.pop_to_mark()),
    "SETITEM": lambda m, _: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    "APPEND": lambda m, _: m.add([m.stack.pop()]),
    "APPENDS": lambda m, _: m.add(m.pop_to_mark()),
    "ADDITEMS": lambda m, _: m.add(m.pop_to_mark()),
    "GLOBAL": lambda m, name: m.push(_named(name.replace(" ", "."))),
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": lambda m, _: m.push(_storage(m.stack.pop())),
}


def _named(name: str) -> Name:
    """A class or function by its name; CPython 3.13 writes another one for those of pathlib."""
    return Name(name.replace("pathlib._local.", "pathlib.", 1))


def _checked_key(key: Any) -> Any:
    # Hashing nested tuples that share their parts takes exponential time.
    if not isinstance(key, str | int | float | bool | None):
        raise ValueError(f"a dictionary key of type {type(key).__name__}")
    return key


def _storage(pid: Any) -> Storage | Name:
    if pid[0] == "module":  # old files keep a network's class and its source text here
        return pid[1]
    kind, storage_class, key, _, length = pid[:5]
    if kind != "storage" or (len(pid) > 5 and pid[5] is not None):
        raise ValueError("a reference that is not a plain storage")
    dtype = _STORAGES.get(storage_class.name)
    if dtype is None:
        raise Refused(f"{storage_class.name} as storage, which fd_jax does not read")
    if not isinstance(key, str) or not _naturals((length,)):
        raise ValueError("a storage whose key is no text or whose length is no size")
    return Storage(key, dtype, length)


def _call(called: Any, arguments: Any) -> Any:
    if not isinstance(called, Name):
        raise ValueError(f"a {type(called).__name__} is called")
    if called.name in _CALLS:
        return _CALLS[called.name](*arguments)
    if called.name in _INERT or called.name.startswith(SCRIPT):
        return Inert(called.name)
    raise Refused(
        f"{called.name}, which loading would import and run. Nothing was run. If you trust the "
        "file, load it with its own code and save its plain state dict"
    )


def load(stream: Any, where: str) -> Any:
    """Reads one pickle from a stream positioned at it; leaves the stream behind it.

    Args:
      stream: has `read`, `readline` and `tell` as a binary file; must not give, or make room for,
        more than there is.
      where: names the file in errors.

    Returns:
      Dictionaries, lists, numbers, text, `StridedTensor` and `Inert`.

    Raises:
      ConversionError: damaged, or names a class that is not on the list.
    """
    try:
        return _Machine().run(stream)
    except Refused as error:
        raise ConversionError(f"{where}: refused: its pickle names {error}") from error
    except _DAMAGE as error:
        raise ConversionError(
            f"{where}: damaged or truncated pickle ({type(error).__name__}: {error!s:.120})"
        ) from error


def loads(data: bytes, where: str) -> Any:
    """Reads one pickle from memory, see `load`."""
    return load(io.BytesIO(data), where)
