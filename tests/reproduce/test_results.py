"""From workdirs to tables and sentences, and the committed page."""

import json
import pathlib

from etils import epath
import pytest

from fd_jax.errors import UserError
from fd_jax.reproduce import __main__ as command_line
from fd_jax.reproduce import page, paper, results, small

ROOT = pathlib.Path(__file__).parent.parent.parent


def finish(command, root, top1):
    """Writes what a finished run leaves: metrics with an evaluation, and a model folder."""
    workdir = command.workdir(root)
    command.model(root).mkdir(parents=True)
    (command.model(root) / "model.json").write_text("{}")
    rows = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_top1": 0.1}, {"step": 2, "eval_top1": top1}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def cell(row, figures, *, default="full", paper=None, table="2", teacher="contrastive_1000"):
    return {
        "table": table,
        "row": row,
        "teacher": teacher,
        "change": f"change of {row}",
        "default": default,
        "measure": "top1",
        "paper": {"CLIP": 80.0} if paper is None else paper,
        "figures": {str(seed): value for seed, value in enumerate(figures)},
    }


@pytest.fixture
def collected(tmp_path):
    root = epath.Path(tmp_path)
    grid = command_line.select(
        "cpu", table="3", teacher="contrastive_1000", seeds=3, everything=False
    )
    for run, top1 in zip(grid[2].runs, (0.7, 0.71, 0.72), strict=True):
        finish(run, root, top1)
    finish(grid[1].runs[0], root, 0.65)
    unfinished = grid[1].runs[1].workdir(root)
    unfinished.mkdir(parents=True)
    (unfinished / "metrics.jsonl").write_text('{"step": 1, "eval_top1": 0.9}\n')
    results.write(results.collect("cpu", grid, root, command_line.SETTINGS["cpu"]), root)
    return root


def test_the_last_evaluations_of_finished_runs_are_collected(collected):
    found = results.read(collected / results.JSON)
    figures = {cell["row"]: cell["figures"] for cell in found["cells"]}
    assert figures == {
        "none": {"0": None, "1": None, "2": None},
        "l2": {"0": 65.0, "1": None, "2": None},
        "whiten": {"0": 70.0, "1": 71.0, "2": 72.0},
    }
    assert list(found["settings"]) == ["contrastive_1000"]
    text = (collected / results.MARKDOWN).read_text()
    assert "| `none` | target as it is | not yet run | - | 0 of 3 | 83.5 / 83.4 / 81.7 |" in text
    assert "| 65.00 | -5.00 | 1 of 3 |" in text
    assert "| 71.00 ± 1.00 | default | 3 of 3 |" in text


@pytest.mark.parametrize(
    "figures,papers,outcome",
    [
        ([68.0, 69.1, 70.2], {"CLIP": 81.7}, "holds"),
        ([72.0, 73.1, 74.2], {"CLIP": 81.7}, "is reversed"),
        ([66.0, 72.0, 73.0], {"CLIP": 81.7}, "is open (the interval contains 0)"),
        ([68.0, 69.1, 70.2], {"CLIP": 81.7, "DINO": 84.9}, "differs between its teachers"),
        ([68.0, 69.1, 70.2], {"CLIP": 81.7, "DINO": 83.6}, "holds"),  # DINO's is equal
        ([68.0, None, None], {"CLIP": 81.7}, "has the same sign (one seed, no interval)"),
        ([None, 74.0, None], {"CLIP": 81.7}, "has another sign (one seed, no interval)"),
    ],
)
def test_the_sentence_says_whether_the_papers_order_holds(figures, papers, outcome):
    default = cell("full", [70.0, 71.0, 72.0], paper={"CLIP": 84.3, "DINO": 83.6})
    sentence = results.verdict([cell("cls", figures, paper=papers), default])
    assert sentence == f"Against the default row, the paper's order {outcome} for `cls`."


def test_rows_without_runs_are_not_judged():
    paper = {"CLIP": 81.7}
    rows = [cell("cls", [None, None]), cell("full", [None, None], paper=paper)]
    assert results.verdict(rows) == "The paper's order: not yet run."
    rows[0] = cell("cls", [60.0, None])  # nothing to compare it with
    assert results.verdict(rows) == "The paper's order: not yet run."


