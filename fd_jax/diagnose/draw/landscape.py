"""Loss and accuracy along random directions, laid out as the paper's figures 5 and 6."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fd_jax.diagnose.draw import names, style
from fd_jax.show import html

# Li et al. cut the axis of the loss here (docs/reference.md#landscape).
HIGHEST_LOSS = 5.0

# Text that stays legible where a curve runs through it.
NOTE = {"fontsize": 7, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.5}}


def landscape(record: Mapping[str, Any]) -> Any:
    """A row for each model: the loss and the accuracy, a curve for each direction.

    The axes of a column are shared. The axis of the loss ends at `HIGHEST_LOSS` if a curve goes
    beyond it, and says so.
    """
    models = {name: model for name, model in record["models"].items() if "landscape" in model}
    figure = style.new_figure(6.4, 2.1 * len(models) + 0.8)
    grid = figure.subplots(len(models), 2, sharex=True, sharey="col", squeeze=False)
    titles = names.titles(models, 36)
    for row, (name, model) in zip(grid, models.items(), strict=True):
        curves = model["landscape"]
        _curves(row[0], curves["position"], curves["loss"])
        _curves(row[1], curves["position"], curves["accuracy"])
        row[0].set(title=titles[name], ylabel="cross entropy")
        row[1].set_ylabel("top-1 accuracy")
    _limits(grid[:, 0], models)
    grid[0, 1].set_ylim(bottom=0)
    for axes in grid[-1]:
        axes.set(xlabel="position (1: the length of the weights)", xticks=_ends(models))
    figure.suptitle(_conditions(record, models), x=0.01, ha="left", fontsize=7.5)
    _legend(figure, grid[0, 0])
    return figure


def _curves(axes: Any, position: Any, curves: Any) -> None:
    """Draws [direction][point]; markers are few, since there are many points."""
    for values in curves:
        values = np.array(values, dtype=float)
        axes.plot(position, values, markersize=3, markevery=max(1, len(position) // 8))


def _conditions(record: Mapping[str, Any], models: Mapping[str, Any]) -> str:
    """How the landscapes were measured, on which their shape depends."""
    curves = [model["landscape"] for model in models.values()]
    ways = {
        f"class token, positions and bias tables: {each['tables']}; augmentation: "
        f"{each['augmentation']}"
        for each in curves
    }
    data = html.printable(f"{record['images']:,} images of {record['data']}")
    return names.wrapped("; ".join([data, *sorted(ways)]), 100)


def _ends(models: Mapping[str, Any]) -> list[float]:
    """Both ends of the longest directions, the model itself, and the places half way."""
    end = max(abs(value) for model in models.values() for value in model["landscape"]["position"])
    return [-end, -end / 2, 0, end / 2, end]


def _limits(column: Any, models: Mapping[str, Any]) -> None:
    losses = [np.array(model["landscape"]["loss"], dtype=float) for model in models.values()]
    highest = max(float(np.nanmax(values)) for values in losses)
    column[0].set_ylim(0, HIGHEST_LOSS if highest > HIGHEST_LOSS else None)
    if highest <= HIGHEST_LOSS:
        return
    for axes, values in zip(column, losses, strict=True):
        if np.nanmax(values) > HIGHEST_LOSS:
            note = f"axis cut at {HIGHEST_LOSS:g}; highest loss {np.nanmax(values):.3g}"
            axes.text(0.5, 0.97, note, transform=axes.transAxes, ha="center", va="top", **NOTE)


def _legend(figure: Any, axes: Any) -> None:
    labels = [f"direction {index}" for index in range(1, len(axes.lines) + 1)]
    figure.legend(axes.lines, labels, loc="outside lower center", ncols=min(5, len(labels)))
