"""Workdirs and model folders that an earlier version wrote still resume and load.

`fixtures/saved_runs.tar.gz` was written by version 0.1 before its modules were moved, on eight CPU
devices with the settings of `conftest.py`. It holds a toy teacher, the workdir of its distillation
that SIGTERM stopped after 3 of 6 steps, the model folder of the same run without interruption, and
a fine-tuned model folder with a classifier head.
"""

import json
import pathlib
import tarfile

import jax
import ml_collections
import numpy as np
import pytest

import fd_jax
from fd_jax import model_folder
from fd_jax.tasks.distill import DistillTask
from fd_jax.training import loop
from tests import tiny

ARCHIVE = pathlib.Path(__file__).parent / "fixtures" / "saved_runs.tar.gz"


@pytest.fixture
def saved(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "saved_runs"


@pytest.mark.slow
def test_a_stopped_run_of_version_0_1_resumes_to_the_weights_of_the_unbroken_run(
    saved, embedded_data, monkeypatch
):
    (saved / "data").symlink_to(embedded_data)
    monkeypatch.chdir(saved)
    stored = json.loads((saved / "workdir" / "config.json").read_text())
    config = ml_collections.ConfigDict(stored)
    result = loop.fit(DistillTask(config), config, "workdir")
    assert (result.step, result.preempted) == (6, False)
    assert len((saved / "workdir" / "metrics.jsonl").read_text().splitlines()) == 7

    spec, weights = model_folder.load("workdir/model")
    wanted_spec, wanted = model_folder.load("distilled")
    assert spec == wanted_spec
    # The weights are not equal bit for bit: the vector width of the CPU changes the order of sums.
    assert jax.tree.structure(weights) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), weights, wanted)


def test_model_folders_of_version_0_1_load(saved):
    for name, parts in (("distilled", {"encoder", "projector"}), ("finetuned", {"head"})):
        model = fd_jax.load_model(saved / name)
        assert parts <= model.params.keys()
        features = model(model.preprocess(tiny.batch(2)["image"]))
        assert features.tokens.shape == (2, 17, 8)
