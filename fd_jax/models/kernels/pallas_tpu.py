"""Fused attention for TPUs, in Pallas: logits and weights never leave the chip's vector memory.

One program computes some heads of some rows of the batch. It reads queries, keys and values as the
matmuls around attention write them, [B, N, A * d], so that nothing is transposed in HBM, and works
on logits with keys along the rows and queries along the columns. Sums over keys then add registers
to each other instead of numbers within one, and the weights have the order that both the values'
and the keys' gradient need. The bias stays in vector memory while the rows of the batch go by, and
so does the sum of its gradient.

The forward pass that a gradient follows keeps, beside its inputs, the logarithm of the sum of
exponentials of each query's logits, [B, A, N]; the backward pass computes the weights again.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
import re
from typing import Literal, cast

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from fd_jax.models.kernels.base import Implementation, per_device

LANES = 128  # numbers in a row of a vector register; heads that fill one together share a matmul

# Most logits of a program. Its code grows with them, since every register's work is written out.
MAX_LOGITS = 12 * 256**2

# Products of [N, N] and [N, d] of each head. "saving" also keeps what a backward pass needs.
MATMULS = {"forward": 2, "saving": 2, "backward": 5}
Kind = Literal["forward", "saving", "backward"]

VMEM_BYTES = 100 * 2**20  # of the 128 MiB that a v5e or v6e has


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None,
    scale: float,
    added: Sequence[jax.Array | None] = (None, None, None),
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention, see `fd_jax.models.attention.attend`.

    Args:
      q: [B, N, A, d] bfloat16 or float32; `k` and `v` have the same shape.
      k: keys.
      v: values.
      bias: [A, N, N] or [G, A, N, N] float32, or None.
      scale: factor on q k^T.
      added: see `Implementation.sums_gradients`.
      interpret: runs the programs without a TPU, for tests.
    """
    width = q.shape[-1]
    local = functools.partial(_attend_flat, width=width, interpret=interpret)
    flat = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
    return per_device(local)(*flat, bias=bias, scale=scale, added=tuple(added)).reshape(q.shape)


def _attend_flat(q, k, v, *, bias, scale, added, width, interpret) -> jax.Array:
    """Heads lie side by side, [B, N, A * d]: a matmul's result that is cut up would be copied."""
    if bias is not None:
        # Keys along the rows, as the programs have their logits.
        bias = bias.reshape(-1, *bias.shape[-3:]).swapaxes(-1, -2)
    out: jax.Array = _attention(q, k, v, bias, added, width, scale, interpret)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q, k, v, bias, added, width, scale, interpret):
    """[B, N, A * d] x 3 and bias [G, A, keys, queries] or None -> [B, N, A * d]."""
    del added  # in q, k and v already
    work = _Work.of(q, bias, width, interpret)
    program = functools.partial(_forward_program, scale=scale, width=width)
    out, _ = work.call(program, (q, k, v, bias), (_like(q), None), "forward")
    return out


def _attention_forward(q, k, v, bias, added, width, scale, interpret):
    work = _Work.of(q, bias, width, interpret)
    program = functools.partial(_forward_program, scale=scale, width=width)
    outputs = (_like(q), work.per_query())
    out, lse = work.call(program, (q, k, v, bias), outputs, "saving")
    summed = tuple(vector is not None for vector in added)
    return out, (q, k, v, bias, summed, lse)


def _attention_backward(width, scale, interpret, residuals, g):
    q, k, v, bias, summed, lse = residuals
    work = _Work.of(q, bias, width, interpret)
    program = functools.partial(_backward_program, scale=scale, width=width)
    sums = tuple(work.per_channel() if wanted else None for wanted in summed)
    outputs = (*(_like(q),) * 3, None if bias is None else _like(bias), sums)
    *gradients, sums = work.call(program, (q, k, v, bias, lse, g), outputs, "backward")
    return (*gradients, tuple(None if x is None else x[0] for x in sums))


