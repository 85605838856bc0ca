"""What the value of a field has to be: the rules of which the tables of fields consist.

`settings` and `teacher_settings` have the tables of a config, and `models.architectures` that of a
network's description.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any, Protocol, get_args

import numpy as np

# Devices count in int32 and compute in float32.
LARGEST_WHOLE = 2**31 - 1
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).tiny)


class Rule(Protocol):
    """What the value of one field has to be."""

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, as the end of a line that begins with it; None if nothing."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Number:
    """A finite number within bounds. True and False are no numbers.

    A number that is not whole is compared as a float32, which is what devices hold: a decay of
    0.999999999 is 1 there, and 1e-60 is 0.

    Attributes:
      whole: whether it has to be a whole number.
      least, most: bounds that are allowed themselves, or None.
      above, below: bounds that are not allowed themselves, or None.
      special: a value outside of the bounds that is allowed, or None.
      unit: unit or meaning, which follows "a number" in messages.
      hint: what to do instead.
    """

    whole: bool = False
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    special: float | None = None
    unit: str = ""
    hint: str = ""

    def problem(self, value: Any) -> str | None:
        """See `Rule`."""
        kinds = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return self._expected(self.most)
        if value == self.special or self._allows(value):
            return None
        too_large = self.most is None and self._limit < abs(value) < math.inf
        return self._expected(self._limit if too_large else self.most)

    @property
    def _limit(self) -> float:
        """The largest value, which is that of its dtype if there is no bound."""
        if self.most is not None:
            return self.most
        return LARGEST_WHOLE if self.whole else LARGEST

    def _allows(self, value: float) -> bool:
        if not self.whole:
            if not abs(value) <= LARGEST:  # NaN and infinities too
                return False
            value = _as_float32(value)
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and value <= self._limit
        )

    def _expected(self, most: float | None) -> str:
        if self.least is not None and most is not None:
            bounds = f" from {self.least:.10g} to {most:.10g}"
        else:
            words = {"of at least": self.least, "above": self.above}
            words |= {"of at most": most, "below": self.below}
            named = [f"{word} {bound:.10g}" for word, bound in words.items() if bound is not None]
            bounds = f" {' and '.join(named)}" if named else ""
        kind = "a whole number" if self.whole else "a finite number"
        special = "" if self.special is None else f", or {self.special:g}"
        unit = f" ({self.unit})" if self.unit else ""
        hint = f"; {self.hint}" if self.hint else ""
        return f": expected {kind}{bounds}{special}{unit}{hint}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several names; `removed` maps names of earlier versions to what to write instead."""

    names: tuple[str, ...]
    removed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def problem(self, value: Any) -> str | None:
        """See `Rule`."""
        if isinstance(value, str) and value in self.names:
            return None
        if isinstance(value, str) and value in self.removed:
            return f" was removed, since {self.removed[value]}"
        return f" is unknown; expected one of {', '.join(map(repr, self.names))}"


@dataclasses.dataclass(frozen=True)
class Text:
    """A text; it may be empty if `optional`."""

    what: str
    optional: bool = False

    def problem(self, value: Any) -> str | None:
        """See `Rule`."""
        if isinstance(value, str) and (value.strip() or (self.optional and not value)):
            return None
        return f": expected {self.what}" + (", or '' for none" if self.optional else "")


class Flag:
    """True or False."""

    def problem(self, value: Any) -> str | None:
        """See `Rule`."""
        return None if isinstance(value, bool) else ": expected True or False"


@dataclasses.dataclass(frozen=True)
class Several:
    """A tuple or list of values that all follow one rule.

    Attributes:
      each: rule of the values.
      length: number of values; 0 for any number above 0.
      most: largest number of values; 0 for any.
      single: whether a value alone is allowed in place of the tuple.
      optional: whether there may be no value at all.
    """

    each: Rule
    length: int = 0
    most: int = 0
    single: bool = False
    optional: bool = False

    def problem(self, value: Any) -> str | None:
        """See `Rule`."""
        if self.single and not isinstance(value, tuple | list):
            return self.each.problem(value)
        if not isinstance(value, tuple | list) or not self._has_length(len(value)):
            number = self.length or (f"1 to {self.most}" if self.most else "one or more")
            none = ", or () for none" if self.optional else ""
            return f": expected {number} values in parentheses, such as (a, b){none}"
        problems = (self.each.problem(item) for item in value)
        return next((f"{problem}, for each value" for problem in problems if problem), None)

    def _has_length(self, length: int) -> bool:
        if self.length or (self.optional and not length):
            return length == self.length
        return 1 <= length <= (self.most or length)


@dataclasses.dataclass(frozen=True)
class Named:
    """A dict from texts to texts, such as the dtype of each tensor."""

    what: str

    def problem(self, value: Any) -> str | None:
        """See `Rule`."""
        texts = [*value.keys(), *value.values()] if isinstance(value, dict) else [None]
        return None if all(isinstance(text, str) for text in texts) else f": expected {self.what}"


@dataclasses.dataclass(frozen=True)
class OrNone:
    """A rule that None also follows."""

    rule: Rule

    def problem(self, value: Any) -> str | None:
        """See `Rule`."""
        problem = None if value is None else self.rule.problem(value)
        return problem and f"{problem}, or None"


@dataclasses.dataclass(frozen=True)
class Relation:
    """What has to hold between fields whose own values are allowed.

    Attributes:
      fields: fields that are compared; one that begins with a dot is a field of a teacher.
      holds: (value of each field) -> whether the values fit together.
      remedy: what is expected, and what to do.
      section: only configs with this section are checked; "" for all.
    """

    fields: tuple[str, ...]
    holds: Callable[..., bool]
    remedy: str
    section: str = ""


def whole(least: int, unit: str = "", *, most: int | None = None, **kwargs: Any) -> Number:
    """A whole number of at least `least`."""
    return Number(whole=True, least=least, most=most, unit=unit, **kwargs)


def choice(literal: Any, *more: str) -> Choice:
    """One of the names of a `Literal`, or of `more`."""
    return Choice((*more, *get_args(literal)))


FLAG = Flag()
DECAY = Number(least=0, below=1, unit="share that is kept at every step")
DROP_PATH = Number(least=0, below=1, unit="probability of dropping a branch; 0 is off")


def _as_float32(value: float) -> float:
    """The value that a device computes with; it takes the smallest numbers for 0."""
    held = float(np.float32(value))
    return held if abs(held) >= SMALLEST else 0.0
