"""Matmuls of int8 or float8 numbers, of which chips do twice as many a second as of bfloat16.

Both operands are rounded to numbers of eight bits times float32 factors. A kernel has a factor for
each output channel, found once; activations have one for each row (token), found where they are
multiplied. A factor is the largest absolute value over the largest number of the kind, so that
nothing is cut off, zero stays zero, and one channel or token of large values does not cost the
others their precision. Products are summed in int32 or float32, and both factors and the bias are
applied to the sums in float32.

This is plain XLA, in which such a matmul is a `dot_general` of the narrow arrays.
docs/quantized_teachers.md says why it is not the library qwix.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# The smallest "largest value" by which numbers are divided: rows of zeros stay zeros.
_SMALLEST = 1e-30


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of narrow numbers.

    Attributes:
      dtype: in which they are held.
      largest: largest number.
      sums: dtype in which products are summed.
      rounds: whether a cast leaves the rounding to us; one to float8 rounds to the nearest itself.
    """

    dtype: Any
    largest: float
    sums: Any
    rounds: bool


# By their names in configs. -128 is left out, so that both signs are alike.
KINDS = {
    "int8": Kind(jnp.dtype("int8"), 127.0, jnp.int32, rounds=True),
    "float8_e4m3fn": Kind(jnp.dtype("float8_e4m3fn"), 448.0, jnp.float32, rounds=False),
}
_OF_DTYPE = {kind.dtype: kind for kind in KINDS.values()}


def is_narrow(dtype: Any) -> bool:
    """Whether an array of this dtype holds numbers of one of KINDS."""
    return jnp.dtype(dtype) in _OF_DTYPE


def quantize(x: Any, kind: Kind, *, axis: int, xp: Any = jnp) -> tuple[Any, Any]:
    """The nearest narrow numbers, ties to even, and the factors by which they are multiplied.

    Args:
      x: [...] of any float dtype.
      kind: of the numbers.
      axis: along which numbers share a factor.
      xp: `jax.numpy`, or `numpy` for host arrays.

    Returns:
      [...] in the kind's dtype, and float32 factors that have length 1 along the axis.
    """
    x = x.astype(xp.float32)
    largest = xp.maximum(xp.max(xp.abs(x), axis=axis, keepdims=True), _SMALLEST)
    # One division for all numbers that share a factor, since chips have no fast one.
    scaled = x * (kind.largest / largest)
    return (xp.round(scaled) if kind.rounds else scaled).astype(kind.dtype), largest / kind.largest


def linear(
    x: jax.Array, kernel: jax.Array, scale: jax.Array, bias: jax.Array | None, dtype: DTypeLike
) -> jax.Array:
    """X @ (kernel * scale) + bias with both operands narrow; has no gradient.

    Args:
      x: [M, D].
      kernel: [D, *out] in a narrow dtype, which that of the matmul is.
      scale: [*out] float32, its factors.
      bias: [*out], or None.
      dtype: of the result.

    Returns:
      [M, *out].
    """
    kind = _OF_DTYPE[jnp.dtype(kernel.dtype)]
    rows, factors = quantize(x, kind, axis=1)
    contracted = (((1,), (0,)), ((), ()))
    sums = jax.lax.dot_general(rows, kernel, contracted, preferred_element_type=kind.sums)
    y = sums.astype(jnp.float32) * factors.reshape(-1, *(1,) * scale.ndim) * scale
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(dtype)
