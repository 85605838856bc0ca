"""The layout changes between files and fd_jax, each with its inverse and shapes.

Arrays go in and come out in order. Nothing is computed on values, so an inverse gives the very bits
back; the one exception, `folded_positions`, says so. Shapes: `file_shapes` gets the shapes of the
fd_jax side and returns the file's.
"""

from collections.abc import Callable
import dataclasses

import numpy as np

# Sizes; a letter stands for one that only the file knows (the classes of a head).
Shape = tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """A layout change.

    Attributes:
      forward: file arrays -> fd_jax arrays, both tuples.
      inverse: fd_jax arrays -> file arrays.
      file_shapes: fd_jax shapes -> file shapes.
      inexact: what an inverse gives back that the file did not have, in words; "" for most.
    """

    forward: Callable[..., tuple[np.ndarray, ...]]
    inverse: Callable[..., tuple[np.ndarray, ...]]
    file_shapes: Callable[..., tuple[Shape, ...]]
    inexact: str = ""


_LINE = 64  # bytes of a line of the processor's cache
_ROWS = 512  # as many lines stay in the cache


def in_rows(array: np.ndarray) -> np.ndarray:
    """The same array in row-major order, which is copied if it is not.

    NumPy copies a transposed matrix column by column, and every number fills a line of the cache
    anew. In blocks of whole lines it takes a fifth of the time.
    """
    steps = [
        abs(step) if size > 1 else 0 for step, size in zip(array.strides, array.shape, strict=True)
    ]
    nearest = min((step, axis) for axis, step in enumerate(steps) if step)[1] if any(steps) else -1
    if array.flags.c_contiguous or nearest in (-1, array.ndim - 1):
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, array.dtype)
    to, rows = np.moveaxis(out, nearest, 0), np.moveaxis(array, nearest, 0)
    columns = max(1, _LINE // array.itemsize)
    for i in range(0, len(rows), _ROWS):
        for j in range(0, array.shape[-1], columns):
            block = slice(i, i + _ROWS), ..., slice(j, j + columns)
            to[block] = rows[block]
    return out


def _one(forward, inverse, shape) -> Transform:
    """A transform of one array into one array."""
    return Transform(lambda x: (forward(x),), lambda x: (inverse(x),), lambda s: (shape(s),))


def _split_rows(x: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(x.reshape(3, -1))


def _join_rows(*rows: np.ndarray) -> tuple[np.ndarray, ...]:
    return (np.concatenate(rows),)


SAME = _one(lambda x: x, lambda x: x, lambda s: s)

# torch Linear [out, in] <-> [in, out]
LINEAR = _one(lambda x: x.T, lambda x: x.T, lambda s: s[::-1])

# torch Conv2d OIHW <-> HWIO
CONV = _one(
    lambda x: x.transpose(2, 3, 1, 0),
    lambda x: x.transpose(3, 2, 0, 1),
    lambda s: (s[3], s[2], s[0], s[1]),
)

# torch ConvTranspose2d IOHW <-> HWIO
DECONV = _one(
    lambda x: x.transpose(2, 3, 0, 1),
    lambda x: x.transpose(2, 3, 0, 1),
    lambda s: (s[2], s[3], s[0], s[1]),
)

# torch Conv1d with kernel 1 [out, in, 1] <-> [in, out]
CONV_1X1 = _one(lambda x: x[:, :, 0].T, lambda x: x.T[:, :, None], lambda s: (s[1], s[0], 1))

# torch Conv2d with kernel 1 [out, in, 1, 1] <-> [in, out]
CONV_1X1_2D = _one(
    lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None], lambda s: (s[1], s[0], 1, 1)
)


def _by_neighbour(x: np.ndarray) -> np.ndarray:
    """Channels of 2 x 2 neighbours by channel, row and column -> by column, row and channel."""
    return np.moveaxis(x.reshape(-1, 2, 2, *x.shape[1:]), (0, 2), (2, 0)).reshape(x.shape)


def _by_channel(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x.reshape(2, 2, -1, *x.shape[1:]), (0, 2), (2, 0)).reshape(x.shape)


# What reads or scales the channels of 2 x 2 neighbours in the order of torch's Unfold, [D, 4C] and
# [4C], <-> [4C, D] and [4C] in that of Swin's own code
UNFOLDED_LINEAR = _one(lambda x: _by_neighbour(x.T), lambda x: _by_channel(x).T, lambda s: s[::-1])
UNFOLDED = _one(_by_neighbour, _by_channel, lambda s: s)

# [1, 1, 1, D] <-> [D]
VECTOR_OF_FOUR_AXES = _one(
    lambda x: x[0, 0, 0], lambda x: x[None, None, None], lambda s: (1, 1, 1, s[0])
)

# [D] <-> [1, 1, D] and [N, D] <-> [1, N, D]
VECTOR_TOKEN = _one(lambda x: x[None, None], lambda x: x[0, 0], lambda s: s[2:])
MATRIX_TOKENS = _one(lambda x: x[None], lambda x: x[0], lambda s: s[1:])

# One number per head, [A, 1, 1] <-> [A]
PER_HEAD = _one(lambda x: x[:, 0, 0], lambda x: x[:, None, None], lambda s: (s[0], 1, 1))

# Fused torch qkv weight [3D, D], rows q | k | v <-> [D, 3, D]
FUSED_QKV = _one(
    lambda x: x.reshape(3, -1, x.shape[1]).transpose(2, 0, 1),
    lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
    lambda s: (s[1] * s[2], s[0]),
)

# Three torch weights [D, D] (q, k, v) <-> [D, 3, D]
SPLIT_QKV = Transform(
    lambda q, k, v: (np.stack((q, k, v)).transpose(2, 0, 1),),
    lambda x: tuple(x.transpose(1, 2, 0)),
    lambda s: ((s[2], s[0]),) * 3,
)

# The same from matrices that are stored as [in, out]
SPLIT_QKV_IN_OUT = Transform(
    lambda q, k, v: (np.stack((q, k, v), axis=1),),
    lambda x: tuple(x.transpose(1, 0, 2)),
    lambda s: ((s[0], s[2]),) * 3,
)

# Fused qkv bias [3D] <-> q, k, v
FUSED_QKV_BIAS = Transform(_split_rows, _join_rows, lambda q, k, v: ((3 * q[0],),))

# Fused qkv bias [3D] whose k part the file masks out <-> q, v; goes back with zeros for k
MASKED_QKV_BIAS = Transform(
    lambda x: _split_rows(x)[::2],
    lambda q, v: _join_rows(q, np.zeros_like(q), v),
    lambda q, v: ((3 * q[0],),),
)

# Position table in two pieces, class token [1, 1, D] and patches [1, N, D] <-> [1, 1 + N, D]
SPLIT_POSITIONS = Transform(
    lambda cls, patches: (np.concatenate((cls, patches), axis=1),),
    lambda x: (x[:, :1], x[:, 1:]),
    lambda s: ((1, 1, s[2]), (1, s[1] - 1, s[2])),
)


# Position table of patches alone [1, N, D] <-> [1, 1 + N, D], whose class token has position 0
PATCH_POSITIONS = _one(
    lambda x: np.concatenate((np.zeros_like(x[:, :1]), x), axis=1),
    lambda x: x[:, 1:],
    lambda s: (1, s[1] - 1, s[2]),
)

# The weight of a gated MLP's two branches [2 H, D], gate first <-> gate and value [D, H]
PACKED_GATE = Transform(
    lambda x: (x[: len(x) // 2].T, x[len(x) // 2 :].T),
    lambda gate, value: (np.concatenate((gate.T, value.T)),),
    lambda gate, value: ((gate[1] + value[1], gate[0]),),
)
# Two vectors in one [2 H] <-> each of them
HALVES = Transform(
    lambda x: tuple(x.reshape(2, -1)), _join_rows, lambda first, second: ((first[0] + second[0],),)
)

# A query's weight [D, D] and that of keys and values [2 D, D] <-> [D, 3, D]
QUERY_AND_KEY_VALUE = Transform(
    lambda q, kv: (np.concatenate((q, kv)).reshape(3, -1, q.shape[1]).transpose(2, 0, 1),),
    lambda x: (x[:, 0].T, x[:, 1:].transpose(1, 2, 0).reshape(-1, len(x))),
    lambda s: ((s[2], s[0]), (2 * s[2], s[0])),
)


def folded_positions(cls: int) -> Transform:
    """Registers and a position table of all tokens <-> registers that have their positions.

    Of registers (or a distillation token) [1, R, D] and a table [1, cls + R + N, D] are made the
    sum of both, which is what the network computes first, and the table [1, cls + N, D] of all
    other tokens. Back, the positions of registers are zero.

    Args:
      cls: 1 with a class token, otherwise 0.
    """

    def fold(registers, table):
        end = cls + registers.shape[1]
        own = table[:, cls:end].astype(np.float32)  # the libraries add in it
        return registers.astype(np.float32) + own, np.concatenate(
            (table[:, :cls], table[:, end:]), axis=1
        )

    def unfold(registers, table):
        rows = (table[:, :cls], np.zeros_like(registers), table[:, cls:])
        return registers, np.concatenate(rows, axis=1)

    return Transform(
        fold,
        unfold,
        lambda r, table: (r, (1, r[1] + table[1], r[2])),
        "registers hold the sum of themselves and their positions, whose rows in the table are "
        "zeros: the first thing that a network computes of them, so its outputs are the same",
    )


def split_qkv_heads(heads: int) -> Transform:
    """Three flax kernels [D, A, d] <-> [D, 3, D]."""

    def inverse(x):
        return tuple(part.reshape(len(part), heads, -1) for part in x.transpose(1, 0, 2))

    return Transform(
        lambda *qkv: (np.stack([x.reshape(len(x), -1) for x in qkv], axis=1),),
        inverse,
        lambda s: ((s[0], heads, s[2] // heads),) * 3,
    )


def heads_bias(heads: int) -> Transform:
    """A flax bias [A, d] <-> [D]."""
    return _one(
        lambda x: x.reshape(-1), lambda x: x.reshape(heads, -1), lambda s: (heads, s[0] // heads)
    )


def heads_out(heads: int) -> Transform:
    """A flax output kernel [A, d, D] <-> [D, D]."""
    return _one(
        lambda x: x.reshape(-1, x.shape[-1]),
        lambda x: x.reshape(heads, -1, x.shape[-1]),
        lambda s: (heads, s[0] // heads, s[1]),
    )
