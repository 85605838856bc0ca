"""What a class of another library can hold: its names, and the properties it takes for granted.

Every layout answers for itself whether it can hold a network, and what is in the way; `best` asks
several.
"""

from collections.abc import Callable, Iterable, Mapping, Set
import dataclasses
from typing import Any, TypeVar

from fd_jax.convert.rules.names import summarize
from fd_jax.convert.rules.tables import Table, target_paths
from fd_jax.errors import ConversionError
from fd_jax.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Need:
    """A property that a class of another library takes for granted.

    Attributes:
      words: the property, for people; completes "it asks for ...".
      holds: (spec, parameter paths) -> whether a network has it.
    """

    words: str
    holds: Callable[[ModelSpec, Set[str]], bool]


def need(words: str, holds: Callable[[Mapping[str, Any]], bool]) -> Need:
    """A need that the architecture alone decides."""
    return Need(words, lambda spec, paths: holds(spec.arch))


FINAL_NORM = need("a final norm", lambda arch: arch["final_norm"])
EXACT_GELU = need("the exact GELU", lambda arch: arch["activation"] == "gelu_erf")
EPSILON_1E6 = need("norm epsilon 1e-6", lambda arch: arch["norm_eps"] == 1e-6)
EPSILON_1E5 = need("norm epsilon 1e-5", lambda arch: arch["norm_eps"] == 1e-5)
EPSILON_1E6_OR_1E5 = need(
    "norm epsilon 1e-6 or 1e-5", lambda arch: arch["norm_eps"] in (1e-6, 1e-5)
)


@dataclasses.dataclass(frozen=True)
class Fit:
    """How far a layout holds one network.

    Attributes:
      table: the rules that concern this network.
      lacking: what the layout asks for and the network does not have.
      homeless: parameters of the encoder that the layout has no place for.
      left: parameters beside the encoder that are left behind.
    """

    table: Table
    lacking: list[str]
    homeless: list[str]
    left: list[str]

    @property
    def problems(self) -> int:
        """How much is in the way; 0 if the network can be written."""
        return len(self.lacking) + len(self.homeless)

    def describe(self) -> str:
        """The problems as the end of a sentence that begins with the layout's label."""
        parts = []
        if self.lacking:
            parts.append(f"asks for {', '.join(self.lacking)}, which this network does not have")
        if self.homeless:
            parts.append(f"has no place for {'; '.join(self.homeless)}")
        return ", and ".join(parts)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names that one class of another library gives to the parameters of a network.

    Attributes:
      class_name: the class, as its library calls it.
      network: the key of `models.spec.FAMILIES` whose networks it may hold.
      table: every rule of the class, also for parameters that a network may not have.
      needs: what the class always has; without it the library would make it up.
    """

    class_name: str
    network: str
    table: Table
    needs: tuple[Need, ...] = ()

    @property
    def label(self) -> str:
        """What errors call it."""
        return self.class_name

    def rules(self, spec: ModelSpec) -> Table:
        """The rules of the class for one network, also for parameters that it may not have."""
        del spec
        return self.table

    def own(self, spec: ModelSpec) -> bool:
        """Whether a network came from a file of this class, and so fits it best."""
        del spec
        return False

    def fit(self, spec: ModelSpec, paths: Set[str]) -> Fit:
        """Whether the layout holds a network, and what is in the way.

        Args:
          spec: of the network, one of the family `network`.
          paths: its parameters; those beside the encoder may be left behind.
        """
        table = held(self.rules(spec), spec, paths)
        rest = sorted(paths - target_paths(table, spec.arch))
        return Fit(
            table,
            [need.words for need in self.needs if not need.holds(spec, paths)],
            summarize([path for path in rest if path.startswith("encoder/")]),
            [path for path in rest if not path.startswith("encoder/")],
        )


def held(table: Table, spec: ModelSpec, paths: Set[str]) -> Table:
    """The rules of a table whose parameters a network has."""
    rules = (r for r in table.rules if target_paths(Table((r,)), spec.arch) <= paths)
    return dataclasses.replace(table, rules=tuple(rules))


AnyLayout = TypeVar("AnyLayout", bound=Layout)


def best(
    layouts: Iterable[AnyLayout], spec: ModelSpec, paths: Set[str], *, format: str
) -> tuple[AnyLayout, Fit]:
    """The layout that holds a network; of several, its own, or that which leaves the fewest behind.

    Args:
      layouts: to ask; those for other networks are passed over.
      spec: of the network.
      paths: its parameters.
      format: what the user typed, for errors.

    Raises:
      ConversionError: none holds it; the error names what is in the way of the nearest, those with
        the fewest problems.
    """
    asked = [layout for layout in layouts if layout.network == spec.family]
    fits = [(layout, layout.fit(spec, paths)) for layout in asked]
    if not fits:
        raise ConversionError(
            f"{format} has no class for networks of the family {spec.family!r}; export as "
            "safetensors instead"
        )
    layout, fit = min(fits, key=lambda pair: _rank(*pair, spec))
    if fit.problems:
        raise ConversionError(
            f"this network cannot be written as {format}: {_nearest(fits)}; export as safetensors "
            "instead"
        )
    return layout, fit


def _rank(layout: Layout, fit: Fit, spec: ModelSpec) -> tuple[int, bool, int]:
    return fit.problems, not layout.own(spec), len(fit.left)


def _nearest(fits: list[tuple[AnyLayout, Fit]]) -> str:
    """What is in the way of the layouts with the fewest problems; each kind once, three at most."""
    fewest = min(fit.problems for _, fit in fits)
    sentences: dict[str, str] = {}
    for layout, fit in fits:
        if fit.problems == fewest:
            sentences.setdefault(fit.describe(), f"{layout.label} {fit.describe()}")
    return "; or ".join(list(sentences.values())[:3])