def test_tables_that_the_paper_does_not_order_are_not_judged():
    rows = [cell("cls", [60.0, 61.0]), cell("full", [70.0, 71.0], paper={})]
    assert results.verdict(rows) == "The paper has no figures that order these rows."


def test_seeds_are_paired_and_not_counted_off():
    """A row with seeds 1 and 2 is compared with those seeds of the default row."""
    default = cell("full", [10.0, 71.0, 72.0], paper={"CLIP": 84.3})
    row = cell("cls", [None, 70.0, 71.0], paper={"CLIP": 81.7})
    text = results.markdown(
        {"scale": "cpu", "settings": {"contrastive_1000": "About."}, "cells": [row, default]}
    )
    assert "| 70.50 ± 0.71 | -1.00 [-1.00, -1.00] | 2 of 3 |" in text


def test_tables_at_full_scale_have_all_teachers():
    grid = [
        cell("cls", [None], paper={"clip": 81.7}, teacher="clip"),
        cell("full", [None], paper={"clip": 84.3}, teacher="clip"),
        cell("full", [83.0], paper={"dino": 83.6}, teacher="dino"),
    ]
    text = results.markdown({"scale": "full", "cells": grid})
    assert text.startswith("### Table 2, the target\n\n| teacher | row |")
    assert "| clip | `cls` | change of cls | not yet run | - | 0 of 1 | 81.7 |" in text
    assert "| dino | `full` | change of full | 83.00 | default | 1 of 1 | 83.6 |" in text


def test_the_spread_of_heads_is_over_the_heads_of_the_deeper_layers():
    distances = [[0.0, 100.0], [0.0, 50.0], [10.0, 12.0], [20.0, 26.0]]
    deviations = [2**0.5, 3 * 2**0.5]  # of two values, their difference / sqrt(2)
    assert results.head_spread(distances) == pytest.approx(sum(deviations) / 2)
    assert results.head_spread([[5.0, 5.0], [7.0, 7.0]]) == 0


def test_the_spread_is_read_from_the_figures_of_a_diagnosis(tmp_path):
    root = epath.Path(tmp_path)
    grid = [cell for cell in small.cells([0]) if cell.table == small.HEADS]
    run = grid[0].runs[0]
    run.figures(root).parent.mkdir(parents=True)
    record = {"version": 1, "models": {"network": {"distance": [[1.0, 2.0], [3.0, 5.0]]}}}
    run.figures(root).write_text(json.dumps(record))
    found = results.collect("cpu", grid, root, command_line.SETTINGS["cpu"])
    figures = [cell["figures"]["0"] for cell in found["cells"]]
    assert figures == [pytest.approx(2**0.5, abs=1e-4), None, None, None]


def test_damaged_results_are_refused(tmp_path):
    path = epath.Path(tmp_path) / "cpu.json"
    path.write_text("{")
    with pytest.raises(UserError, match="cpu.json is no results file"):
        page.render(epath.Path(tmp_path))
    path.write_text('{"version": 99}')
    with pytest.raises(UserError, match="has version 99"):
        page.render(epath.Path(tmp_path))


def test_a_page_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match="no results in"):
        page.render(epath.Path(tmp_path))


def test_the_committed_page_is_what_the_command_generates():
    assert (ROOT / page.PAGE).read_text("utf-8") == page.render(epath.Path(ROOT / page.RESULTS))


def test_committed_results_have_the_cells_of_today():
    """A changed grid makes the committed figures those of other cells."""
    for scale, grid in (("cpu", small.cells), ("full", paper.cells)):
        record = results.read(epath.Path(ROOT / page.RESULTS / f"{scale}.json"))
        count = len(record["cells"][0]["figures"])
        wanted = [results._record(cell, epath.Path("/nowhere")) for cell in grid(range(count))]
        for found, expected in zip(record["cells"], wanted, strict=True):
            assert {**found, "figures": None} == {**expected, "figures": None}
