"""The command in real processes: killed and given again, and several that share the work."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import ports, tiny, xla

ROOT = pathlib.Path(__file__).parent.parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_teacher(tmp_path_factory.mktemp("models") / "teacher")


def start(folder, data, output, *flags, devices=1):
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla.flags(devices),
    }
    command = [sys.executable, "-m", "fd_jax.diagnose", f"--model={folder}", "--data=digits:test"]
    command += [f"--data_dir={data}", f"--output={output}", "--threads=2", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def numbers(output):
    result = json.loads((output / "figures.json").read_text())
    return {name: value for name, value in result.items() if name != "command"}


def test_a_killed_command_gives_the_same_figures_when_given_again(folder, embedded_data, tmp_path):
    flags = ("--batch_size=1", "--save_every=0")
    finish(start(folder, embedded_data, tmp_path / "whole", *flags))
    killed = start(folder, embedded_data, tmp_path / "killed", *flags)
    partial = tmp_path / "killed" / "partial.npz"
    while not partial.exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "figures.json").exists()
    output = finish(start(folder, embedded_data, tmp_path / "killed", *flags))
    assert "going on after" in output
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert not partial.exists()


def test_two_processes_share_the_images_and_give_the_same_figures(folder, embedded_data, tmp_path):
    finish(start(folder, embedded_data, tmp_path / "one", "--batch_size=16", devices=1))
    port = ports.free()
    flags = ("--batch_size=16", f"--coordinator=localhost:{port}", "--num_processes=2")
    processes = [
        start(folder, embedded_data, tmp_path / "two", *flags, f"--process_id={i}", devices=2)
        for i in range(2)
    ]
    first, second = map(finish, processes)
    assert "report.html" in first and "report.html" not in second
    one, two = (numbers(tmp_path / name)["models"]["teacher"] for name in ("one", "two"))
    for name in ("distance", "dropped", "similarity", "entropy", "divergence", "maps"):
        np.testing.assert_allclose(one[name], two[name], rtol=2e-6, atol=1e-7)
