"""Draws the figures of a record (figures.json), and nothing that is not in it.

Each figure is written as PNG and as SVG, with one style sheet (`style`). The same record gives the
same bytes. `layers` draws over the layers, `maps` and `picture` images in `panels`, and `landscape`
the loss along directions (docs/reference.md#figures).
"""

from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from fd_jax import files
from fd_jax.diagnose.draw import landscape, layers, maps, picture, style

KINDS = ("png", "svg")

# What draws a figure, by the key of the record that it shows. A record has the key in each model
# or, for comparisons, in each pair of models.
DRAWINGS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "distance": layers.distance,
    "similarity": layers.similarity,
    "maps": maps.maps,
    "class_row": maps.class_row,
    "class_column": maps.class_column,
    "shares": layers.shares,
    "entropy": layers.entropy,
    "divergence": layers.divergence,
    "landscape": landscape.landscape,
    "rank": layers.rank,
    "cka": layers.cka,
    "cosine": layers.cosine,
    "pca": picture.pca,
    "rollout": picture.rollout,
    "heads": picture.heads,
}


def drawable(record: Mapping[str, Any]) -> list[str]:
    """The figures that a record has numbers for, in the order in which reports show them."""
    holders = [*record["models"].values(), *record.get("pairs", [])]
    return [name for name in DRAWINGS if any(name in holder for holder in holders)]


def figure(record: Mapping[str, Any], name: str) -> Any:
    """Draws one figure.

    Args:
      record: the content of figures.json.
      name: one of `drawable(record)`.

    Returns:
      A matplotlib Figure, which pyplot does not know, so that nothing has to be closed.
    """
    with style.applied():
        return DRAWINGS[name](record)


def draw_all(record: Mapping[str, Any], folder: epath.Path) -> list[epath.Path]:
    """Draws every figure of a record as PNG and SVG.

    Args:
      record: the content of figures.json.
      folder: an existing folder. Files of the same names are replaced.

    Returns:
      The files, in the order of `drawable`, the PNG of a figure before its SVG.
    """
    return [
        path for name in drawable(record) for path in _write(figure(record, name), folder / name)
    ]


def _write(drawing: Any, path: epath.Path) -> list[epath.Path]:
    written = []
    with style.applied():
        for kind in KINDS:
            written.append(path.with_name(f"{path.name}.{kind}"))
            files.write_bytes(written[-1], style.encoded(drawing, kind))
    return written
