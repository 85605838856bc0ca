"""Collects what finished runs measured, as plain values and as Markdown tables."""

from collections.abc import Mapping, Sequence
import json
import statistics
import textwrap
from typing import Any

from etils import epath

from fd_jax import files
from fd_jax.errors import UserError
from fd_jax.reproduce import launching, paired
from fd_jax.reproduce.cells import Cell, Command, Diagnosis
from fd_jax.training import metric_writer

VERSION = 1
JSON, MARKDOWN = "results.json", "results.md"
NOT_RUN = "not yet run"
METRIC = "eval_top1"
TITLES = {
    "1": "Table 1, before and after distillation",
    "2": "Table 2, the target",
    "3": "Table 3, normalisation of the target",
    "4": "Table 4, positions of the student",
    "5": "Table 5, drop path",
    # What Hybrid Distill asks: does the diversity of heads come from the student's position bias?
    "heads": "How much the attention distances of heads differ, in pixels (arXiv 2306.15876)",
}


def collect(
    scale: str, cells: Sequence[Cell], root: epath.Path, settings: Mapping[str, str]
) -> dict[str, Any]:
    """The figures of all cells, as JSON values.

    Args:
      scale: name of the scale.
      cells: in the order of the tables.
      root: workdir of the reproduction.
      settings: description of each teacher or setting.
    """
    named = {cell.teacher for cell in cells}
    return {
        "version": VERSION,
        "scale": scale,
        "hours": round(launching.seconds(root) / 3600, 2),
        "settings": {name: text for name, text in settings.items() if name in named},
        "cells": [_record(cell, root) for cell in cells],
    }


def write(results: dict[str, Any], root: epath.Path) -> None:
    """Writes results.json and results.md into the workdir of the reproduction."""
    files.write_text(root / JSON, json.dumps(results, indent=1) + "\n")
    files.write_text(root / MARKDOWN, markdown(results))


def read(path: epath.Path) -> dict[str, Any]:
    """Reads a results.json.

    Raises:
      UserError: the file is damaged, or of another version.
    """
    try:
        results = json.loads(path.read_text())
        version = results["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no results file of this command: {error}") from None
    if version != VERSION:
        raise UserError(f"{path} has version {version}, this fd_jax reads {VERSION}")
    return results


def markdown(results: dict[str, Any]) -> str:
    """Tables of all cells, each with a sentence on the order of its rows.

    At full scale there is one table for each of the paper's, otherwise one for each setting and
    table.
    """
    if results["scale"] == "full":
        groups = _grouped(results["cells"], "table")
        return "\n".join(
            f"### {TITLES[table]}\n\n{_part(group)}" for table, group in groups.items()
        )
    parts = []
    for setting, cells in _grouped(results["cells"], "teacher").items():
        about = textwrap.fill(results["settings"][setting], 100)
        parts.append(f"### Setting `{setting}`\n\n{about}\n")
        groups = _grouped(cells, "table")
        parts += [f"{TITLES[table]}:\n\n{_part(group)}" for table, group in groups.items()]
    return "\n".join(parts)


