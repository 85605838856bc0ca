"""Segmentation as users run it, from a model folder and pictures to a measured segmenter."""

import jax
import ml_collections
import numpy as np
import pytest

from fd_jax import model_folder
from fd_jax.cli import measure
from fd_jax.errors import ConfigError, DataError
from fd_jax.tasks import registry
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
        ({"eval.mode": "whole"}, ConfigError, "set eval.mode='slide'"),
    ):
        wrong = ml_collections.ConfigDict(config.to_dict())
        wrong.update_from_flattened_dict(fields)
        with pytest.raises(error, match=message):
            loop.fit(registry.make(wrong), wrong, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_eval_only_is_for_classifiers(config, tmp_path):
    with pytest.raises(ConfigError, match="--eval_only measures classifiers"):
        measure.measure(config, tmp_path)
