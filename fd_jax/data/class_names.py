"""Which class of a dataset is which class of another one, or of a classifier head: by name.

A label is a position, and means nothing outside of the place that it comes from: in a folder that
lacks one of the classes, all that follow have other positions.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Literal
import unicodedata

from fd_jax.console import say
from fd_jax.errors import DataError, first_few, printable

Match = Literal["name", "number"]


@dataclasses.dataclass(frozen=True)
class Classes:
    """Classes that are counted from 0.

    Attributes:
      where: what has these classes, for messages.
      count: number of classes.
      names: name of each class, "" for an output of a head that no class was trained on; None if
        they have numbers only.
    """

    where: str
    count: int
    names: Sequence[str] | None = None


def numbering(found: Classes, wanted: Classes, *, match: Match = "name") -> tuple[int, ...]:
    """The number that each class of `found` has among those of `wanted`.

    Without names on a side, the k-th class is class k, unless the names of the other side are
    numbers themselves. A note says so where names could have been compared.

    Args:
      found: classes of a dataset.
      wanted: classes that give the numbers: those of a head, or of the training split.
      match: "number" takes the k-th class for class k whatever the names, for names that are in
        other words.

    Raises:
      DataError: `found` has a class that `wanted` has not, or it has another number of classes and
        no names that say which they are.
    """
    if match == "number" and found.count <= wanted.count:
        return tuple(range(found.count))
    if match == "number" or not _have_names(found, wanted):
        return _in_order(found, wanted)
    if _same_names(found, wanted):  # also where two classes have one name
        return tuple(range(found.count))
    names, known = _names(found), _positions(wanted)
    _check_known(found, wanted, names, known)
    return tuple(known[_normal(name)][0] for name in names)


def _names(classes: Classes) -> Sequence[str]:
    """The names, which are the numbers where there are none."""
    return [str(k) for k in range(classes.count)] if classes.names is None else classes.names


def _have_names(found: Classes, wanted: Classes) -> bool:
    """Whether both sides have names, or those of the one are numbers of the other."""
    with_names = [classes for classes in (found, wanted) if classes.names is not None]
    if len(with_names) == 1:
        return set(_names(found)) <= set(_names(wanted))
    return bool(with_names)


def _same_names(found: Classes, wanted: Classes) -> bool:
    """Whether both sides have the same names in the same order."""
    ours, theirs = ([_normal(name) for name in _names(side)] for side in (found, wanted))
    return ours == theirs


def _positions(classes: Classes) -> Mapping[str, Sequence[int]]:
    """The numbers of the classes of each name, of which there should be one."""
    positions: dict[str, list[int]] = {}
    for position, name in enumerate(_names(classes)):
        if name:
            positions.setdefault(_normal(name), []).append(position)
    return positions


def _check_known(
    found: Classes, wanted: Classes, names: Sequence[str], known: Mapping[str, Sequence[int]]
) -> None:
    unknown = [name for name in names if _normal(name) not in known]
    if unknown:
        raise DataError(
            f"{found.where} has {_listed(unknown)}, which {wanted.where} has not: its classes are "
            f"{_listed([name for name in _names(wanted) if name])}. Remove or "
            "rename what it does not know. If both mean the same classes in the same order and "
            "name them in other words, set match_classes to 'number'"
        )
    several = [name for name in names if len(known[_normal(name)]) > 1]
    if several:
        raise DataError(
            f"{wanted.where} calls the classes {known[_normal(several[0])]} "
            f"{_listed(several[:1])}, so that the one of {found.where} can be any of them; give "
            "them names of their own, or set match_classes to 'number' if both have the same order"
        )


def _in_order(found: Classes, wanted: Classes) -> tuple[int, ...]:
    """The k-th class is class k, where there are as many; a note names the side without names."""
    if found.count != wanted.count:
        hint = "or set match_classes to 'number' if these are the first of them in the same order"
        raise DataError(
            f"{found.where} has {found.count} classes, but {wanted.where} has {wanted.count}, and "
            "they are not compared by name, for which both need names; use data with the same "
            f"classes{f', {hint}' if found.count < wanted.count else ''}"
        )
    for named, nameless in ((found, wanted), (wanted, found)):
        if named.names and not nameless.names:
            say(
                f"note: {nameless.where} has no names of its {nameless.count} classes, so class 0 "
                f"counts as {_listed(named.names[:1])} of {named.where}, and so on in the order of "
                "its names"
            )
    return tuple(range(found.count))


def _normal(name: str) -> str:
    """The form in which names are compared: file systems store accents in two ways."""
    return unicodedata.normalize("NFC", name)


def _listed(names: Sequence[str]) -> str:
    """The first names, for a message."""
    return first_few([f"'{printable(name)}'" for name in names], 10)
