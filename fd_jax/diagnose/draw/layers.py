"""Figures over the layers: dots for heads, lines for models and for pairs of models."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import numpy as np

from fd_jax.diagnose.draw import names, style

Record = Mapping[str, Any]

# Panels in a row, and characters of a title above a panel and of an entry of a legend.
ACROSS = 4
TITLE = 34
ENTRY = 40


def distance(record: Record) -> Any:
    """Mean attention distance: a panel for each model, a dot for each head.

    Every panel states the share of the attention that went to class token and registers.
    """
    figure, panels = _panels(record, "distance", "mean attention distance (pixels)")
    highest = max(np.nanmax(_flat(model["distance"])) for _, model in panels)
    renormalised = record["settings"].get("normalize", "patches") == "patches"
    for axes, model in panels:
        _dots(axes, model["distance"])
        note = _dropped(model, renormalised)
        axes.text(0.02, 0.98, note, transform=axes.transAxes, va="top", fontsize=7)
        axes.set_ylim(0, 1.25 * highest or 1)  # The note has the top of the panel for itself.
    _legend_of_dots(figure, panels[0][0])
    return figure


def entropy(record: Record) -> Any:
    """Entropy of the attention: a panel for each model, a dot for each head."""
    figure, panels = _panels(record, "entropy", "entropy (nats)")
    for axes, model in panels:
        _dots(axes, model["entropy"])
    panels[0][0].set_ylim(bottom=0)
    _legend_of_dots(figure, panels[0][0])
    return figure


def shares(record: Record) -> Any:
    """Shares of a map's variance: a panel for each model, a line for offset and one for key."""
    figure, panels = _panels(record, "shares", "share of the map's variance")
    for axes, model in panels:
        for kind, meaning in (("offset", "diagonals"), ("key", "columns")):
            axes.plot(_numbers(model["shares"][kind]), label=f"by {kind} ({meaning})")
        axes.set_ylim(-0.03, 1.03)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def similarity(record: Record) -> Any:
    """Cosine between the heads of a layer: a line for each model."""
    what = record["settings"].get("compare", "rows")
    return _lines(_of_models(record, "similarity"), f"cosine of heads ({what} of attention)")


def divergence(record: Record) -> Any:
    """Mean KL divergence between the heads of a layer: a line for each model."""
    return _lines(_of_models(record, "divergence"), "mean KL divergence of heads (nats)")


def rank(record: Record) -> Any:
    """Effective rank of the features after each block: a line for each model."""
    return _lines(_of_models(record, "rank"), "effective rank of the features")


def cka(record: Record) -> Any:
    """Linear CKA: a line for each pair of models."""
    return _lines(_of_pairs(record, "cka"), "linear CKA")


def cosine(record: Record) -> Any:
    """Cosine between the features of two models: a line for each pair."""
    return _lines(_of_pairs(record, "cosine"), "cosine between features")


def _panels(record: Record, key: str, label: str) -> tuple[Any, list[tuple[Any, Any]]]:
    """A figure with a panel for each model that has `key`, and (panel, model) for each."""
    models = {name: model for name, model in record["models"].items() if key in model}
    columns = min(len(models), ACROSS)
    rows = math.ceil(len(models) / columns)
    figure = style.new_figure(max(3.6, 2.5 * columns + 0.5), 2.7 * rows + 0.4)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    titles = names.titles(models, TITLE)
    for axes, (name, model) in zip(panels, models.items(), strict=False):
        axes.set(title=titles[name], xlabel="layer")
        _layer_axis(axes, len(_layers(model[key])))
    for axes in panels[len(models) :]:
        axes.remove()
    figure.supylabel(label)
    return figure, list(zip(panels, models.values(), strict=False))


def _layers(values: Any) -> Sequence[Any]:
    """The values by layer; of shares, those by offset."""
    return values["offset"] if isinstance(values, Mapping) else values


def _layer_axis(axes: Any, layers: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.6, layers - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _dots(axes: Any, heads: Sequence[Sequence[float]]) -> None:
    """Draws values [layer][head] as dots, and their mean over the heads as a line."""
    layers = np.repeat(np.arange(len(heads)), [len(values) for values in heads])
    axes.scatter(
        layers,
        _flat(heads),
        s=11,
        color="#0072B2",
        alpha=0.75,
        linewidths=0,
        zorder=3,
        clip_on=False,
    )
    means = [_numbers(values).mean() for values in heads]
    axes.plot(means, color="0.35", marker="", linestyle="-", linewidth=0.9)


def _legend_of_dots(figure: Any, axes: Any) -> None:
    handles = [axes.collections[0], axes.lines[0]]
    labels = ["a head", "mean of the heads"]
    figure.legend(handles, labels, loc="outside lower center", ncols=2)


def _dropped(model: Any, renormalised: bool) -> str:
    if not model["about"]["prefix"]:
        return "no class token, nothing dropped"
    share = np.nanmean(_flat(model["dropped"]))
    rows = "renormalised" if renormalised else "not renormalised"
    return f"{share:.1%} of the attention dropped with\nclass token and registers; {rows}"


def _lines(curves: Mapping[str, Sequence[float]], label: str) -> Any:
    """A figure with a line over the layers for each entry of a legend."""
    height = 3.1 + 0.15 * sum(entry.count("\n") + 1 for entry in curves) / 2
    figure = style.new_figure(5.6, height)
    axes = figure.subplots()
    lines = [axes.plot(_numbers(values))[0] for values in curves.values()]
    _layer_axis(axes, max(len(values) for values in curves.values()))
    axes.set(xlabel="layer", ylabel=label)
    figure.legend(lines, list(curves), loc="outside lower center", ncols=min(2, len(curves)))
    return figure


def _of_models(record: Record, key: str) -> dict[str, Sequence[float]]:
    models = {name: model[key] for name, model in record["models"].items() if key in model}
    titles = names.titles(models, ENTRY)
    return {titles[name]: values for name, values in models.items()}


def _of_pairs(record: Record, key: str) -> dict[str, Sequence[float]]:
    titles = names.titles(record["models"], ENTRY)

    def entry(pair: Mapping[str, Any]) -> str:
        entry = " and\n".join(titles[name] for name in pair["models"])
        means = key == "cka" and pair.get("rows") == "images"
        return entry + "\n(mean patch of each image)" * means

    return {entry(pair): pair[key] for pair in record["pairs"] if key in pair}


def _numbers(values: Sequence[float]) -> np.ndarray:
    """Values as an array, in which a missing number (null in JSON) leaves a gap."""
    return np.array(values, dtype=float)


def _flat(heads: Sequence[Sequence[float]]) -> np.ndarray:
    return np.concatenate([_numbers(values) for values in heads])
