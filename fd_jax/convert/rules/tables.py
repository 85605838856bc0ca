"""Tables of rules: which tensor of a file is which parameter of the model.

A file has *names*, the model has *paths*. `matching.py` reads a table from left to right against a
whole file and from right to left against a model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import re
from typing import Any, NamedTuple

import numpy as np

from fd_jax.convert.rules.transforms import CONV, LINEAR, SAME, Transform

_PLACEHOLDER = re.compile(r"\{(i|b|s|s\+1)\}")


class Place(NamedTuple):
    """A block: its stage (0 in a network without stages) and its number there."""

    stage: int = 0
    block: int = 0


Where = Callable[[Mapping[str, Any], Place], bool]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Tensors of the file <-> parameters of the model.

    Attributes:
      names: of tensors in the file; "{i}" runs over the blocks. In a network with stages, "{s}"
        runs over the stages, "{b}" over the blocks of each, and "{s+1}" is the stage after "{s}".
      paths: of parameters, such as "encoder/blocks/{i}/norm1/scale".
      transform: the layout change between them.
      optional: whether the file may lack all of the tensors (a classifier head).
      where: (architecture, place) -> whether the rule holds there; None for everywhere.
    """

    names: str | tuple[str, ...]
    paths: str | tuple[str, ...]
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
      name: of the tensor in the file, with the placeholders of `Rule`.
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
    """All rules for the names of one kind of file."""

    rules: tuple[Rule, ...]
    drops: tuple[Drop, ...] = ()
    derived: tuple[Derived, ...] = ()

    def __add__(self, other: "Table") -> "Table":
        return Table(
            self.rules + other.rules, self.drops + other.drops, self.derived + other.derived
        )


@dataclasses.dataclass(frozen=True)
class Step:
    """One rule at one place: names and paths without placeholders."""

    names: tuple[str, ...]
    paths: tuple[str, ...]
    transform: Transform


def steps(table: Table, arch: Mapping[str, Any]) -> Iterator[tuple[Step, bool]]:
    """Every rule at every place it holds, in table order, and whether it is optional."""
    for rule in table.rules:
        names, paths = as_tuple(rule.names), as_tuple(rule.paths)
        for _, found in instances(names + paths, arch, rule.where):
            yield Step(found[: len(names)], found[len(names) :], rule.transform), rule.optional


def instances(
    names: Sequence[str], arch: Mapping[str, Any], where: Where | None = None
) -> Iterator[tuple[Place, tuple[str, ...]]]:
    """The names at every place that their placeholders run over, or once if they have none."""
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
    return _PLACEHOLDER.sub(lambda found: str(numbers[found[1]]), name)


def as_glob(name: str) -> str:
    """A name with its placeholders as stars."""
    return _PLACEHOLDER.sub("*", name)


def as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    """One name as a tuple of one; several as they are."""
    return (names,) if isinstance(names, str) else names


def prefixed(table: Table, prefix: str) -> Table:
    """The same table for names that all begin with a prefix."""
    return _with_names(table, lambda name: prefix + name)


def renamed(table: Table, words: Mapping[str, str]) -> Table:
    """The same table for names in which other words stand for some, which are replaced in order."""

    def replaced(name: str) -> str:
        for word, other in words.items():
            name = name.replace(word, other)
        return name

    return _with_names(table, replaced)


def _with_names(table: Table, change: Callable[[str], str]) -> Table:
    def changed(names: str | tuple[str, ...]) -> Any:
        return change(names) if isinstance(names, str) else tuple(map(change, names))

    return Table(
        tuple(dataclasses.replace(r, names=changed(r.names)) for r in table.rules),
        tuple(dataclasses.replace(d, names=changed(d.names)) for d in table.drops),
        tuple(dataclasses.replace(d, name=changed(d.name)) for d in table.derived),
    )


def only_where(rules: Iterable[Rule], where: Where) -> tuple[Rule, ...]:
    """The same rules, each for some places only."""
    return tuple(dataclasses.replace(rule, where=where) for rule in rules)


def optional(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The same rules, for networks that may lack what they read."""
    return tuple(dataclasses.replace(rule, optional=True) for rule in rules)


def sometimes(rules: Iterable[Rule], words: Iterable[str]) -> tuple[Rule, ...]:
    """The same rules, of which those with one of the words in their names are optional."""
    known = tuple(words)
    return tuple(
        dataclasses.replace(rule, optional=any(word in str(rule.names) for word in known))
        for rule in rules
    )


def target_paths(table: Table, arch: Mapping[str, Any]) -> set[str]:
    """Every parameter path the table reads and writes."""
    return {path for step, _ in steps(table, arch) for path in step.paths}


def required_names(table: Table, arch: Mapping[str, Any]) -> set[str]:
    """Every name a file must have."""
    return {name for step, optional in steps(table, arch) if not optional for name in step.names}


def linear(name: str, path: str) -> tuple[Rule, Rule]:
    """Rules of a torch Linear with bias."""
    return (
        Rule(f"{name}.weight", f"{path}/kernel", LINEAR),
        Rule(f"{name}.bias", f"{path}/bias"),
    )


def conv(name: str, path: str) -> tuple[Rule, Rule]:
    """Rules of a torch Conv2d with bias."""
    return (
        Rule(f"{name}.weight", f"{path}/kernel", CONV),
        Rule(f"{name}.bias", f"{path}/bias"),
    )


def norm(name: str, path: str) -> tuple[Rule, Rule]:
    """Rules of a torch LayerNorm."""
    return (
        Rule(f"{name}.weight", f"{path}/scale"),
        Rule(f"{name}.bias", f"{path}/bias"),
    )
