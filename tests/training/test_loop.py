"""The training loop as users run it: real data, real checkpoints, kills and resumption."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import fd_jax
from fd_jax import checkpoint
from fd_jax.errors import CheckpointError, ConfigError, DataError, ModelFolderError, UserError
from fd_jax.evaluation import evaluators
from fd_jax.tasks.distill import DistillTask
from fd_jax.training import loop, metric_writer
from fd_jax.training import workdir as workdirs
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent.parent
STEPS = 6


@pytest.fixture
def config(teacher, embedded_data):
    return tiny.config(teacher, **{"data.data_dir": embedded_data})


def fit(config, workdir, **kwargs):
    return loop.fit(DistillTask(config), config, workdir, **kwargs)


def losses(workdir):
    return [row["loss"] for row in metric_writer.read(workdir) if "loss" in row]


def test_workdir_has_the_documented_contents(finished):
    workdir, result = finished
    assert result.step == STEPS and not result.preempted
    assert set(result.evaluation) == {"eval_loss", "eval_cosine"}
    assert len(losses(workdir)) == STEPS
    names = {path.name for path in workdir.iterdir()}
    assert {"config.json", "checkpoints", "metrics.jsonl", "tensorboard", "model"} <= names
    assert list((workdir / "tensorboard").iterdir())
    assert list((workdir / "profile").rglob("*.xplane.pb")), "no trace of config.profile_steps"
    row = metric_writer.read(workdir)[0]
    wanted = {"loss", "grad_norm", "param_norm", "learning_rate", "images_per_second", "input_wait"}
    assert wanted <= row.keys()


def test_exported_model_folder_loads_and_returns_features(finished):
    workdir, _ = finished
    model = fd_jax.load_model(workdir / "model")
    assert set(model.params) == {"encoder", "projector"}
    features = model(model.preprocess(tiny.batch(2)["image"]))
    assert features.tokens.shape == (2, 17, 32)
    assert model.spec.arch["position"] == "shared_rpb"


def test_checkpoint_does_not_contain_the_teacher(finished, teacher):
    workdir, _ = finished
    saved = checkpoint.load_tree(
        fd_jax.model_folder.epath.Path(workdir) / "checkpoints" / str(STEPS) / "state"
    )
    assert set(saved) == {"step", "params", "opt_state", "extra"}
    sizes = {leaf.shape for leaf in jax.tree.leaves(saved)}
    teacher_only = {(48, 3, 48), (48, 96), (96, 48)}
    assert not sizes & teacher_only


def test_running_a_finished_run_again_does_not_train(finished, config):
    workdir, _ = finished
    before = losses(workdir)
    assert fit(config, workdir).step == STEPS
    assert losses(workdir) == before


def test_changed_config_is_refused_unless_accepted(config, tmp_path):
    workdirs.claim(tmp_path, config, accept=False)
    workdirs.claim(tmp_path, config, accept=False)
    config.optim.peak_lr = 1.0
    with pytest.raises(CheckpointError, match=r"optim.peak_lr: 0.001 -> 1.0\n.*--accept_config"):
        workdirs.claim(tmp_path, config, accept=False)
    workdirs.claim(tmp_path, config, accept=True)
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["peak_lr"] == 1.0


COMMAND = """
import sys
sys.path.insert(0, {root!r})
from tests import conftest, tiny
from fd_jax.training import loop
from fd_jax.tasks.distill import DistillTask
config = tiny.config({teacher!r}, **{{"data.data_dir": {data!r}}})
result = loop.fit(DistillTask(config), config, {workdir!r})
sys.exit(loop.PREEMPTED if result.preempted else 0)
"""


def start_run(teacher, data, workdir):
    command = COMMAND.format(root=str(ROOT), teacher=teacher, data=data, workdir=str(workdir))
    return subprocess.Popen(
        [sys.executable, "-c", command], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def wait_for_step(process, step):
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(f"the run ended before step {step}: {process.wait()}")


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(finished, teacher, embedded_data, tmp_path):
    """SIGKILL after a random step; the same command then gives the losses of an unbroken run."""
    step = int(np.random.default_rng(time.time_ns()).integers(2, STEPS))
    killed = start_run(teacher, embedded_data, tmp_path)
    wait_for_step(killed, step)
    killed.kill()
    killed.wait()
    resumed = start_run(teacher, embedded_data, tmp_path)
    assert resumed.wait() == 0
    assert losses(tmp_path) == losses(finished[0]), f"killed after step {step}"


@pytest.mark.slow
def test_sigterm_saves_the_run_and_sets_the_exit_status(finished, teacher, embedded_data, tmp_path):
    stopped = start_run(teacher, embedded_data, tmp_path)
    wait_for_step(stopped, 1)
    os.kill(stopped.pid, signal.SIGTERM)
    assert stopped.wait() == loop.PREEMPTED
    assert not (tmp_path / "model").exists()
    resumed = start_run(teacher, embedded_data, tmp_path)
    assert resumed.wait() == 0
    assert losses(tmp_path) == losses(finished[0])


@pytest.mark.slow
def test_a_run_interrupted_during_evaluation_resumes_with_that_evaluation(
    config, tmp_path, monkeypatch
):
    """The state was saved before, and the means in the log span the interruption."""
    config.update(log_every=4)
    config.checkpoint.every = 3
    config.eval.every = 3
    whole = fit(config, tmp_path / "whole")

    class Interruption(Exception):
        pass

    def interrupt(*args, **kwargs):
        raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(evaluators.HeldOut, "__call__", interrupt)
        with pytest.raises(Interruption):
            fit(config, tmp_path / "cut")
    assert fit(config, tmp_path / "cut").evaluation == whole.evaluation
    kept = ("step", "loss", "grad_norm", "eval_loss", "eval_cosine")
    rows = [
        [{k: row[k] for k in kept if k in row} for row in metric_writer.read(tmp_path / name)]
        for name in ("whole", "cut")
    ]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [3, 4, 6, 6]
    # A finished run returns its last evaluation without repeating it.
    before = (tmp_path / "cut" / metric_writer.FILE_NAME).read_text()
    assert fit(config, tmp_path / "cut").evaluation == whole.evaluation
    assert (tmp_path / "cut" / metric_writer.FILE_NAME).read_text() == before


def test_damaged_checkpoint_is_named(config, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "checkpoints" / str(STEPS) / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=rf"checkpoints/{STEPS}.*(\n.*)*--fall_back"):
        fit(config, tmp_path)


@pytest.mark.slow
def test_a_run_falls_back_to_the_newest_whole_checkpoint_bit_for_bit(config, finished, tmp_path):
    """The damaged one stays on the disk, out of the way of the one that replaces it."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert len(steps) > 1 and steps[-1] == STEPS
    for path in (tmp_path / "checkpoints" / str(STEPS) / "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=f"checkpoints/{STEPS}"):
        fit(config, tmp_path)
    assert fit(config, tmp_path, fall_back=True).step == STEPS
    assert losses(tmp_path) == losses(finished[0])
    assert (tmp_path / "damaged_checkpoints" / str(STEPS)).is_dir()
    assert fit(config, tmp_path).step == STEPS
    ours, theirs = (fd_jax.load_model(p / "model").params for p in (tmp_path, finished[0]))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_without_a_whole_checkpoint_falling_back_says_so(config, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints").iterdir():
        shutil.rmtree(path / "state")
    with pytest.raises(CheckpointError, match="none of the checkpoints of steps .* is whole"):
        fit(config, tmp_path, fall_back=True)
    assert list((tmp_path / "checkpoints").iterdir())


def test_checkpoint_of_another_state_is_reported_as_such_and_not_as_damaged(
    config, finished, tmp_path
):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    config.ema_decay = 0.9
    message = (
        r"does not hold the state that this config trains; \d+ arrays differ:\n"
        r"  ema/.*: \(absent\) -> .*\n(.*\n)+Go back to the config"
    )
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(CheckpointError, match=message):
        fit(config, tmp_path, accept_config=True)
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.slow
def test_nonfinite_steps_stop_the_run_and_their_examples_are_named(config, tmp_path):
    config.optim.update(peak_lr=1e35, weight_decay=0.0)
    config.max_nonfinite = 2
    with pytest.raises(loop.NonFiniteError, match=r"2 steps in a row.*examples are \[\d+"):
        fit(config, tmp_path)


@pytest.mark.slow
def test_a_state_that_is_not_finite_is_neither_saved_nor_exported(config, tmp_path, monkeypatch):
    """Loss and gradients are finite, but the optimizer's moments overflow."""
    config.checkpoint.every = 1
    real = loop.TrainState.to_dict

    def overflown(state):
        tree = real(state)
        if int(state.step) < 3:
            return tree
        return {
            **tree,
            "opt_state": jax.tree.map(lambda x: x * np.float32(np.inf), tree["opt_state"]),
        }

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainState, "to_dict", overflown)
        with pytest.raises(
            loop.NonFiniteError, match=r"opt_state/.*the last checkpoint, of step 2, is"
        ):
            fit(config, tmp_path)
    assert not (tmp_path / "model").exists()
    assert fit(config, tmp_path).step == STEPS  # from step 2


def test_missing_teacher_is_named_before_any_work(config, tmp_path):
    config.teacher.path = str(tmp_path / "nowhere")
    with pytest.raises(ModelFolderError, match="no model folder at .*nowhere.*import"):
        fit(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unprepared_dataset_is_named_before_any_work(config, tmp_path):
    config.data.data_dir = str(tmp_path / "empty")
    with pytest.raises(DataError, match=r"python -m fd_jax.data.prepare --name=photos"):
        fit(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"optim.peak_lr": float("nan")}, "optim.peak_lr=nan: expected"),
        ({"epochs": 0.01, "steps": 0}, "optim.warmup_epochs=0.01, epochs=0.01"),
        ({"epochs": 1e-4, "steps": 0, "optim.warmup_epochs": 0.0}, "epochs=0.0001 are 0 steps"),
        ({"optim.warmup_epochs": 1e6}, "but the run has 6"),
        ({"eval.knn": 100_000}, "eval.knn=100000, but photos/train has only"),
        ({"init_from": "nowhere"}, "no model folder at nowhere"),
        ({"data.split": "train[5:3]"}, r"train\[5:3\]"),
        ({"data.rand_augment": "rand-m99"}, "rand_augment='rand-m99'"),
        ({"mesh.tensor": 3}, "does not fit"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_before_the_workdir_is_claimed(
    config, tmp_path, changes, message
):
    """The right command can then use the same workdir."""
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        fit(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_dataset_smaller_than_one_batch_is_refused(config, tmp_path):
    config.batch_size = 4096
    with pytest.raises(DataError, match="fewer than one batch of 4096"):
        fit(config, tmp_path / "run")


def test_seed_that_is_not_a_uint32_is_refused(config, tmp_path):
    config.seed = -1
    with pytest.raises(ConfigError, match="seed=-1: expected a whole number from 0"):
        fit(config, tmp_path / "run")


def test_batch_size_that_does_not_fit_the_mesh_is_refused(config, tmp_path):
    config.batch_size = 12
    with pytest.raises(ConfigError, match="batch_size 12"):
        fit(config, tmp_path / "run")
