"""The numbers behind the figures of a report, as short tables."""

from collections.abc import Iterator, Mapping, Sequence
import itertools
import shlex
from typing import Any, NamedTuple

import numpy as np

Record = Mapping[str, Any]


class Table(NamedTuple):
    """Text by row and column.

    Attributes:
      head: headings of the columns.
      rows: as many cells as there are headings; the first is the heading of the row.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def settings(record: Record) -> Table:
    """How the record was measured."""
    entries = {
        "command": shlex.join(record.get("command", [])),
        "data": record.get("data"),
        "images": record.get("images"),
        "image size": record.get("image_size"),
        **record.get("settings", {}),
        "picture": record.get("picture", {}).get("name"),
    }
    return Table(
        ("setting", "value"),
        [
            (name, _text(value))
            for name, value in entries.items()
            if value is not None and value != ""
        ],
    )


def models(record: Record) -> Table:
    """What is known about each model, a column for each."""
    labels = {"prefix": "class token and registers", "patch": "patch (pixels)"}
    keys = ("family", "source", "layers", "heads", "grid", "patch", "prefix", "window")
    abouts = [model["about"] for model in record["models"].values()]
    rows = [
        (labels.get(key, key), *(_by_layer(about.get(key)) for about in abouts)) for key in keys
    ]
    return Table(("", *record["models"]), rows)


def numbers(record: Record, figure: str) -> Table | None:
    """The numbers of a figure by layer; None for figures that are images."""
    if figure == "landscape":
        return _landscape(record)
    columns = dict(_columns(record, figure))
    if not columns:
        return None
    layers = max(len(values) for values in columns.values())
    rows = [
        (str(layer), *(_number(values, layer) for values in columns.values()))
        for layer in range(layers)
    ]
    return Table(("layer", *columns), rows)


def _columns(record: Record, figure: str) -> Iterator[tuple[str, Sequence[Any]]]:
    if figure in ("cka", "cosine"):
        for pair in record.get("pairs", []):
            if figure in pair:
                yield " and ".join(pair["models"]), pair[figure]
        return
    for name, model in record["models"].items():
        if figure not in model:
            continue
        if figure in ("similarity", "divergence", "rank"):
            yield name, model[figure]
        if figure == "shares":
            yield f"{name}: offset", model["shares"]["offset"]
            yield f"{name}: key", model["shares"]["key"]
        if figure in ("distance", "entropy"):
            heads = [np.array(values, dtype=float) for values in model[figure]]
            yield f"{name}: mean", [values.mean() for values in heads]
            yield f"{name}: spread", [values.std() for values in heads]
        if figure == "distance" and model["about"]["prefix"]:
            dropped = [np.array(values, dtype=float).mean() for values in model["dropped"]]
            yield f"{name}: share dropped", dropped


def _landscape(record: Record) -> Table:
    """Each model's own loss and accuracy, and their means at both ends of the directions."""
    head = ("model", "position", "mean cross entropy", "mean top-1 accuracy")
    rows = []
    for name, model in record["models"].items():
        if "landscape" not in model:
            continue
        curves = model["landscape"]
        position = np.array(curves["position"])
        loss = np.array(curves["loss"], dtype=float).mean(axis=0)
        accuracy = np.array(curves["accuracy"], dtype=float).mean(axis=0)
        for point in dict.fromkeys((0, int(np.abs(position).argmin()), len(position) - 1)):
            values = (position[point], loss[point], accuracy[point])
            rows.append((name, *(f"{value:.4g}" for value in values)))
    return Table(head, rows)


def _number(values: Sequence[Any], layer: int) -> str:
    """A number to four digits, or nothing where a shallower model has no such layer."""
    if layer >= len(values) or values[layer] is None:
        return ""
    return f"{values[layer]:.4g}"


def _by_layer(value: Any) -> str:
    """A value for every layer, with layers that are alike and follow each other taken together."""
    if not isinstance(value, list):
        return _text(value)
    runs = [(_text(entry), len(list(run))) for entry, run in itertools.groupby(value)]
    if len(runs) == 1:
        return runs[0][0]
    return ", ".join(
        f"{entry} ({length} {'layer' if length == 1 else 'layers'})" for entry, length in runs
    )


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):  # Sides of an image or of a grid.
        return "\N{MULTIPLICATION SIGN}".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
