"""Tables of rules: which tensor of a file is which parameter, read in both directions.

A table is matched against a whole file at once. Every missing tensor, every leftover, every wrong
shape and dtype stands in one error; nothing is skipped because no rule names it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import fnmatch
import re
from typing import Any, NamedTuple

import numpy as np

from fd_jax.convert.containers.tensors import Tensor
from fd_jax.convert.rules.transforms import SAME, Shape, Transform
from fd_jax.errors import ConversionError

FLOATS = ("float32", "float16", "bfloat16")


class Place(NamedTuple):
    """A block: its stage (0 in a network without stages) and its number there."""

    stage: int = 0
    block: int = 0


Where = Callable[[Mapping[str, Any], Place], bool]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Tensors of the file <-> parameters of the model.

    Attributes:
      sources: tensor names in the file; "{i}" runs over the blocks. Where there are stages, "{s}"
        runs over them, "{b}" over the blocks of each, and "{s+1}" is the stage after "{s}".
      targets: parameter paths, such as "encoder/blocks/{i}/norm1/scale".
      transform: the layout change between them.
      optional: whether the file may lack all of the sources (a classifier head).
      where: (architecture, place) -> whether the rule holds there; None for everywhere.
    """

    sources: str | tuple[str, ...]
    targets: str | tuple[str, ...]
    transform: Transform = SAME
    optional: bool = False
    where: Where | None = None


@dataclasses.dataclass(frozen=True)
class Drop:
    """Tensors that are left behind, and why.

    Attributes:
      names: a glob over names in the file.
      why: for people.
      required: whether a file without any of them is of another kind.
    """

    names: str
    why: str
    required: bool = False


@dataclasses.dataclass(frozen=True)
class Derived:
    """A tensor that follows from the architecture: checked on import, computed on export.

    Attributes:
      name: tensor name in the file, with the placeholders of `Rule`.
      compute: (architecture, place) -> the array the file must hold.
      tolerance: relative; 0 for integers.
      optional: whether a file may lack it.
      where: as in `Rule`.
    """

    name: str
    compute: Callable[[Mapping[str, Any], Place], np.ndarray]
    tolerance: float = 0.0
    optional: bool = True
    where: Where | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """All rules of one layout."""

    rules: tuple[Rule, ...]
    drops: tuple[Drop, ...] = ()
    derived: tuple[Derived, ...] = ()

    def __add__(self, other: "Table") -> "Table":
        return Table(
            self.rules + other.rules, self.drops + other.drops, self.derived + other.derived
        )


@dataclasses.dataclass(frozen=True)
class Step:
    """One rule for one block, with the file's tensors it takes."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transform: Transform


@dataclasses.dataclass(frozen=True)
class Match:
    """A table matched against a file.

    Attributes:
      steps: what to convert, in table order.
      dropped: reason -> names of the tensors left behind for it.
      problems: what does not fit, one line each; empty for a file that fits.
      found: how many of the expected tensors are there with the right shape and dtype.
      expected: how many there should be.
    """

    steps: list[Step]
    dropped: dict[str, list[str]]
    problems: list[str]
    found: int
    expected: int


def instances(
    names: Sequence[str], arch: Mapping[str, Any], where: Where | None = None
) -> Iterator[tuple[Place, tuple[str, ...]]]:
    """The names at every place that their placeholders run over, or once where there are none."""
    text = "".join(names)
    places: Iterable[Place] = (Place(),)
    if "{i}" in text:
        places = (Place(0, block) for block in range(arch["depth"]))
    elif "{b}" in text:
        depths = enumerate(arch["depths"])
        places = (Place(stage, block) for stage, count in depths for block in range(count))
    elif "{s" in text:
        places = (Place(stage) for stage in range(len(arch["depths"])))
    for place in places:
        if where is None or where(arch, place):
            yield place, tuple(_at(name, place) for name in names)


def _at(name: str, place: Place) -> str:
    numbers = {"i": place.block, "b": place.block, "s": place.stage, "s+1": place.stage + 1}
    return re.sub(r"\{(i|b|s|s\+1)\}", lambda found: str(numbers[found[1]]), name)


def as_glob(name: str) -> str:
    """A name with its placeholders as stars."""
    return re.sub(r"\{(i|b|s|s\+1)\}", "*", name)


def prefixed(table: Table, prefix: str) -> Table:
    """The same table for names that all begin with a prefix."""

    def named(names):
        return prefix + names if isinstance(names, str) else tuple(prefix + name for name in names)

    return Table(
        tuple(dataclasses.replace(r, sources=named(r.sources)) for r in table.rules),
        tuple(dataclasses.replace(d, names=named(d.names)) for d in table.drops),
        tuple(dataclasses.replace(d, name=named(d.name)) for d in table.derived),
    )


def match(
    table: Table,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
    arch: Mapping[str, Any],
) -> Match:
    """Matches a table against the tensors of a file, without reading any values but derived ones.

    Args:
      table: rules of the source.
      tensors: by name, prefixes already stripped.
      shapes: of every parameter the model may have, by path. A size may be a letter: the file
        decides it, and the same letter means the same size everywhere.
      arch: the architecture keywords.
    """
    steps, problems, claimed, filled = [], [], set(), set()
    letters: dict[str, int] = {}
    found = expected = 0
    for step, optional in _steps(table, arch):
        claimed.update(step.sources)
        if optional and not any(name in tensors for name in step.sources):
            continue
        expected += len(step.sources)
        wrong = list(_mismatches(step, tensors, shapes, letters))
        found += len(step.sources) - len(wrong)
        problems += wrong
        filled.update(step.targets)
        steps.append(step)
    problems += _check_derived(table, tensors, arch, claimed)
    # Not the file's fault: the table does not cover the model.
    encoder = {path for path in shapes if path.startswith("encoder/")}
    problems += [f"no rule fills the parameter {path}" for path in sorted(encoder - filled)]
    dropped: dict[str, list[str]] = {}
    leftover = []
    for name in tensors:
        if name not in claimed:
            reason = _drop_reason(table, name)
            dropped.setdefault(reason, []).append(name) if reason else leftover.append(name)
    problems += [f"unexpected {line}" for line in summarize(leftover)]
    problems += [
        f"missing {drop.names}, {drop.why}"
        for drop in table.drops
        if drop.required and not fnmatch.filter(tensors, drop.names)
    ]
    return Match(steps, dropped, problems, found, expected)


def convert(
    found: Match, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Runs a match: yields (parameter path, what makes its array in the file's dtype)."""
    for step in found.steps:
        for index, path in enumerate(step.targets):

            def load(step=step, index=index):
                sources = (tensors[name].load() for name in step.sources)
                return step.transform.forward(*sources)[index]

            yield path, load