def verdict(cells: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on whether the paper's order of the rows holds in the figures of one table."""
    found: dict[str, list[str]] = {}
    teachers = {cell["teacher"] for cell in cells}
    for cell in cells:
        outcome = _outcome(cell, _default(cell, cells))
        name = f"`{cell['row']}`" + (f" of {cell['teacher']}" if len(teachers) > 1 else "")
        if outcome:
            found.setdefault(outcome, []).append(name)
    if not any(_paper_signs(cell, _default(cell, cells)) for cell in cells):
        return "The paper has no figures that order these rows."
    if not found:
        return f"The paper's order: {NOT_RUN}."
    listed = "; ".join(f"{outcome} for {', '.join(rows)}" for outcome, rows in found.items())
    return f"Against the default row, the paper's order {listed}."


def head_spread(distances: Sequence[Sequence[float]]) -> float:
    """How much the heads of deep layers differ in how far they look, in pixels.

    The standard deviation of the attention distances of a layer's heads, averaged over the deeper
    half of the layers.

    Args:
      distances: [layer][head] in pixels (docs/reference.md#attention-distance).
    """
    deep = distances[len(distances) // 2 :]
    return statistics.fmean(statistics.stdev(heads) for heads in deep)


def _record(cell: Cell, root: epath.Path) -> dict[str, Any]:
    measure = {"top1": _top1, "spread": _spread}[cell.measure]
    return {
        "table": cell.table,
        "row": cell.row,
        "teacher": cell.teacher,
        "change": cell.change,
        "default": cell.default,
        "measure": cell.measure,
        "paper": dict(cell.paper),
        "figures": {
            str(seed): measure(run, root) if run.finished(root) else None
            for seed, run in zip(cell.seeds, cell.runs, strict=True)
        },
    }


def _top1(run: Command, root: epath.Path) -> float | None:
    """Top-1 in percent after the last step; None if the run evaluated nothing."""
    rows = [row for row in metric_writer.read(run.workdir(root)) if METRIC in row]
    return round(100 * rows[-1][METRIC], 4) if rows else None


def _spread(run: Command, root: epath.Path) -> float:
    assert isinstance(run, Diagnosis)
    record = json.loads(run.figures(root).read_text())
    (model,) = record["models"].values()
    return round(head_spread(model["distance"]), 4)


def _figures(cell: Mapping[str, Any]) -> dict[str, float]:
    """Seed -> figure, for the seeds that were run."""
    return {seed: value for seed, value in cell["figures"].items() if value is not None}


def _default(cell: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row that a cell is compared with; the cell itself if the table lacks that row."""
    wanted = (cell["teacher"], cell["default"])
    return next((other for other in cells if (other["teacher"], other["row"]) == wanted), cell)


def _difference(cell: Mapping[str, Any], default: Mapping[str, Any]) -> paired.Difference | None:
    """Difference from the default row over the seeds that both have; None if there are none."""
    figures, others = _figures(cell), _figures(default)
    seeds = [seed for seed in figures if seed in others]
    if cell is default or not seeds:
        return None
    values = [[table[seed] for seed in seeds] for table in (figures, others)]
    return paired.difference(*values)


def _paper_signs(cell: Mapping[str, Any], default: Mapping[str, Any]) -> set[int]:
    """Signs of the paper's differences for its teachers; those that are 0 do not count."""
    shared = [name for name in cell["paper"] if name in default["paper"]]
    return {_sign(cell["paper"][name] - default["paper"][name]) for name in shared} - {0}


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _outcome(cell: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    """What the figures say about the paper's difference, or "" if nothing can be said."""
    found, paper = _difference(cell, default), _paper_signs(cell, default)
    if found is None or not paper:
        return ""
    if len(paper) > 1:
        return "differs between its teachers"
    if found.low is None:
        same = _sign(found.mean) in paper
        return f"has {'the same' if same else 'another'} sign (one seed, no interval)"
    if not found.sign:
        return "is open (the interval contains 0)"
    return "holds" if found.sign in paper else "is reversed"


def _grouped(cells: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(cell[key], []).append(cell)
    return groups


def _part(cells: Sequence[Mapping[str, Any]]) -> str:
    return f"{_table(cells)}\n{verdict(cells)}\n"


def _table(cells: Sequence[Mapping[str, Any]]) -> str:
    teachers = list(dict.fromkeys(cell["teacher"] for cell in cells))
    by_length = sorted(cells, key=lambda cell: -len(cell["paper"]))
    names = list(dict.fromkeys(name for cell in by_length for name in cell["paper"]))
    of_teacher = set(names) <= set(teachers)  # else those that ours stands for
    paper = "paper" if of_teacher else f"paper: {' / '.join(names)}"
    head = ["teacher", "row", "what changes", "ours", "minus default", "runs", paper]
    body = []
    for cell in cells:
        columns = [cell["teacher"]] if of_teacher else names
        figures = " / ".join(str(cell["paper"].get(name, "-")) for name in columns)
        figures = figures if cell["paper"] else "-"
        ours = _shown(cell, _default(cell, cells))
        body.append([cell["teacher"], f"`{cell['row']}`", cell["change"], *ours, figures])
    rows = [head, ["---"] * len(head), *body]
    if len(teachers) == 1:
        rows = [row[1:] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _shown(cell: Mapping[str, Any], default: Mapping[str, Any]) -> tuple[str, str, str]:
    """(mean and spread, paired difference with its interval, number of runs) as text."""
    values = list(_figures(cell).values())
    runs = f"{len(values)} of {len(cell['figures'])}"
    if not values:
        return NOT_RUN, "-", runs
    deviation = paired.spread(values)
    ours = f"{statistics.fmean(values):.2f}"
    ours += f" ± {deviation:.2f}" if deviation is not None else ""
    gain = _difference(cell, default)
    if gain is None:
        return ours, "default" if cell is default else "-", runs
    minus = f"{gain.mean:+.2f}"
    minus += f" [{gain.low:+.2f}, {gain.high:+.2f}]" if gain.low is not None else ""
    return ours, minus, runs
