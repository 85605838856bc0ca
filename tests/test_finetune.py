"""Fine-tuning as users run it, from a model folder to a measured classifier."""

import json
import pathlib
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest

from fd_jax import model_folder
from fd_jax.cli import measure
from fd_jax.errors import ConfigError
from fd_jax.show import tables
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.training import loop, metric_writer
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny.save_student(tmp_path_factory.mktemp("students") / "tiny")


@pytest.fixture(scope="module")
def config(student, embedded_data):
    fields = {
        "data.data_dir": embedded_data,
        "data.rand_augment": "rand-m9-mstd0.5-inc1",
        "data.eval_split": "test[:53]",
        "eval.knn": 5,
        "eval.batches": 0,
        "ema_decay": 0.5,
    }
    return tiny.fine_tuning(student, **fields)


@pytest.fixture(scope="module")
def tuned(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tuned")
    return workdir, loop.fit(ClassifyTask(config), config, workdir)


def test_weights_and_their_average_are_both_evaluated(tuned):
    _, result = tuned
    names = {"loss", "top1", "top5", "knn_top1", "knn_top5"}
    expected = {f"{prefix}_{name}" for prefix in ("eval", "eval_ema") for name in names}
    assert result.evaluation.keys() == expected
    assert result.evaluation["eval_loss"] != result.evaluation["eval_ema_loss"]


def test_exported_model_folder_has_the_classifier_head(tuned):
    workdir, _ = tuned
    spec, parts = model_folder.load(workdir / "model")
    assert set(parts) == {"encoder", "fc_norm", "head"}
    assert (spec.classes, spec.pooling, spec.arch["position"]) == (10, "mean_norm", "rpb")
    assert spec.source == "fine-tuned by fd_jax on digits from distilled"


def test_eval_only_gives_the_figures_that_training_reported(tuned, config):
    """It measures the exported average and writes the table and the plot; 53 is prime."""
    workdir, result = tuned
    figures = measure.measure(config, workdir, per_class=True)
    written = json.loads((workdir / "evaluation.json").read_text())
    assert written == {"init_from": str(workdir / "model"), "data": "digits/test[:53]", **figures}
    for name in ("loss", "top1", "top5", "knn_top1", "knn_top5"):
        np.testing.assert_allclose(figures[name], result.evaluation[f"eval_ema_{name}"], rtol=1e-6)
    table = (workdir / "per_class.md").read_text()
    counts = [int(line.split("|")[2]) for line in table.splitlines()[2:]]
    assert len(counts) == 10
    assert sum(counts) == 53
    assert (workdir / "confusion.png").exists()
    names, matrix = tables.read_confusion(workdir / tables.CONFUSION)
    assert len(names) == 10 and matrix.sum(axis=1).tolist() == counts


@pytest.mark.slow
def test_resumed_fine_tuning_is_bit_for_bit(tuned, config, tmp_path):
    """It stops after two of four steps; mixing, augmentation and drop path resume too."""
    half = ml_collections.ConfigDict(config.to_dict())
    workdir, _ = tuned
    task = ClassifyTask(half)

    class Stop(Exception):
        pass

    original = loop.Run._save

    def save_and_stop(run, step, state):
        original(run, step, state)
        run.checkpoints.wait()
        raise Stop

    loop.Run._save = save_and_stop
    try:
        with pytest.raises(Stop):
            loop.fit(task, half, tmp_path / "again")
    finally:
        loop.Run._save = original
    loop.fit(task, half, tmp_path / "again")
    losses = [
        [row["loss"] for row in metric_writer.read(folder) if "loss" in row]
        for folder in (workdir, tmp_path / "again")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


@pytest.mark.slow
def test_eval_only_without_a_head_measures_only_the_neighbours(config, tmp_path):
    """The figures are those that a probe of the same folder reports."""
    probe = ml_collections.ConfigDict(config.to_dict())
    probe.model.update(trains="head", pooling="cls", final_norm=True, untie_positions=False)
    probe.ema_decay = 0.0
    probe.steps = 1
    probe.optim.warmup_epochs = 0.0
    reported = loop.fit(ClassifyTask(probe), probe, tmp_path / "probe").evaluation
    figures = measure.measure(probe, tmp_path / "alone")
    assert figures.keys() == {"knn_top1", "knn_top5"}
    for name, figure in figures.items():
        np.testing.assert_allclose(figure, reported[f"eval_{name}"], rtol=1e-6)


@pytest.mark.parametrize("knn,options", [(0, {}), (5, {"per_class": True})])
def test_eval_only_that_needs_a_head_is_refused_without_one(config, tmp_path, knn, options):
    config = ml_collections.ConfigDict(config.to_dict())
    config.eval.knn = knn
    with pytest.raises(ConfigError, match="has no classifier head; fine-tune or probe it first"):
        measure.measure(config, tmp_path, **options)


def test_eval_only_without_a_model_is_refused(config, tmp_path):
    config = ml_collections.ConfigDict(config.to_dict())
    config.init_from = ""
    with pytest.raises(ConfigError, match="--eval_only needs a trained classifier"):
        measure.measure(config, tmp_path)


@pytest.mark.parametrize(
    "flags,message",
    [
        ((), "init_from is empty"),
        pytest.param(
            ("--config.init_from=nowhere",), "no model folder at nowhere", marks=pytest.mark.slow
        ),
        pytest.param(("--config.mixing.mixup=lots",), "mixup", marks=pytest.mark.slow),
        (("--eval_only",), "--eval_only needs a trained classifier"),
    ],
    ids=str,
)
def test_invalid_commands_print_one_message_and_no_traceback(tmp_path, flags, message):
    command = ["finetune.py", "--config=configs/finetune_clip_vit_b16.py:smoke"]
    result = subprocess.run(
        [sys.executable, *command, f"--workdir={tmp_path / 'w'}", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_training_from_random_weights_exports_a_model_folder(embedded_data, tmp_path):
    """This is how the miniature pre-trains its teacher: an architecture instead of init_from."""
    fields = {"data.data_dir": embedded_data, "steps": 1, "eval.every": 0, "eval.epochs": 0.0}
    config = tiny.fine_tuning("", **fields)
    config.model.family = "vit"
    config.model.arch = tiny.TEACHER
    config.optim.warmup_epochs = 0.0
    loop.fit(ClassifyTask(config), config, tmp_path)
    spec, _ = model_folder.load(tmp_path / "model")
    assert spec.arch["position"] == "ape"
    assert spec.source == "trained by fd_jax on digits"
    assert jax.process_count() == 1
