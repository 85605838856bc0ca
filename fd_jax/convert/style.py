"""A naming style: what one library calls the tensors of one kind of network, whatever its size.

A style has the table of all rules for its names, read in both directions: imports narrow it to
what is in a file, exports to what is in a network. Everything else that is known of a network is a
fact (`facts.py`): told by shapes, by files beside the weights, or by the tables of published
networks.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import fnmatch
import functools
import math
import re
from typing import Any

import numpy as np

from fd_jax.convert.containers.tensors import Container, Tensor, damaged
from fd_jax.convert.rules.tables import Rule, Table, as_tuple
from fd_jax.convert.source import unstacked
from fd_jax.errors import ConversionError

ParameterShapes = Mapping[str, tuple[int, ...]]
_PLACEHOLDERS = re.compile(r"\\\{(i|b|s|s\\\+1)\\\}")
_MOST_BLOCKS = 1000
_MOST_NUMBERS = 2**31  # in a tensor of a network
# Begins the names, in tables, of what is beside a network in a larger model of the same library.
OUTER = "../"
_NO_NORM = " (if the network ends without a norm, state it: --fact=final_norm=no)"


def variant_name(*words: str) -> str:
    """The name of a variant with several properties; "" for the plain one."""
    return "+".join(filter(None, words))


def _only_table(tensors: Mapping[str, Tensor]) -> str:
    del tensors
    return ""


def _nothing(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    del tensors
    return {}


@dataclasses.dataclass(frozen=True)
class Style:
    """The names that a library gives to the tensors of one kind of network.

    Attributes:
      name: what the user types for the source.
      writer: whose names they are, for people: "timm's VisionTransformer".
      network: the key of `models.spec.FAMILIES` whose networks have these names.
      tables: the rules, under the name of the variant: packing of a gated MLP, rows of the
        position table. Rules are optional where networks of the style may lack them.
      marks: names that every file of the style has, with the numbers of first blocks.
      unlike: globs of names; a file with one of them is of another style.
      one_of: groups of names of which a network has at least one.
      norms: names of which a network has at least one, unless it is said to have no final norm.
      bases: what the library puts before the names in a larger model, such as "vision_model.".
      pick: (tensors by name) -> the variant that a file has.
      code: (tensors by name) -> facts that the library's code has for every such network.
      asks: facts beyond those of its network class that its tensors leave open.
      configs: values of `model_type` in the config.json of transformers' models of this style.
      unstack: prefix of tensors whose leading axis is the block number, see `source.unstacked`.
      renames: (pattern, replacement) of names that are called otherwise in memory than in files.
    """

    name: str
    writer: str
    network: str
    tables: Mapping[str, Table]
    marks: tuple[str, ...]
    unlike: tuple[str, ...] = ()
    one_of: tuple[tuple[str, ...], ...] = ()
    norms: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    pick: Callable[[Mapping[str, Tensor]], str] = _only_table
    code: Callable[[Mapping[str, Tensor]], dict[str, Any]] = _nothing
    asks: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()
    unstack: str | None = None
    renames: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Recognized:
    """One network in a file, recognised by its names.

    Attributes:
      style: whose names it has.
      prefix: what stands before them in the file, such as "teacher/module.backbone.".
      tensors: those of the network, by name without the prefix; those beside it in the same model
        begin with "../".
      variant: key of the style's tables.
      table: its rules, narrowed to the names of the file.
      beside: names of all other tensors.
    """

    style: Style
    prefix: str
    tensors: Mapping[str, Tensor]
    variant: str
    table: Table
    beside: tuple[str, ...]

    @property
    def source(self) -> str:
        """How the style and the variant stand in `ModelSpec.source`."""
        return f"{self.style.name}:{self.variant}" if self.variant else self.style.name

    @functools.cached_property
    def claimed(self) -> float:
        """Which share of the tensors the rules name."""
        return sum(_claims(self.table, name) for name in self.tensors) / len(self.tensors)

    def lacks(self, *, final_norm: bool) -> list[str]:
        """What every network of the style has and this one does not, one line each.

        Args:
          final_norm: whether it should have a norm at the end.
        """
        groups = [*self.style.one_of, *([self.style.norms] if final_norm else [])]
        return [
            f"missing {' or '.join(names)}{_NO_NORM if names is self.style.norms else ''}"
            for names in groups
            if names and not any(name in self.tensors for name in names)
        ]


def recognized(style: Style, container: Container) -> list[Recognized]:
    """The networks of a style in a file, one for each prefix under which its marks are.

    Raises:
      ConversionError: its tensors have shapes that no network of the style has.
    """
    found = list(_recognized(style, container.tensors))
    if not style.renames:
        return found
    renamed = {_renamed(style, name): tensor for name, tensor in container.tensors.items()}
    # Names in memory may begin with what stands before a network in a file, so that a part of them
    # looks like one: the reading counts that makes sense of more tensors.
    return max((found, list(_recognized(style, renamed))), key=_explained)


def _explained(found: list["Recognized"]) -> float:
    return sum(network.claimed * len(network.tensors) for network in found)


def _recognized(style: Style, names: Mapping[str, Tensor]) -> Iterator[Recognized]:
    for prefix in _prefixes(style.marks, names):
        tensors, beside = _under(prefix, style.bases, names)
        if style.unstack is not None:
            tensors = unstacked(tensors, style.unstack)
        if any(fnmatch.filter(tensors, pattern) for pattern in style.unlike):
            continue
        variant = _variant(style, tensors)
        table = narrowed(style.tables[variant], tensors)
        yield Recognized(style, prefix, tensors, variant, table, tuple(beside))


def _variant(style: Style, tensors: Mapping[str, Tensor]) -> str:
    try:
        return style.pick(tensors)
    except (LookupError, TypeError, ValueError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(
            f"it has the names of {style.writer}, and tensors with shapes that none has ({error})"
        ) from error


def _renamed(style: Style, name: str) -> str:
    for pattern, replacement in style.renames:
        name = re.sub(pattern, replacement, name)
    return name


def _prefixes(marks: tuple[str, ...], names: Mapping[str, Tensor]) -> list[str]:
    """What stands before all of the marks; the longest levels of nesting last."""
    first, *others = marks
    found = [name.removesuffix(first) for name in names if name.endswith(first)]
    whole = (p for p in found if not p or p[-1] in "./")
    return sorted({p for p in whole if all(f"{p}{mark}" in names for mark in others)}, key=len)


def _under(
    prefix: str, bases: tuple[str, ...], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under a prefix, those of the model around it as "../name", and other names."""
    base = next((base for base in bases if base and prefix.endswith(base)), "")
    outer = prefix.removesuffix(base)
    chosen: dict[str, Tensor] = {}
    beside = []
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            chosen[name.removeprefix(prefix)] = tensor
        elif base and name.startswith(outer):
            chosen[OUTER + name.removeprefix(outer)] = tensor
        else:
            beside.append(tensor.name)
    return chosen, beside


