"""Parameters by "a/b" path and as nested dicts."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays of a nested dict by "a/b" path."""
    out = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            out.update(flat(value, f"{prefix}{name}/"))
        else:
            out[prefix + name] = value
    return out


def nested(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A nested dict of arrays by "a/b" path."""
    tree: dict[str, Any] = {}
    for path, array in items:
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return tree


def encoder(params: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The encoder of a flat dict of parameters, nested and in float32."""
    return nested(
        (path.removeprefix("encoder/"), np.asarray(array, np.float32))
        for path, array in params.items()
        if path.startswith("encoder/")
    )
