"""Several real processes through `train.py`: same losses, one writer, and a common stop."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import fd_jax
from fd_jax.training import loop, metric_writer
from tests import ports, tiny, xla
from tests.training import wandb_records

ROOT = pathlib.Path(__file__).parent.parent.parent
DEVICES = 2  # fake devices of each process

CONFIG = """
from tests import tiny

FIELDS = {{"data.data_dir": {data!r}, "mesh.fsdp": 2, "eval.knn": 5}}

def get_config(arg=""):
    return tiny.{recipe}({start!r}, **FIELDS)
"""


@pytest.fixture(scope="module")
def config_file(teacher, embedded_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "tiny_processes.py"
    path.write_text(CONFIG.format(recipe="config", start=teacher, data=embedded_data))
    return path


@pytest.fixture(scope="module")
def classifying_config_file(embedded_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifying")
    student = tiny.save_student(folder / "student")
    path = folder / "tiny_classifying.py"
    path.write_text(CONFIG.format(recipe="fine_tuning", start=student, data=embedded_data))
    return path


class Run:
    """`count` processes of one training run; `wait` kills those that are still running."""

    def __init__(self, config_file, workdir, count, *flags, devices=DEVICES, script="train.py"):
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONFAULTHANDLER": "1",  # prints a traceback if a signal kills the process
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "XLA_FLAGS": xla.flags(devices),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, script, f"--config={config_file}", f"--workdir={workdir}"]
        if count > 1:
            command += [f"--coordinator=localhost:{ports.free()}", f"--num_processes={count}"]
        self.processes = [
            subprocess.Popen(
                [*command, *([f"--process_id={i}"] if count > 1 else []), *flags],
                cwd=ROOT,
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for i in range(count)
        ]

    def wait(self, timeout=240):
        """Returns exit statuses and outputs."""
        try:
            outputs = [process.communicate(timeout=timeout)[0] for process in self.processes]
        finally:
            self.kill()
        return [process.returncode for process in self.processes], outputs

    def wait_for_step(self, step):
        lines = []
        for line in self.processes[0].stdout:
            lines.append(line)
            if line.startswith(f"step {step}/"):
                return
        self.kill()
        raise AssertionError("".join(lines))

    def kill(self):
        for process in self.processes:
            process.kill()  # has no effect on a process that has ended


def losses(workdir):
    return np.array([row["loss"] for row in metric_writer.read(workdir) if "loss" in row])


def evaluations(workdir):
    """The evaluations of a run, each as a sorted list of (name, value)."""
    rows = [row for row in metric_writer.read(workdir) if "eval_loss" in row]
    return [sorted((k, v) for k, v in row.items() if k.startswith("eval_")) for row in rows]


def assert_same_evaluations(left, right):
    left, right = evaluations(left), evaluations(right)
    assert left and len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert [name for name, _ in one] == [name for name, _ in other]
        assert "eval_knn_top1" in dict(one)
        np.testing.assert_allclose([v for _, v in one], [v for _, v in other], rtol=1e-6)


@pytest.fixture(scope="module")
def one_process(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    statuses, outputs = Run(config_file, workdir, 1, devices=4).wait()
    assert statuses == [0], "\n".join(outputs)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("count,devices", [(2, 2), (4, 2)])
def test_several_processes_give_the_losses_of_one(
    one_process, config_file, tmp_path, count, devices
):
    statuses, outputs = Run(config_file, tmp_path, count, devices=devices).wait()
    assert statuses == [0] * count, "\n".join(outputs)
    np.testing.assert_allclose(losses(tmp_path), losses(one_process), rtol=1e-6)
    assert_same_evaluations(tmp_path, one_process)
    # Only one process writes: one row per step, and progress lines from the first process only.
    rows = metric_writer.read(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert "step 1/6" in outputs[0]
    assert not any(re.search(r"^step ", output, re.M) for output in outputs[1:])
    ours, theirs = (fd_jax.load_model(folder / "model") for folder in (tmp_path, one_process))
    kernel = ("blocks", "1", "mlp", "fc1", "kernel")
    a, b = ours.params["encoder"], theirs.params["encoder"]
    for name in kernel:
        a, b = a[name], b[name]
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_classifying_with_two_processes_gives_the_figures_of_one(classifying_config_file, tmp_path):
    """With mixing, accuracy and neighbours, over a split that no number of processes divides."""
    flags = ("--config.data.eval_split=test[:97]", "--config.eval.batches=0")
    for count, devices, folder in ((1, 4, "one"), (2, 2, "two")):
        run = Run(
            classifying_config_file,
            tmp_path / folder,
            count,
            *flags,
            devices=devices,
            script="finetune.py",
        )
        statuses, outputs = run.wait()
        assert statuses == [0] * count, "\n".join(outputs)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-6)
    assert_same_evaluations(tmp_path / "two", tmp_path / "one")

    # For --throughput both processes have to agree on the number of steps.
    measuring = (*flags, "--eval_only", "--throughput")
    run = Run(classifying_config_file, tmp_path / "two", 2, *measuring, script="finetune.py")
    statuses, outputs = run.wait()
    assert statuses == [0] * 2, "\n".join(outputs)
    measured = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert measured["images_per_second"] > 0
    for name, value in evaluations(tmp_path / "one")[-1]:
        np.testing.assert_allclose(measured[name.removeprefix("eval_")], value, rtol=1e-6)


ACROSS = ("--config.mesh.data=1", "--config.mesh.fsdp=-1")  # no process holds a whole parameter


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_at_one_step_and_one_process_can_resume(
    one_process, config_file, tmp_path
):
    """It resumes on another mesh, from a checkpoint of which each process wrote a part."""
    run = Run(config_file, tmp_path, 2, *ACROSS)
    run.wait_for_step(1)
    os.kill(run.processes[1].pid, signal.SIGTERM)
    statuses, outputs = run.wait()
    assert statuses == [loop.PREEMPTED] * 2, "\n".join(outputs)
    assert "stopped by SIGTERM at step" in outputs[0]
    reached = int(re.search(r"at step (\d+)", outputs[0]).group(1))
    assert 0 < reached < 6
    assert (tmp_path / "checkpoints" / str(reached)).is_dir()
    mesh = ("--accept_config", "--config.mesh.data=2", "--config.mesh.fsdp=1")
    run = Run(config_file, tmp_path, 1, *mesh, "--config.mesh.tensor=2", devices=4)
    statuses, outputs = run.wait()
    assert statuses == [0], "\n".join(outputs)
    np.testing.assert_allclose(losses(tmp_path), losses(one_process), rtol=1e-6)


@pytest.mark.slow
def test_run_stopped_by_sigterm_before_its_first_step_resumes_bit_for_bit(
    one_process, config_file, tmp_path
):
    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    statuses, outputs = Run(config_file, unbroken, 2, *ACROSS).wait()
    assert statuses == [0] * 2, "\n".join(outputs)
    np.testing.assert_allclose(losses(unbroken), losses(one_process), rtol=1e-6)

    run = Run(config_file, stopped, 2, *ACROSS)
    wait_for(stopped / "config.json")  # before the step is compiled
    os.kill(run.processes[1].pid, signal.SIGTERM)
    statuses, outputs = run.wait()
    assert statuses == [loop.PREEMPTED] * 2, "\n".join(outputs)
    assert "stopped by SIGTERM at step 1;" in outputs[0]
    statuses, outputs = Run(config_file, stopped, 2, *ACROSS).wait()
    assert statuses == [0] * 2, "\n".join(outputs)
    assert losses(stopped).tolist() == losses(unbroken).tolist()
    assert evaluations(stopped) == evaluations(unbroken)
    ours, theirs = (fd_jax.load_model(folder / "model").params for folder in (stopped, unbroken))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def wait_for(path, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear within {seconds} s"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_other_stops_with_a_message(config_file, tmp_path, victim):
    """It stops soon after the heartbeat timeout, a flag whose default is 100 s."""
    run = Run(config_file, tmp_path, 2, "--heartbeat_timeout=10", "--config.steps=100000")
    run.wait_for_step(2)
    run.processes[victim].kill()
    statuses, outputs = run.wait(timeout=60)  # ten seconds, plus some for a busy machine
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] not in (0, loop.PREEMPTED)
    output = outputs[1 - victim]
    assert re.search(r"unhealthy|heartbeat|UNAVAILABLE|closed by peer|coordination", output, re.I)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2], ids=["one process", "two processes"])
def test_a_second_run_on_a_workdir_is_refused_and_the_first_goes_on(config_file, tmp_path, count):
    first = Run(config_file, tmp_path, 1, "--config.steps=2000")
    first.wait_for_step(1)
    statuses, outputs = Run(config_file, tmp_path, count, "--config.steps=2000").wait()
    assert statuses == [2] * count, "\n".join(outputs)
    pid = first.processes[0].pid
    assert f"error: {tmp_path} is in use by process {pid} on" in outputs[0]
    if count > 1:
        assert "the first process cannot use the workdir" in outputs[1]
    first.processes[0].terminate()
    statuses, outputs = first.wait()
    assert statuses == [loop.PREEMPTED], "\n".join(outputs)
    steps = [row["step"] for row in metric_writer.read(tmp_path) if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    # Stopped, it has left the workdir to the next run.
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script,count", [("train.py", 2), ("finetune.py", 1)])
def test_the_first_process_logs_to_wandb(
    script, count, config_file, classifying_config_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = config_file if script == "train.py" else classifying_config_file
    statuses, outputs = Run(config, tmp_path, count, "--wandb", script=script).wait()
    assert statuses == [0] * count, "\n".join(outputs)
    (records,) = wandb_records.parts(tmp_path)
    assert wandb_records.rows(records) == metric_writer.read(tmp_path)
    assert sum("\n  wandb      offline in " in output for output in outputs) == 1
    assert f"python -m fd_jax.report --workdir={tmp_path} --wandb" in outputs[0]
