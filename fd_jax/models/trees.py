"""Parts of nested dicts of parameters, by the paths of their leaves ("blocks/0/mlp/fc1/kernel")."""

from collections.abc import Callable
from typing import Any

from fd_jax.typing import PyTree


def paths(tree: PyTree, prefix: str = "") -> set[str]:
    """The paths of all leaves."""
    found: set[str] = set()
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found |= paths(value, f"{path}/") if isinstance(value, dict) else {path}
    return found


def chosen(tree: PyTree, wanted: Callable[[str], bool], prefix: str = "") -> PyTree:
    """The part of a tree whose paths are wanted; dicts of which nothing is left are left out."""
    part: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            if inner := chosen(value, wanted, f"{path}/"):
                part[name] = inner
        elif wanted(path):
            part[name] = value
    return part


def joined(one: PyTree, other: PyTree) -> PyTree:
    """The tree of which two trees are parts that have no leaf in common."""
    both = {**one, **other}
    for name in one.keys() & other.keys():
        both[name] = joined(one[name], other[name])
    return both
