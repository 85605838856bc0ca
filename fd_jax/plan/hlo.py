"""Reads the text of a compiled program: collectives, cycles, memory spaces, aliases.

Only what the text says is read. Loops count as often as the compiler knows they run; a computation
that is called from several places counts for each.
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

VMEM = 1  # memory space of a layout with S(1): on the chip, no HBM traffic

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
        """Without padding of the layout."""
        return -(-math.prod(self.dims) * _bits(self.dtype) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: as they are written there.
      shapes: of the result, a tuple flattened.
      operands: names of instructions of the same computation.
      attributes: the text after the operands.
      root: whether it is what the computation returns.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def rematerialized(self) -> bool:
        """Whether the compiler put it here of its own, to save memory."""
        return ".remat" in self.name

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it calls."""
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
    """An exchange between devices, as often as a step does it.

    Attributes:
      kind: such as "all-gather".
      axis: of the mesh, "data+fsdp" for two; "" where the groups follow no axis.
      shapes: of the whole arrays that one exchange is about: what a gather makes, what a reduction
        or scatter takes.
      group: number of devices that take part together.
      count: of executions in a step.
    """

    kind: str
    axis: str
    shapes: tuple[Shape, ...]
    group: int
    count: int

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Of the arrays, each once, sorted."""
        return tuple(sorted({shape.dtype for shape in self.shapes}))

    @property
    def bytes(self) -> int:
        """Of the arrays, over all executions."""
        return self.count * sum(shape.bytes for shape in self.shapes)

    @property
    def received(self) -> float:
        """Bytes that have to enter each device, whatever the algorithm."""
        share = (self.group - 1) / self.group
        if self.kind == "all-reduce":
            return 2 * share * self.bytes
        if self.kind.startswith("collective"):
            return float(self.bytes)
        return share * self.bytes


class Module:
    """A compiled program's text, parsed."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self._header = text[: text.index("\n")]
        current: list[Instruction] = []
        for line in text.splitlines():
            if not line.startswith(" "):
                found = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
                if found:
                    current = self.computations.setdefault(found[2], [])
                    self.entry = found[2] if found[1] else self.entry
            elif " = " in line:
                current.append(_instruction(line.strip()))
        if not self.entry:
            raise ValueError("the text holds no ENTRY computation: it is no compiled program")

    @property
    def times(self) -> dict[str, int]:
        """How often a step runs each computation, those inside fusions included.

        Of a conditional every branch counts.
        """
        return self._runs[0]

    @functools.cached_property
    def _runs(self) -> tuple[dict[str, int], dict[str, int]]:
        """Runs of each computation, and those of them that only repeat what was run before."""
        times: dict[str, int] = collections.Counter()
        repeats: dict[str, int] = collections.Counter()

        def visit(name: str, count: int, repeated: bool) -> None:
            times[name] += count
            repeats[name] += count if repeated else 0
            for instruction in self.computations[name]:
                inner = count * _trips(instruction) if instruction.opcode == "while" else count
                for called in instruction.called:
                    if called in self.computations and instruction.opcode not in (
                        "reduce",
                        "all-reduce",
                    ):
                        visit(called, inner, repeated or instruction.rematerialized)

        visit(self.entry, 1, False)
        return dict(times), dict(repeats)

    def matmul_flops(self) -> tuple[int, int]:
        """FLOPs of all matmuls and convolutions of a step, a multiply-add counts two.

        Unlike the compiler's count, these hold nothing but matmuls, and bodies of loops as often
        as they run.

        Returns:
          (of all, of those among them that the compiler repeats to save memory).
        """
        times, repeats = self._runs
        total = repeated = 0
        for name, instruction in self._running():
            if instruction.opcode in matmuls.OPCODES:
                shapes = [self._made[name][operand][0].dims for operand in instruction.operands]
                flops = matmuls.flops(
                    instruction.opcode, shapes, instruction.shapes[0].dims, instruction.attributes
                )
                total += times[name] * flops
                repeated += (times if instruction.rematerialized else repeats)[name] * flops
        return total, repeated

    @property
    def loops(self) -> list[int]:
        """Trip counts of the loops that hold matmuls and are known to run more than once.

        What the compiler counts once of these is wrong. Loops of random numbers, which end by
        chance, hold none.
        """
        found = (i for _, i in self._running() if i.opcode == "while")
        return [_trips(i) for i in found if _trips(i) > 1 and self._multiplies(i.called)]

    def _multiplies(self, names: Sequence[str]) -> bool:
        """Whether there is a matmul in these computations or in what they call."""
        return any(
            instruction.opcode in matmuls.OPCODES or self._multiplies(instruction.called)
            for name in names
            for instruction in self.computations.get(name, ())
        )

    def cycles(self) -> int:
        """Sum of the compiler's `estimated_cycles`: its estimate, run one after the other."""
        total = 0
        for name, instruction in self._scheduled():
            found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
            total += self.times[name] * int(found[1]) if found else 0
        return total

    def vmem_bytes(self) -> int:
        """Bytes of operands and results of scheduled instructions that live in VMEM.

        Counted once per loop body, as `cost_analysis` counts its "bytes accessed".
        """
        total = 0
        for name, instruction in self._scheduled():
            opcode = instruction.opcode
            if opcode in _NO_TRAFFIC or opcode.endswith("-done"):
                continue
            made = self._made[name]
            results = instruction.shapes[:1] if opcode.endswith("-start") else instruction.shapes
            operands = (shape for o in instruction.operands for shape in made.get(o, ()))
            total += sum(s.bytes for s in itertools.chain(results, operands) if s.space == VMEM)
        return total

    def collectives(self, mesh_shape: dict[str, int]) -> list[Collective]:
        """Every collective of a step; equal ones added up, largest first.

        Args:
          mesh_shape: size of each axis, in the order of the mesh.
        """
        seen: set[str] = set()
        found: dict[Any, int] = collections.Counter()
        for name, instruction in self._running():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in _COLLECTIVES:
                continue
            # A fused asynchronous collective appears in several computations, under one channel.
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            if channel and channel[1] in seen:
                continue
            if channel:
                seen.add(channel[1])
            groups = _groups(instruction.attributes, mesh_shape)
            shapes = self._subject(name, instruction)
            key = (kind, _axis(groups, mesh_shape), shapes, len(groups[0]))
            found[key] += self.times[name]
        made = [Collective(*key, count=count) for key, count in found.items()]
        return sorted(made, key=lambda collective: -collective.bytes)

    def aliased_parameters(self) -> set[int]:
        """Numbers of the inputs whose memory an output takes over."""
        start = self._header.find("input_output_alias={")
        if start < 0:
            return set()
        text = self._header[start:]
        return {int(n) for n in re.findall(r"\{[\d, ]*\}: \((\d+),", text)}

    def parameters(self) -> dict[int, Shape]:
        """The inputs of one device by number."""
        made = {}
        for instruction in self.computations[self.entry]:
            if instruction.opcode == "parameter":
                number = re.match(r"(\d+)\)", instruction.attributes)
                assert number is not None
                made[int(number[1])] = instruction.shapes[0]
        return made

    def stored_broadcasts(self) -> list[Shape]:
        """Arrays written to memory that only repeat a smaller one."""
        made = []
        for _, instruction in self._scheduled():
            if self._repeats(instruction):
                made += instruction.shapes
        return made

    def scheduled_shapes(self) -> set[Shape]:
        """Every array that a scheduled instruction writes."""
        return {s for _, i in self._scheduled() if i.opcode not in _NO_TRAFFIC for s in i.shapes}

    def _repeats(self, instruction: Instruction) -> bool:
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
    def _made(self) -> dict[str, dict[str, tuple[Shape, ...]]]:
        return {
            name: {i.name: i.shapes for i in instructions}
            for name, instructions in self.computations.items()
        }

    def _running(self) -> Iterator[tuple[str, Instruction]]:
        """(computation, instruction) of all that runs, also inside fusions."""
        for name in self.times:
            for instruction in self.computations[name]:
                yield name, instruction

    def _scheduled(self) -> Iterator[tuple[str, Instruction]]:
        """Instructions that are scheduled on their own: of the entry and of loops and calls."""
        names, waiting = [], [self.entry]
        while waiting:
            name = waiting.pop()
            names.append(name)
            for instruction in self.computations[name]:
                if instruction.opcode in ("while", "conditional", "call"):
                    waiting += [c for c in instruction.called if c not in names]
        for name in names:
            for instruction in self.computations[name]:
                yield name, instruction

    def _subject(self, name: str, instruction: Instruction) -> tuple[Shape, ...]:
        """The whole arrays a collective is about."""
        kind = instruction.opcode
        if kind.startswith("reduce-scatter"):
            made = self._made[name]
            shapes = [shape for o in instruction.operands for shape in made[o]]
        elif kind in ("all-gather-start", "collective-permute-start"):
            # (operands, results, ...): one half of what is no scalar
            arrays = [s for s in instruction.shapes if s.dims]
            shapes = arrays[len(instruction.operands) : 2 * len(instruction.operands)]
        else:
            shapes = list(instruction.shapes)
        return tuple(dataclasses.replace(shape, space=0) for shape in shapes)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.search(r"\d+", dtype)  # f32, bf16, u8, f8e4m3
    if found is None:
        raise ValueError(f"dtype {dtype!r} of a compiled program is not known")
    return int(found[0])


