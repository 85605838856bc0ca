"""Segmentation as users run it, from a model folder and pictures to a measured segmenter."""

import csv
import io
import json
import shutil

import jax
import ml_collections
import numpy as np
import pytest

import fd_jax
from fd_jax import model_folder
from fd_jax.cli import measure
from fd_jax.errors import ConfigError, DataError
from fd_jax.tasks import registry
from fd_jax.tasks.segment import SegmentTask
from fd_jax.training import feeds, loop, metric_writer
from tests import tiny
from tests.data.segmentation import scenes


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of four steps on 17 pictures, in batches of eight."""
    folder = tmp_path_factory.mktemp("segmentation")
    for split, count in (("training", 17), ("validation", 3)):
        for number in range(count):
            height, width = 50 + 3 * number, 90 - 2 * number
            image = scenes.encode(scenes.picture(number, height, width))
            scenes.write(folder / "images" / split / f"{number}.png", image)
            mask = scenes.encode(scenes.blocks(number, height, width, range(6)))
            scenes.write(folder / "annotations" / split / f"{number}.png", mask)
    student = tiny.save_student(folder / "student", depth=3)
    return tiny.segmentation(student, **{"data.root": str(folder), "ema_decay": 0.5})


def test_each_kind_of_run_opens_its_own_data(config, student, embedded_data):
    feed = feeds.open_data(config, registry.make(config))
    assert feed.elements == registry.kind_of(config).elements(config)
    assert feed.steps_per_epoch(8) == 2
    labelled = tiny.fine_tuning(student, **{"data.data_dir": embedded_data})
    feed = feeds.open_data(labelled, registry.make(labelled))
    assert feed.elements == registry.kind_of(labelled).elements(labelled)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny.save_student(tmp_path_factory.mktemp("students") / "tiny")


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, loop.fit(registry.make(config), config, workdir)


@pytest.mark.slow
def test_a_run_is_measured_and_exported(finished):
    workdir, result = finished
    names = {f"eval_{prefix}{name}" for prefix in ("", "ema_") for name in ("miou", "macc", "aacc")}
    assert result.evaluation.keys() == names
    assert 0 < result.evaluation["eval_miou"] < 1
    spec, parts = model_folder.load(workdir / "model")
    assert set(parts) == {"encoder", "segmenter", "segmenter_statistics"}
    assert spec.source == "fine-tuned by fd_jax on folders from distilled"
    means = [np.abs(leaf).max() for leaf in jax.tree.leaves(parts["segmenter_statistics"])]
    assert min(means) > 0
    logged = metric_writer.read(workdir)
    assert {"loss", "decoder_loss", "auxiliary_loss"} <= set().union(*logged)


@pytest.mark.slow
def test_a_resumed_run_is_bit_for_bit(finished, config, tmp_path, monkeypatch):
    """It stops after two of four steps; running statistics and every random number resume too."""
    workdir, result = finished
    original = loop.Run._save

    class Stop(Exception):
        pass

    def save_and_stop(run, step, state):
        original(run, step, state)
        run.checkpoints.wait()
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_save", save_and_stop)
        with pytest.raises(Stop):
            loop.fit(registry.make(config), config, tmp_path / "again")
    again = loop.fit(registry.make(config), config, tmp_path / "again")
    assert again.evaluation == result.evaluation
    folders = (workdir / "model", tmp_path / "again" / "model")
    first, second = (model_folder.load(folder)[1] for folder in folders)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_settings_that_cannot_work_leave_no_workdir(config, tmp_path):
    for fields, error, message in (
        ({"accumulation": 2}, ConfigError, "BatchNorms of a segmenter are over the whole batch"),
        ({"segment.classes": 4}, DataError, "segment.classes=4"),
    ):
        wrong = ml_collections.ConfigDict(config.to_dict())
        wrong.update_from_flattened_dict(fields)
        with pytest.raises(error, match=message):
            loop.fit(registry.make(wrong), wrong, tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_eval_only_gives_the_figures_of_the_run_and_shows_pictures(finished, config, tmp_path):
    """Of the averaged weights, which a run with an average exports."""
    workdir, result = finished
    shutil.copytree(workdir / "model", tmp_path / "model")
    figures = measure.measure(config, tmp_path, per_class=True)
    want = {name: result.evaluation[f"eval_ema_{name}"] for name in figures}
    assert figures == pytest.approx(want, abs=1e-4)
    assert json.loads((tmp_path / "evaluation.json").read_text())["miou"] == figures["miou"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "per_class.csv").read_text())))
    found = [float(row["iou"]) for row in rows if row["iou"]]
    assert np.mean(found) == pytest.approx(figures["miou"], abs=1e-4)
    counts = list(csv.reader(io.StringIO((tmp_path / "confusion.csv").read_text())))
    matrix = np.array([row[1:] for row in counts[1:]], int)
    assert counts[0][1:] == [row[0] for row in counts[1:]] == sorted(counts[0][1:])
    assert np.trace(matrix) / matrix.sum() == pytest.approx(figures["aacc"], abs=1e-9)
    assert (tmp_path / "overlays.html").read_text().count("<figure") == 3 * 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "has no segmenter; leave --eval_only out"),
        ({"init_from": ""}, "needs a trained segmenter"),
        ({"data.eval_split": ""}, "data.eval_split, which is empty"),
        ({"eval.mode": "whole"}, "has no segmenter|eval.mode='slide'"),
    ],
    ids=str,
)
def test_what_eval_only_cannot_measure(config, tmp_path, fields, message):
    wrong = ml_collections.ConfigDict(config.to_dict())
    wrong.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=message):
        measure.measure(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_linear_decoder_reads_the_normalised_map_in_training_and_from_its_folder(tmp_path):
    student = tiny.save_student(tmp_path / "student", depth=3, final_norm=True)
    changes = {"segment.decoder": "linear", "segment.auxiliary_channels": 0}
    task = SegmentTask(tiny.segmentation(student, **changes))
    params, extra = task.init(jax.random.key(0))
    params = tiny.randomize(params, seed=1)
    spec, parts = task.export(params, extra)
    windows = tiny.batch(2, side=task.config.data.image_size)["image"]
    want = np.asarray(task.predict(params, extra, {}, {"image": windows}))
    model_folder.save(tmp_path / "model", spec, parts)
    got = fd_jax.load_model(tmp_path / "model").segment(windows, logits=True)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert "norm" in parts["encoder"]
    parts["encoder"]["norm"] = {"scale": np.ones(32, np.float32), "bias": np.ones(32, np.float32)}
    model_folder.save(tmp_path / "other", spec, parts)
    other = fd_jax.load_model(tmp_path / "other").segment(windows, logits=True)
    assert np.abs(other - want).max() > 1e-2 * np.abs(want).max()