def invert(
    table: Table, params: Mapping[str, np.ndarray], arch: Mapping[str, Any], *, derived: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads a table from right to left: yields (name in the file, array).

    Args:
      table: rules of the layout to write.
      params: by path; parts that no rule of the table names are the caller's business.
      arch: the architecture keywords.
      derived: whether tensors that follow from the architecture are written too.

    Raises:
      ConversionError: the layout needs parameters that the model does not have.
    """
    missing = []
    for step, optional in _steps(table, arch):
        absent = [path for path in step.targets if path not in params]
        if absent:
            missing += [] if optional else absent
            continue
        arrays = step.transform.inverse(*(params[path] for path in step.targets))
        yield from zip(step.sources, arrays, strict=True)
    if missing:
        raise ConversionError(
            "this model lacks what the layout needs: " + "; ".join(summarize(missing))
        )
    if derived:
        for item in table.derived:
            for place, (name,) in instances((item.name,), arch, item.where):
                yield name, item.compute(arch, place)


def depth(arch: Mapping[str, Any]) -> int:
    """Blocks of a network, those of all stages where it has stages."""
    return arch["depth"] if "depth" in arch else sum(arch["depths"])


def target_paths(table: Table, arch: Mapping[str, Any]) -> set[str]:
    """Every parameter path the table reads and writes."""
    return {path for step, _ in _steps(table, arch) for path in step.targets}


def missing_paths(rule: Rule, paths: set[str], arch: Mapping[str, Any]) -> set[str]:
    """What a rule would fill that is not among the paths."""
    return target_paths(Table((rule,)), arch) - paths


def required_names(table: Table, arch: Mapping[str, Any]) -> set[str]:
    """Every name a file must have."""
    return {name for step, optional in _steps(table, arch) if not optional for name in step.sources}


def collapse(name: str) -> str:
    """A name with block numbers as stars."""
    return re.sub(r"(?<![^./])\d+(?![^./])|(?<=block_)\d+", "*", name)


def summarize(names: Sequence[str]) -> list[str]:
    """Names with block numbers collapsed: one line per kind, "blocks.*.norm1.weight (12)"."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(collapse(name), []).append(name)
    return [
        group[0] if len(group) == 1 else f"{kind} ({len(group)})" for kind, group in kinds.items()
    ]


def _steps(table: Table, arch: Mapping[str, Any]) -> Iterator[tuple[Step, bool]]:
    for rule in table.rules:
        sources, targets = as_tuple(rule.sources), as_tuple(rule.targets)
        for _, names in instances(sources + targets, arch, rule.where):
            split = len(sources)
            yield Step(names[:split], names[split:], rule.transform), rule.optional


def as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    """One name or several as several."""
    return (names,) if isinstance(names, str) else names


def _mismatches(
    step: Step, tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], letters: dict[str, int]
) -> Iterator[str]:
    wanted = step.transform.source_shapes(*(shapes[path] for path in step.targets))
    for name, shape in zip(step.sources, wanted, strict=True):
        tensor = tensors.get(name)
        if tensor is None:
            yield f"missing {name} {_show(shape)}"
        elif not _same_shape(tensor.shape, shape, letters):
            yield f"{name} has shape {_show(tensor.shape)}, expected {_show(shape)}"
        elif tensor.dtype not in FLOATS:
            yield f"{name} has dtype {tensor.dtype}, expected one of {', '.join(FLOATS)}"


def _same_shape(found: tuple[int, ...], wanted: Shape, letters: dict[str, int]) -> bool:
    if len(found) != len(wanted):
        return False
    return all(
        size == (letters.setdefault(want, size) if isinstance(want, str) else want)
        for size, want in zip(found, wanted, strict=True)
    )


def _show(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _check_derived(
    table: Table, tensors: Mapping[str, Tensor], arch: Mapping[str, Any], claimed: set[str]
) -> Iterator[str]:
    for item in table.derived:
        for place, (name,) in instances((item.name,), arch, item.where):
            wanted = item.compute(arch, place)
            claimed.add(name)
            tensor = tensors.get(name)
            if tensor is None:
                if not item.optional:
                    yield f"missing {name} {_show(wanted.shape)}"
            elif tensor.shape != wanted.shape:
                yield f"{name} has shape {_show(tensor.shape)}, expected {_show(wanted.shape)}"
            elif not np.allclose(tensor.load(), wanted, rtol=item.tolerance, atol=0):
                yield f"{name} does not hold the values that follow from the architecture"


def _drop_reason(table: Table, name: str) -> str | None:
    return next((d.why for d in table.drops if fnmatch.fnmatchcase(name, d.names)), None)