def narrowed(table: Table, names: Mapping[str, Any]) -> Table:
    """The rules that concern a file: of the optional ones, those of which any name is there."""

    def concerns(rule: Rule) -> bool:
        return not rule.optional or any(_places(name, names) for name in as_tuple(rule.names))

    def required(rule: Rule) -> Rule:
        return dataclasses.replace(rule, optional=False)

    rules = tuple(required(rule) for rule in table.rules if concerns(rule))
    return dataclasses.replace(table, rules=rules)


def _claims(table: Table, name: str) -> bool:
    named = (n for rule in table.rules for n in as_tuple(rule.names))
    if any(_pattern(template).fullmatch(name) for template in named):
        return True
    if any(_pattern(item.name).fullmatch(name) for item in table.derived):
        return True
    return any(fnmatch.fnmatchcase(name, drop.names) for drop in table.drops)


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(_PLACEHOLDERS.sub(r"(\\d{1,9})", re.escape(template)))


def _places(template: str, names: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The numbers at a name's placeholders, for every name in a file that has its form."""
    if "{" not in template:
        return [()] if template in names else []
    matches = filter(None, map(_pattern(template).fullmatch, names))
    return [tuple(map(int, found.groups())) for found in matches]


def depths(table: Table, names: Mapping[str, Any]) -> list[int]:
    """Blocks of each stage, as the largest numbers in the names say.

    A network without stages has one entry; [] where no name has a number.

    Raises:
      ConversionError: there are more than any network has.
    """
    counts: dict[int, int] = {}
    for rule in table.rules:
        for template in as_tuple(rule.names):
            if "{i}" not in template and "{b}" not in template:
                continue
            first = 1 if "{s+1}" in template else 0  # the number of the first stage in the name
            for place in _places(template, names):
                stage, block = (place[0] - first, place[1]) if len(place) == 2 else (0, place[0])
                counts[stage] = max(counts.get(stage, 0), block + 1)
    if max([*counts, *counts.values()], default=0) > _MOST_BLOCKS:
        raise ConversionError(f"blocks or stages are numbered beyond {_MOST_BLOCKS}")
    return [counts.get(stage, 0) for stage in range(max(counts, default=-1) + 1)]


def parameter_shapes(network: Recognized, container: Container) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that the first block of each stage and all else in a file makes.

    Returns:
      Shape by path, with the number of the block, 0, in it.

    Raises:
      ConversionError: a tensor claims to be larger than any of a network.
    """
    found = {}
    for rule in network.table.rules:
        for place in _first_places(rule, network.tensors):
            tensors = [network.tensors.get(_at(name, place)) for name in as_tuple(rule.names)]
            if None in tensors:
                continue
            arrays = [_hollow(container, tensor) for tensor in tensors if tensor is not None]
            try:
                made = rule.transform.forward(*arrays)
            except (ValueError, IndexError):  # another number of axes: the match names the tensor
                continue
            paths = (_at(path, place) for path in as_tuple(rule.paths))
            found |= {path: array.shape for path, array in zip(paths, made, strict=True)}
    return found


def _first_places(rule: Rule, names: Mapping[str, Any]) -> list[dict[str, int]]:
    """The places of a rule in the first block of every stage, as values of its placeholders."""
    template = as_tuple(rule.names)[0]
    keys = [key.replace("\\", "") for key in _PLACEHOLDERS.findall(re.escape(template))]
    places = [dict(zip(keys, place, strict=True)) for place in _places(template, names)]
    first = [place for place in places if not place.get("i", 0) and not place.get("b", 0)]
    return [{**p, "s": p.get("s", p.get("s+1", 0) - 1)} if "s+1" in p else p for p in first]


def _at(template: str, place: Mapping[str, int]) -> str:
    for key, number in place.items():
        template = template.replace(f"{{{key}}}", str(number))
    return template


def _hollow(container: Container, tensor: Tensor) -> np.ndarray:
    """An array of a tensor's shape without its values, which takes no memory."""
    if math.prod(tensor.shape) > _MOST_NUMBERS:
        raise damaged(container.path, f"tensor {tensor.name!r} has the shape {list(tensor.shape)}")
    return np.broadcast_to(np.zeros((), np.int8), tensor.shape)