_attention.defvjp(_attention_forward, _attention_backward)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of one of the programs, as its name says it: see `parse`.

    Attributes:
      kind: which program.
      q: shape [B, N, A * d] and dtype of the queries.
      bias: shape [G, A, N, N] of the bias, or None.
      width: d.
      programs: number of programs that it runs.
    """

    kind: Kind
    q: jax.ShapeDtypeStruct
    bias: jax.ShapeDtypeStruct | None
    width: int
    programs: int

    def lower(self, sharding: jax.sharding.Sharding) -> jax.stages.Lowered:
        """The call alone, for a device that may not be here. Biases' gradients are not summed."""
        q, bias, lse = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            (self.q, self.bias, _Work.of(self.q, self.bias, self.width, False).per_query()),
        )
        fixed = {"width": self.width, "scale": 1.0, "interpret": False}
        nothing = (None, None, None)
        if self.kind == "backward":

            def backward(q, k, v, bias, lse, g):
                residuals = q, k, v, bias, (False, False, False), lse
                return _attention_backward(**fixed, residuals=residuals, g=g)

            return jax.jit(backward).lower(q, q, q, bias, lse, q)
        forward = _attention if self.kind == "forward" else _attention_forward
        return jax.jit(
            lambda q, k, v, bias: jax.tree.leaves(
                forward(q, k, v, bias, nothing, self.width, 1.0, False)
            )
        ).lower(q, q, q, bias)


def parse(name: str) -> Call | None:
    """What a kernel computes, from its name in a compiled program; None for other kernels."""
    match = re.fullmatch(r"attention_([a-z]+)_(\d+)x(\d+)x(\d+)x(\d+)_(\d+)_(\w+)", name)
    if match is None or match[1] not in MATMULS:
        return None
    batch, tokens, heads, width, groups = map(int, match.groups()[1:6])
    q = jax.ShapeDtypeStruct((batch, tokens, heads * width), jnp.dtype(match[7]))
    square = (groups, heads, tokens, tokens)
    bias = jax.ShapeDtypeStruct(square, jnp.float32) if groups else None
    programs = math.prod(_Work.of(q, bias, width, False).grid)
    return Call(cast(Kind, match[1]), q, bias, width, programs)


