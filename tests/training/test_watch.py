"""Notes on runs that get nowhere, and the weights of the best evaluation."""

import json
import math

from etils import epath
import ml_collections
import numpy as np
from PIL import Image
import pytest

from configs import base
from fd_jax import model_folder
from fd_jax.cli import measure
from fd_jax.errors import ConfigError
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.tasks.distill import DistillTask
from fd_jax.training import loop, metric_writer
from fd_jax.training.watch import Best, Watch
from tests import tiny

GUESS = math.log(10)


def probe():
    config = tiny.fine_tuning()
    config.model.trains = "head"
    return config


def notes_of_losses(config, losses):
    watch = Watch(config, [], total_steps=len(losses))
    return [n for step, loss in enumerate(losses, 1) for n in watch.logged(step, {"loss": loss})]


@pytest.mark.parametrize(
    "losses,noted",
    [
        ([GUESS] * 6, True),
        ([1.09 * GUESS, 0.91 * GUESS] * 3, True),
        ([GUESS, GUESS, 0.89 * GUESS, GUESS, GUESS, GUESS], False),  # it learned something
        ([1.2 * GUESS] * 6, False),  # worse than a guess is another matter
    ],
)
def test_a_probe_that_only_guesses_is_noted_once(losses, noted):
    notes = notes_of_losses(probe(), losses)
    assert len(notes) == noted
    assert not noted or "after 3 of 6 steps" in notes[0] and "2.303" in notes[0]
    assert not notes_of_losses(tiny.fine_tuning(), losses)  # whose loss is that of mixed labels


def test_a_resumed_probe_remembers_what_it_has_learned():
    rows = [{"step": 1, "loss": 0.5 * GUESS}]
    assert not Watch(probe(), rows, total_steps=4).logged(4, {"loss": GUESS})
    assert Watch(probe(), [], total_steps=4).logged(4, {"loss": GUESS})


@pytest.mark.parametrize(
    "values,keep_best,noted",
    [
        ([1.0, 1.1, 1.2, 1.3, 1.4], "loss", 1),
        ([1.0, 1.1, 1.2, 1.1, 1.2], "loss", 0),
        ([1.4, 1.3, 1.2, 1.1, 1.0], "loss", 0),
        ([1.4, 1.3, 1.2, 1.1, 1.0], "top1", 1),
        ([1.0, 1.0, 1.0, 1.0, 1.0], "top1", 0),
    ],
)
def test_evaluations_that_get_worse_are_noted_once(values, keep_best, noted):
    config = tiny.fine_tuning(**{"eval.keep_best": keep_best})
    watch = Watch(config, [], total_steps=9)
    notes = [
        note
        for step, value in enumerate(values, 1)
        for note in watch.evaluated(step, {f"eval_{keep_best}": value})
    ]
    assert len(notes) == noted
    assert not noted or f"keep_best={keep_best} keeps" in notes[0]


@pytest.mark.parametrize("name,best", [("loss", (2, 1.0)), ("top1", (4, 3.0))])
def test_the_best_is_the_first_of_equal_figures(name, best):
    watched = Best(name, [{"step": 1, f"eval_{name}": 2.0}, {"step": 2, "loss": 9.0}])
    values = {2: 1.0, 3: 1.0, 4: 3.0, 5: math.nan, 6: 3.0}
    improved = [s for s, v in values.items() if watched.improved_by(s, {f"eval_{name}": v})]
    assert (watched.step, watched.value) == best
    assert improved == [best[0]]


@pytest.mark.parametrize("name,loss", [("top1", "loss"), ("ema_top1", "ema_loss")])
def test_of_equal_figures_that_with_the_lower_loss_is_the_best(name, loss):
    other = {"loss": "ema_loss", "ema_loss": "loss"}[loss]
    figures = {1: (0.9, 2.0), 2: (0.9, 1.0), 3: (0.9, 1.5), 4: (0.8, 0.1), 5: (0.9, math.nan)}
    rows = [
        {"step": s, f"eval_{name}": top1, f"eval_{loss}": value, f"eval_{other}": -s}
        for s, (top1, value) in figures.items()
    ]
    watched = Best(name, [])
    assert [row["step"] for row in rows if watched.improved_by(row["step"], row)] == [1, 2]
    assert (watched.step, watched.value, watched.loss) == (2, 0.9, 1.0)
    assert Best(name, rows).step == 2


