"""Parses the text of a compiled program: collectives, cycles, memory spaces, aliases.

Everything comes from the text alone. Loop bodies count as often as the compiler knows that they
run; a computation that is called from several places counts once for each call.
"""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import functools
import itertools
import json
import math
import re
from typing import Any

import numpy as np

from fd_jax.plan import matmuls

VMEM = 1  # memory space of a layout with S(1): on the chip, so it causes no HBM traffic

_BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4}
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^{}]*\})?")
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_NO_TRAFFIC = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "opt-barrier",
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    space: int  # memory space, 0 for HBM

    @property
    def bytes(self) -> int:
        """Size in bytes, without the padding of the layout."""
        return -(-math.prod(self.dims) * _bits(self.dtype) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: name and opcode as written in the text.
      shapes: shapes of the result; a tuple is flattened.
      operands: names of other instructions in the same computation.
      attributes: text after the operands.
      root: whether the computation returns its result.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def rematerialized(self) -> bool:
        """Whether the compiler added it to recompute a result and save memory."""
        return ".remat" in self.name

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls."""
        single = re.findall(
            r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)",
            self.attributes,
        )
        several = re.findall(
            r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", self.attributes
        )
        return tuple(single + re.findall(r"%?([\w.\-]+)", " ".join(several)))


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation between devices, with all its executions in a step.

    Attributes:
      kind: opcode, such as "all-gather".
      axis: mesh axis, "data+fsdp" for two; "" if the groups follow no axis.
      shapes: shapes of the whole arrays in one execution: the outputs of a gather, the inputs of a
        reduction or scatter.
      group: number of devices in each group.
      count: number of executions in a step.
    """

    kind: str
    axis: str
    shapes: tuple[Shape, ...]
    group: int
    count: int

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Distinct dtypes of the arrays, sorted."""
        return tuple(sorted({shape.dtype for shape in self.shapes}))

    @property
    def bytes(self) -> int:
        """Size of the arrays in bytes, over all executions."""
        return self.count * sum(shape.bytes for shape in self.shapes)

    @property
    def received(self) -> float:
        """Bytes that each device has to receive, whatever the algorithm."""
        share = (self.group - 1) / self.group
        if self.kind == "all-reduce":
            return 2 * share * self.bytes
        if self.kind.startswith("collective"):
            return float(self.bytes)
        return share * self.bytes


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of ours, which the compiler does not look into.

    Attributes:
      name: its name in the code.
      calls: number of its calls in a step.
      flops: FLOPs of one call, by its own account.
    """

    name: str
    calls: int
    flops: int


class Module:
    """The parsed text of a compiled program."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self._header = text[: text.index("\n")]
        current: list[Instruction] = []
        for line in text.splitlines():
            if not line.startswith(" "):
                header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
                if header:
                    current = self.computations.setdefault(header[2], [])
                    self.entry = header[2] if header[1] else self.entry
            elif " = " in line:
                current.append(_instruction(line.strip()))
        if not self.entry:
            raise ValueError("the text has no ENTRY computation, so it is not a compiled program")

    @property
    def run_counts(self) -> dict[str, int]:
        """How often a step runs each computation, including those inside fusions.

        Every branch of a conditional counts.
        """
        return self._counts[0]

    @functools.cached_property
    def _counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """(runs of each computation, how many of these repeat an earlier one to save memory)."""
        runs: dict[str, int] = collections.Counter()
        repeats: dict[str, int] = collections.Counter()

        def visit(name: str, count: int, repeated: bool) -> None:
            runs[name] += count
            repeats[name] += count if repeated else 0
            for instruction in self.computations[name]:
                loop = instruction.opcode == "while"
                inner = count * self._trip_count(instruction) if loop else count
                for called in instruction.called:
                    if called in self.computations and instruction.opcode not in (
                        "reduce",
                        "all-reduce",
                    ):
                        visit(called, inner, repeated or instruction.rematerialized)

        visit(self.entry, 1, False)
        return dict(runs), dict(repeats)

    def matmul_flops(self) -> tuple[int, int]:
        """FLOPs of all matmuls and convolutions of a step, with two FLOPs per multiply-add.

        Unlike the compiler's count, this counts only matmuls, and it counts loop bodies as often
        as they run. Kernels of ours count with the FLOPs that they state.

        Returns:
          (FLOPs of all matmuls, FLOPs of those that the compiler repeats to save memory).
        """
        runs, repeats = self._counts
        total, repeated = sum(kernel.calls * kernel.flops for kernel in self.kernels), 0
        for name, instruction in self._executed_instructions():
            if instruction.opcode in matmuls.OPCODES:
                shapes = [
                    self._shapes_by_name[name][operand][0].dims for operand in instruction.operands
                ]
                flops = matmuls.flops(
                    instruction.opcode, shapes, instruction.shapes[0].dims, instruction.attributes
                )
                total += runs[name] * flops
                repeated += (runs if instruction.rematerialized else repeats)[name] * flops
        return total, repeated

    @property
    def kernels(self) -> list[Kernel]:
        """The Pallas kernels of a step; equal ones are one entry."""
        calls: dict[tuple[str, int], int] = collections.Counter()
        for name, instruction in self._executed_instructions():
            if 'custom_call_target="tpu_custom_call"' in instruction.attributes:
                label = re.search(r'op_name="[^"]*?([^"/]+)/pallas_call"', instruction.attributes)
                flops = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.attributes)
                key = label[1] if label else instruction.name, int(flops[1]) if flops else 0
                calls[key] += self.run_counts[name]
        return [Kernel(name, count, flops) for (name, flops), count in calls.items()]

    @property
    def loops(self) -> list[int]:
        """Trip counts of the loops that contain matmuls and are known to run more than once.

        The compiler's own counts are wrong for them, because it counts their bodies once. Loops
        that draw random numbers, whose trip count is random, contain no matmuls.
        """
        loops = (i for _, i in self._executed_instructions() if i.opcode == "while")
        counts = ((self._trip_count(i), i.called) for i in loops)
        return [count for count, called in counts if count > 1 and self._has_matmul(called)]

    def _has_matmul(self, names: Sequence[str]) -> bool:
        """Whether these computations, or any that they call, contain a matmul."""
        return any(
            instruction.opcode in matmuls.OPCODES or self._has_matmul(instruction.called)
            for name in names
            for instruction in self.computations.get(name, ())
        )

    def cycles(self) -> int:
        """Sum of the compiler's `estimated_cycles` over all instructions, as if run in sequence.

        It has no estimate for kernels of ours, see `plan.bundles`.
        """
        total = 0
        for name, instruction in self._scheduled_instructions():
            match = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
            total += self.run_counts[name] * int(match[1]) if match else 0
        return total

    def vmem_bytes(self) -> int:
        """Bytes of operands and results of scheduled instructions that live in VMEM.

        Loop bodies count once, as in the "bytes accessed" of `cost_analysis`.
        """
        total = 0
        for name, instruction in self._scheduled_instructions():
            opcode = instruction.opcode
            if opcode in _NO_TRAFFIC or opcode.endswith("-done"):
                continue
            shapes = self._shapes_by_name[name]
            results = instruction.shapes[:1] if opcode.endswith("-start") else instruction.shapes
            operands = (shape for o in instruction.operands for shape in shapes.get(o, ()))
            total += sum(s.bytes for s in itertools.chain(results, operands) if s.space == VMEM)
        return total

    def collectives(self, mesh_shape: dict[str, int]) -> list[Collective]:
        """Every collective of a step; equal ones are added up; largest first.

        Args:
          mesh_shape: size of each axis, in the order of the mesh.
        """
        seen: set[str] = set()
        counts: dict[Any, int] = collections.Counter()
        for name, instruction in self._executed_instructions():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in _COLLECTIVES:
                continue
            # A fused asynchronous collective appears in several computations with the same channel.
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            if channel and channel[1] in seen:
                continue
            if channel:
                seen.add(channel[1])
            groups = _groups(instruction.attributes, mesh_shape)
            shapes = self._collective_arrays(name, instruction)
            key = (kind, _axis(groups, mesh_shape), shapes, len(groups[0]))
            counts[key] += self.run_counts[name]
        collectives = [Collective(*key, count=count) for key, count in counts.items()]
        return sorted(collectives, key=lambda collective: -collective.bytes)

    def aliased_parameters(self) -> set[int]:
        """Numbers of the inputs whose memory is reused for an output."""
        start = self._header.find("input_output_alias={")
        if start < 0:
            return set()
        text = self._header[start:]
        return {int(n) for n in re.findall(r"\{[\d, ]*\}: \((\d+),", text)}

    def parameters(self) -> dict[int, Shape]:
        """Shapes of the inputs on one device, by number."""
        shapes = {}
        for instruction in self.computations[self.entry]:
            if instruction.opcode == "parameter":
                number = re.match(r"(\d+)\)", instruction.attributes)
                assert number is not None
                shapes[int(number[1])] = instruction.shapes[0]
        return shapes

    def stored_broadcasts(self) -> list[Shape]:
        """Shapes of arrays written to memory that only repeat a smaller array."""
        shapes = []
        for _, instruction in self._scheduled_instructions():
            if self._is_broadcast(instruction):
                shapes += instruction.shapes
        return shapes

    def scheduled_shapes(self) -> set[Shape]:
        """Shapes of all arrays that scheduled instructions write."""
        return {
            s
            for _, i in self._scheduled_instructions()
            if i.opcode not in _NO_TRAFFIC
            for s in i.shapes
        }

    def _is_broadcast(self, instruction: Instruction) -> bool:
        """Whether its result, after reshapes and converts, only repeats a smaller array."""
        if instruction.opcode == "broadcast":
            return True
        if instruction.opcode != "fusion":
            return False
        inside = {i.name: i for i in self.computations[instruction.called[0]]}
        root = next(i for i in inside.values() if i.root)
        while root.opcode in ("bitcast", "convert", "copy", "reshape", "transpose"):
            root = inside[root.operands[0]]
        return root.opcode == "broadcast" and bool(inside[root.operands[0]].shapes[0].dims)

    @functools.cached_property
    def _shapes_by_name(self) -> dict[str, dict[str, tuple[Shape, ...]]]:
        """Result shapes by the names of computation and instruction."""
        return {
            name: {i.name: i.shapes for i in instructions}
            for name, instructions in self.computations.items()
        }

    def _executed_instructions(self) -> Iterator[tuple[str, Instruction]]:
        """(computation, instruction) for every instruction that runs, also inside fusions."""
        for name in self.run_counts:
            for instruction in self.computations[name]:
                yield name, instruction

    def _scheduled_instructions(self) -> Iterator[tuple[str, Instruction]]:
        """(computation, instruction) outside fusions: in the entry, loops, branches and calls."""
        names, pending = [], [self.entry]
        while pending:
            name = pending.pop()
            names.append(name)
            for instruction in self.computations[name]:
                if instruction.opcode in ("while", "conditional", "call"):
                    pending += [c for c in instruction.called if c not in names]
        for name in names:
            for instruction in self.computations[name]:
                yield name, instruction

    def _trip_count(self, loop: Instruction) -> int:
        """How often a loop runs: what the compiler says, or else its limit; 1 if it has none.

        jax's loops over micro-batches count from 0 in steps of 1 while they are below a constant.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        by_name = {i.name: i for i in self.computations[condition[1]]} if condition else {}
        for compared in by_name.values():
            if compared.root and compared.opcode == "compare" and "=LT" in compared.attributes:
                limit = by_name[compared.operands[1]]
                number = re.match(r"(\d+)\)", limit.attributes)
                return int(number[1]) if limit.opcode == "constant" and number else 1
        return 1

    def _collective_arrays(self, name: str, instruction: Instruction) -> tuple[Shape, ...]:
        """Shapes of the whole arrays that a collective gathers, reduces or moves."""
        kind = instruction.opcode
        if kind.startswith("reduce-scatter"):
            by_name = self._shapes_by_name[name]
            shapes = [shape for o in instruction.operands for shape in by_name[o]]
        elif kind in ("all-gather-start", "collective-permute-start"):
            # The result is (operands, results, scalars ...); take the results.
            arrays = [s for s in instruction.shapes if s.dims]
            shapes = arrays[len(instruction.operands) : 2 * len(instruction.operands)]
        else:
            shapes = list(instruction.shapes)
        return tuple(dataclasses.replace(shape, space=0) for shape in shapes)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    bits = re.search(r"\d+", dtype)  # f32, bf16, u8, f8e4m3
    if bits is None:
        raise ValueError(f"unknown dtype {dtype!r} in a compiled program")
    return int(bits[0])


def _shapes(text: str) -> tuple[Shape, ...]:
    shapes = []
    for dtype, dims, layout in _SHAPE.findall(text):
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout or "")
        shapes.append(Shape(dtype, sizes, int(space[1]) if space else 0))
    return tuple(shapes)