def _like(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _forward_program(q_ref, k_ref, v_ref, bias_ref, out_ref, lse_ref, *, scale, width):
    for row, tile in _tiles(q_ref.shape, width):
        q, k, v = (ref[row, :, tile.lanes] for ref in (q_ref, k_ref, v_ref))
        q = _times(q, scale)
        averages = []
        for head in tile.heads:
            logits = _logits(q, tile.only(k, head), bias_ref, row, head)
            largest = jnp.max(logits, axis=0, keepdims=True)
            weights = jnp.exp(logits - largest)
            total = jnp.sum(weights, axis=0, keepdims=True)
            weights = weights * (1 / total)
            averages.append(_dot(weights.astype(v.dtype), v, 0, 0))
            if lse_ref is not None:
                lse_ref[row, head] = largest + jnp.log(total)
        out_ref[row, :, tile.lanes] = tile.merge(averages).astype(out_ref.dtype)


def _backward_program(
    q_ref,
    k_ref,
    v_ref,
    bias_ref,
    lse_ref,
    g_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    dbias_ref,
    sum_refs,
    *,
    scale,
    width,
):
    first_row = pl.program_id(_BATCH) == 0
    _start_sums([dbias_ref], first_row)
    _start_sums(sum_refs, first_row & (pl.program_id(_GROUPS) == 0))
    for row, tile in _tiles(q_ref.shape, width):
        q, k, v, g = (ref[row, :, tile.lanes] for ref in (q_ref, k_ref, v_ref, g_ref))
        q, k_turned = _times(q, scale), k.T
        dq, dk, dv = [], [], []
        for head in tile.heads:
            logits = _logits(q, tile.only(k, head), bias_ref, row, head)
            weights = jnp.exp(logits - lse_ref[row, head])
            dv.append(_dot(weights.astype(v.dtype), g, 1, 0))
            dweights = _dot(tile.only(v, head), g, 1, 1)
            mean = jnp.sum(weights * dweights, axis=0, keepdims=True)
            dlogits = weights * (dweights - mean)
            if dbias_ref is not None:
                dbias_ref[row % dbias_ref.shape[0], head] += dlogits
            dlogits = dlogits.astype(q.dtype)
            dk.append(_dot(dlogits, q, 1, 0))
            # Turned around twice: keys and this result are smaller than the logits' gradient.
            dq.append(_dot(tile.rows(k_turned, head), dlogits, 1, 0))
        results = jnp.concatenate(dq).T * scale, tile.merge(dk), tile.merge(dv)
        for ref, sum_ref, result in zip((dq_ref, dk_ref, dv_ref), sum_refs, results, strict=True):
            ref[row, :, tile.lanes] = result.astype(ref.dtype)
            if sum_ref is not None:
                sum_ref[:, tile.lanes] += jnp.sum(result, axis=0, keepdims=True)


def _start_sums(refs, here):
    """Zeros for what programs add up, in the first of those that share it."""

    @pl.when(here)
    def _zero():
        for ref in refs:
            if ref is not None:
                ref[...] = jnp.zeros_like(ref)


def _logits(q, k, bias_ref, row, head):
    """Of one head, whose keys alone are not zero in `k`. -> [keys, queries] float32."""
    logits = _dot(k, q, 1, 1)
    return logits if bias_ref is None else logits + bias_ref[row % bias_ref.shape[0], head]


def _times(x, factor):
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def _dot(x, y, x_axis, y_axis):
    """The sum of products over one axis of each, in float32."""
    contracted = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, contracted, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Heads whose channels lie side by side in one register's lanes.

    A matmul of all their channels costs what one head's does. So where channels are summed over,
    the other heads' are set to zero, and where they are the result, each head takes its own.
    """

    start: int
    stop: int
    width: int

    @property
    def lanes(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def heads(self) -> range:
        return range(self.start // self.width, self.stop // self.width)

    def only(self, x, head):
        """[N, lanes] with zeros where channels are another head's."""
        if len(self.heads) == 1:
            return x
        return jnp.where(self._mask(head), x, jnp.zeros_like(x))

    def rows(self, x, head):
        """Rows of [lanes, N] that are channels of this head."""
        first = head * self.width - self.start
        return x[first : first + self.width]

    def merge(self, results):
        """Each head's channels of its own [N, lanes]."""
        merged = results[0]
        for head, result in zip(self.heads[1:], results[1:], strict=True):
            merged = jnp.where(self._mask(head), result, merged)
        return merged

    def _mask(self, head):
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, self.stop - self.start), 1)
        first = head * self.width - self.start
        return (lane >= first) & (lane < first + self.width)


def _tiles(shape, width):
    """(row, tile) of every row of a block [rows, N, lanes], tile after tile."""
    rows, _, lanes = shape
    size = LANES if LANES % width == 0 else width
    for row in range(rows):
        for start in range(0, lanes, size):
            yield row, _Tile(start, min(start + size, lanes), width)


_HEADS, _GROUPS, _BATCH = range(3)  # axes of the grid; those that share a bias come last