@pytest.mark.parametrize(
    "notes,counted",
    [
        ("step 3, the best one by top1: 0.90000", True),
        ("step 3, the best one by ema_top1: 0.90000", False),
        ("step 3, the best one by top5: 0.90000", False),
        (None, False),  # no such folder: keep_best was set later
    ],
)
def test_rows_count_if_the_best_weights_by_the_figure_are_there(notes, counted, tmp_path):
    if notes is not None:
        tiny.save_student(tmp_path / "best")
        description = tmp_path / "best" / "model.json"
        fields = json.loads(description.read_text())
        description.write_text(json.dumps({**fields, "notes": notes}))
        (tmp_path / "best" / "digests.json").unlink()  # they cover model.json
    rows = [{"step": 3, "eval_top1": 0.9}]
    watched = Best("top1", rows, epath.Path(tmp_path / "best"))
    assert watched.step == (3 if counted else None)
    assert watched.improved_by(6, {"eval_top1": 0.5}) != counted
    assert Best("top1", rows).step == 3


def test_a_figure_that_is_not_measured_is_refused():
    with pytest.raises(ConfigError, match="this run measures loss, top1"):
        Best("top5", []).improved_by(1, {"eval_loss": 1.0, "eval_top1": 0.5})


@pytest.mark.parametrize(
    "start,fields,measured",
    [
        ("student", {"eval.keep_best": "knn_top5", "eval.knn": 3}, "loss, top1, knn_top1"),
        ("teachers", {"eval.keep_best": "cosine"}, "cosine/a, cosine/b, loss, loss/a, loss/b"),
    ],
)
def test_a_figure_that_is_not_measured_is_refused_before_the_first_step(
    start, fields, measured, embedded_data, tmp_path, capsys
):
    """It is a figure of the task, but these data or teachers do not have it."""
    fields = {"data.data_dir": embedded_data, "data.eval_split": "test[:40]", **fields}
    if start == "student":
        for split in ("train", "test"):
            for label in "abc":
                folder = tmp_path / split / label
                folder.mkdir(parents=True)
                for index in range(6):
                    Image.new("RGB", (16, 16), (index, 0, 0)).save(folder / f"{index}.png")
        data = {"data.name": f"folder:{tmp_path}/{{split}}", "data.eval_split": "test"}
        student = tiny.save_student(tmp_path / "student")
        config = tiny.fine_tuning(student, **{**fields, **data, "model.classes": 3})
        task = ClassifyTask(config)
    else:
        teacher = tiny.save_teacher(tmp_path / "teacher")
        same = {"path": teacher, "target__kind": "cls"}
        sections = [(n, base.teacher("tiny", **same, weight=w)) for n, w in (("a", 1), ("b", 2))]
        config = tiny.several(sections, **fields)
        task = DistillTask(config)
    with pytest.raises(ConfigError, match=f"but this run measures {measured}; choose"):
        loop.fit(task, config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_the_best_weights_are_kept_beside_the_last(embedded_data, tmp_path):
    """The folder, measured again, has the best figure of the log; a high rate spoils the last."""
    student = tiny.save_student(tmp_path / "student")
    fields = {
        "data.data_dir": embedded_data,
        "data.eval_split": "test[:40]",
        "eval.keep_best": "loss",
        "eval.every": 1,
        "eval.batches": 0,
        "optim.peak_lr": 0.3,
        "optim.warmup_epochs": 0.03,
    }
    config = tiny.fine_tuning(student, **fields)
    workdir = tmp_path / "run"
    loop.fit(ClassifyTask(config), config, workdir)
    rows = metric_writer.read(workdir)
    measured = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    step = min(measured, key=lambda s: measured[s])
    assert step < 4, "the last step is the best, so this test shows nothing"
    notes = model_folder.load_spec(workdir / "best").notes
    assert notes.startswith(f"step {step}, the best one by loss: {measured[step]:.5f}")
    assert f"by loss, step {step} was the best" in model_folder.load_spec(workdir / "model").notes
    again = ml_collections.ConfigDict(config.to_dict())
    for folder, at in ((workdir / "best", step), (workdir / "model", 4)):
        again.init_from = str(folder)
        figures = measure.measure(again, tmp_path / f"measured_{at}")
        np.testing.assert_allclose(figures["loss"], measured[at], rtol=1e-5)