def _instruction(line: str) -> Instruction:
    root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    type_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, arguments = rest[type_end:].lstrip().partition("(")
    # Brackets inside an operand list are balanced, so the matching one ends the list.
    end = _closing("(" + arguments, 0) - 1
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments[:end]))
    # A parameter and a constant have their number in the place of operands.
    numbered = opcode in ("parameter", "constant")
    attributes = arguments if numbered else arguments[end + 1 :]
    return Instruction(
        name.lstrip("%"), opcode, _shapes(rest[:type_end]), operands, attributes, root
    )


def _closing(text: str, start: int) -> int:
    """Position of the bracket that closes the one at `start`."""
    depth = 0
    for bracket in re.compile(r"[()]").finditer(text, start):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.start()
    raise ValueError(f"unbalanced brackets: {text[:200]}")


def _groups(attributes: str, mesh_shape: dict[str, int]) -> list[tuple[int, ...]]:
    """The groups of devices that communicate, as positions in the mesh."""
    devices = math.prod(mesh_shape.values())
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    if pairs:
        return _connected_groups(re.findall(r"\{(\d+),(\d+)", pairs[0]))
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\((.*?\)?)\))? ?\{([^}]*)\}",
        attributes,
    )
    if named:
        return _named_groups(*named.groups(), devices=devices)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        ids = np.arange(devices).reshape(_integers(iota[3]))
        if iota[4]:
            ids = ids.transpose(_integers(iota[4]))
        return [tuple(row) for row in ids.reshape(int(iota[1]), int(iota[2])).tolist()]
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    if listed:
        return [_integers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if "replica_groups=" in attributes and "replica_groups={}" not in attributes:
        raise ValueError(f"the groups of a collective cannot be read: {attributes[:200]}")
    return [tuple(range(devices))]  # without groups, all devices communicate


def _named_groups(axes: str, order: str | None, over: str, *, devices: int):
    """Groups written as axes of a mesh that the compiler defines: mesh['a'=2,'b'=8] {'b'}."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = _device_ids(order) if order else np.arange(devices)
    split: list[tuple[str, int]] = []
    wanted = []
    parts = dict.fromkeys(sizes)
    # A part of an axis is written 'a':(before)size.
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over):
        parts[name] = (int(before), int(size)) if size else (1, sizes[name])
        wanted.append(name)
    for name, size in sizes.items():
        part = parts[name]
        if part is None:
            split.append(("", size))
        else:
            before, taken = part
            split += [("", before), (name, taken), ("", size // before // taken)]
    grid = ids.reshape([size for _, size in split])
    inner = [i for i, (name, _) in enumerate(split) if name]
    outer = [i for i, (name, _) in enumerate(split) if not name]
    count = math.prod(split[i][1] for i in inner)
    return [tuple(row) for row in grid.transpose(outer + inner).reshape(-1, count).tolist()]


def _device_ids(text: str) -> np.ndarray:
    """Device order: [8,2]T(1,0) is arange(16), reshaped and transposed; 0,2,1,3 is a plain list."""
    counted = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$", text)
    if counted is None:
        return np.array(_integers(text))
    shape = _integers(counted[1])
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose(_integers(counted[2])) if counted[2] else ids).reshape(-1)


def _connected_groups(pairs: list[tuple[str, str]]) -> list[tuple[int, ...]]:
    """Groups of devices that are connected by (source, target) pairs."""
    group = {}
    for a, b in pairs:
        merged = group.get(int(a), {int(a)}) | group.get(int(b), {int(b)})
        for device in merged:
            group[device] = merged
    return sorted({tuple(sorted(members)) for members in group.values()})


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _axis(groups: list[tuple[int, ...]], mesh_shape: dict[str, int]) -> str:
    """The mesh axes whose groups are exactly these, joined by "+"; "" if there are none."""
    wide = [axis for axis, size in mesh_shape.items() if size > 1]
    ids = np.arange(math.prod(mesh_shape.values())).reshape(tuple(mesh_shape.values()))
    names = list(mesh_shape)
    wanted = {frozenset(group) for group in groups}
    for count in range(len(wide) + 1):
        for chosen in itertools.combinations(wide, count):
            inner = [names.index(axis) for axis in chosen]
            outer = [i for i in range(len(names)) if i not in inner]
            size = math.prod(mesh_shape[axis] for axis in chosen)
            rows = ids.transpose(outer + inner).reshape(-1, size).tolist()
            if {frozenset(row) for row in rows} == wanted:
                return "+".join(chosen)
    return ""


def to_json(collective: Collective) -> dict[str, Any]:
    """The collective as plain values for a JSON file."""
    return json.loads(
        json.dumps(
            {
                "kind": collective.kind,
                "axis": collective.axis,
                "count": collective.count,
                "bytes": collective.bytes,
                "dtypes": collective.dtypes,
                "group": collective.group,
            }
        )
    )
