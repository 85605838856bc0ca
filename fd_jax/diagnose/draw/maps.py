"""Average attention maps: a block of panels for each model, a panel for each layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fd_jax.diagnose.draw import panels

SCALES = "Logarithmic colours; every panel has a scale of its own."


def maps(record: Mapping[str, Any]) -> Any:
    """Attention between patches: rows are queries, columns keys, from the top left."""
    caption = f"Attention between patches: a row is a query, a column a key. {SCALES}"
    return _by_layer(record, "maps", caption)


def class_row(record: Mapping[str, Any]) -> Any:
    """Attention of the class token to the patches, each at its place in the picture."""
    caption = f"Attention of the class token to each patch of the picture. {SCALES}"
    return _by_layer(record, "class_row", caption)


def class_column(record: Mapping[str, Any]) -> Any:
    """Attention of the patches to the class token, each at its place in the picture."""
    caption = f"Attention of each patch of the picture to the class token. {SCALES}"
    return _by_layer(record, "class_column", caption)


def _by_layer(record: Mapping[str, Any], key: str, caption: str) -> Any:
    blocks = {
        name: [
            _panel(layer, values, model["about"]["grid"][layer])
            for layer, values in enumerate(model[key])
        ]
        for name, model in record["models"].items()
        if key in model
    }
    return panels.draw(blocks, caption)


def _panel(layer: int, values: Any, grid: Sequence[int]) -> panels.Panel:
    """A matrix [query][key] as it is; values [patch] at their places on the grid."""
    image = np.array(values, dtype=float)
    image = image if image.ndim == 2 else image.reshape(*grid)
    return panels.Panel(f"layer {layer}", image, panels.log_scale(image))