@dataclasses.dataclass(frozen=True)
class _Work:
    """How one call is cut into programs.

    Attributes:
      batch, tokens, heads, width, groups: B, N, A, d and G; G is 1 where all rows share a bias.
      rows: rows of the batch in a program; a divisor of G where that is not 1.
      block_heads: heads in a program.
      interpret: see `attend`.
    """

    batch: int
    tokens: int
    heads: int
    width: int
    groups: int
    rows: int
    block_heads: int
    interpret: bool

    @classmethod
    def of(cls, q, bias, width: int, interpret: bool) -> "_Work":
        batch, tokens, channels = q.shape
        groups = 1 if bias is None else bias.shape[0]
        heads = channels // width
        logits = math.ceil(tokens / 8) * 8 * math.ceil(tokens / LANES) * LANES
        block_heads = _largest(
            heads,
            MAX_LOGITS // logits,
            lambda count: count == heads or count * width % LANES == 0,
        )
        rows = 1
        if block_heads == heads:
            rows = _largest(batch if groups == 1 else groups, MAX_LOGITS // (logits * heads))
        return cls(batch, tokens, heads, width, groups, rows, block_heads, interpret)

    def call(self, program, inputs, outputs, kind: Kind):
        """Runs a program for all heads and rows.

        Args:
          program: function of the inputs' and the outputs' references.
          inputs: arrays, or None.
          outputs: shapes and dtypes of the results, or None.
          kind: which program it is.
        """
        products = self.batch * self.heads * self.tokens**2
        moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((inputs, outputs)))
        cost = pl.CostEstimate(
            flops=2 * MATMULS[kind] * products * self.width,
            transcendentals=products,
            bytes_accessed=moved,
        )
        # Programs of the backward pass add to sums that they share: those cannot run at once.
        order = "arbitrary" if kind == "backward" else "parallel"
        return pl.pallas_call(
            program,
            grid=self.grid,
            in_specs=jax.tree.map(self._spec, inputs),
            out_specs=jax.tree.map(self._spec, outputs),
            out_shape=outputs,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", order, order), vmem_limit_bytes=VMEM_BYTES
            ),
            cost_estimate=cost,
            interpret=self.interpret,
            name=self._name(kind, inputs[0].dtype, biased=inputs[3] is not None),
        )(*inputs)

    def _name(self, kind: Kind, dtype, *, biased: bool) -> str:
        """A name from which `parse` knows what is computed, for profiles and plans."""
        shape = "x".join(map(str, (self.batch, self.tokens, self.heads, self.width)))
        groups = self.groups if biased else 0
        return f"attention_{kind}_{shape}_{groups}_{jnp.dtype(dtype).name}"

    def per_query(self) -> jax.ShapeDtypeStruct:
        """A number for each query of each head; its axis of one makes any block of heads legal."""
        return jax.ShapeDtypeStruct((self.batch, self.heads, 1, self.tokens), jnp.float32)

    def per_channel(self) -> jax.ShapeDtypeStruct:
        """A number for each channel."""
        return jax.ShapeDtypeStruct((1, self.heads * self.width), jnp.float32)

    @property
    def grid(self) -> tuple[int, int, int]:
        blocks = self.batch // self.rows
        return self.heads // self.block_heads, self._bias_blocks, blocks // self._bias_blocks

    @property
    def _bias_blocks(self) -> int:
        return self.groups // self.rows if self.groups > 1 else 1

    def _spec(self, x) -> pl.BlockSpec:
        if x.ndim == 2:  # numbers per channel
            return pl.BlockSpec((1, self.block_heads * self.width), lambda h, g, i: (0, h))
        if x.ndim == 3:  # tokens
            block = (self.rows, self.tokens, self.block_heads * self.width)
            return pl.BlockSpec(block, lambda h, g, i: (i * self._bias_blocks + g, 0, h))
        if x.shape[2] == 1:  # numbers per query
            block = (self.rows, self.block_heads, 1, self.tokens)
            return pl.BlockSpec(block, lambda h, g, i: (i * self._bias_blocks + g, h, 0, 0))
        block = (min(self.rows, self.groups), self.block_heads, self.tokens, self.tokens)
        return pl.BlockSpec(block, lambda h, g, i: (g, h, 0, 0))


def _largest(total: int, limit: int, legal=lambda count: True) -> int:
    """The largest legal divisor up to a limit, or the smallest one of all if none is so small."""
    legal_ones = [count for count in range(1, total + 1) if total % count == 0 and legal(count)]
    return max((count for count in legal_ones if count <= limit), default=legal_ones[0])


def _refuses(platform: str, dtype: jnp.dtype, head_widths: Sequence[int]) -> str | None:
    if platform != "tpu":
        return f"needs a TPU, and this run computes on {platform}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"computes in bfloat16 or float32, and dtype is {jnp.dtype(dtype).name}"
    wrong = sorted({width for width in head_widths if width % 8})
    if wrong:
        return (
            "takes heads whose channels are a multiple of 8, and this network's have "
            + ", ".join(map(str, wrong))
        )
    return None


IMPLEMENTATION = Implementation("pallas_tpu", attend, _refuses, sums_gradients=True)