def _shapes(text: str) -> tuple[Shape, ...]:
    made = []
    for dtype, dims, layout in _SHAPE.findall(text):
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout or "")
        made.append(Shape(dtype, sizes, int(space[1]) if space else 0))
    return tuple(made)


def _instruction(line: str) -> Instruction:
    root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    type_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, arguments = rest[type_end:].lstrip().partition("(")
    # What is inside the brackets of an operand list has no brackets unbalanced.
    end = _closing("(" + arguments, 0) - 1
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments[:end]))
    attributes = arguments if opcode == "parameter" else arguments[end + 1 :]
    return Instruction(
        name.lstrip("%"), opcode, _shapes(rest[:type_end]), operands, attributes, root
    )


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced brackets: {text[:200]}")


def _trips(instruction: Instruction) -> int:
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes)
    return int(found[1]) if found else 1


def _groups(attributes: str, mesh_shape: dict[str, int]) -> list[tuple[int, ...]]:
    """The devices, by their position in the mesh, that take part together."""
    devices = math.prod(mesh_shape.values())
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    if pairs:
        return _chains(re.findall(r"\{(\d+),(\d+)", pairs[0]))
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
    written = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    if written:
        return [_integers(group) for group in re.findall(r"\{([\d,]+)\}", written[1])]
    if "replica_groups=" in attributes and "replica_groups={}" not in attributes:
        raise ValueError(f"groups of a collective cannot be read: {attributes[:200]}")
    return [tuple(range(devices))]  # no groups: all together


def _named_groups(axes: str, order: str | None, over: str, *, devices: int):
    """Groups that the compiler writes as axes of a mesh of its own: mesh['a'=2,'b'=8] {'b'}."""
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
    """An order of devices: [8,2]T(1,0) counts up, shaped and transposed; 0,2,1,3 is itself."""
    counted = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$", text)
    if counted is None:
        return np.array(_integers(text))
    shape = _integers(counted[1])
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose(_integers(counted[2])) if counted[2] else ids).reshape(-1)


def _chains(pairs: list[tuple[str, str]]) -> list[tuple[int, ...]]:
    """Devices connected by sending to one another."""
    group = {}
    for a, b in pairs:
        merged = group.get(int(a), {int(a)}) | group.get(int(b), {int(b)})
        for device in merged:
            group[device] = merged
    return sorted({tuple(sorted(members)) for members in group.values()})


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _axis(groups: list[tuple[int, ...]], mesh_shape: dict[str, int]) -> str:
    """The axes along which the members of the groups differ, if the groups are just that."""
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
    """Plain values, for a file."""
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
