"""The command with the real compiler: what it says when, what it saves, and how it is stopped."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIG = """
from tests import tiny

def get_config(arg=""):
    config = tiny.config({teacher!r}, **{{"batch_size": 64, "teacher.source": "tiny"}})
    if arg:
        config.student.arch.update(width=int(arg), mlp_width=4 * int(arg), heads=int(arg) // 128)
    return config
"""

pytestmark = pytest.mark.slow  # the compiler takes 10 s


@pytest.fixture(scope="module")
def config(teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "tiny_plan.py"
    path.write_text(CONFIG.format(teacher=teacher))
    return path


def start(config, *flags, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, "-m", "fd_jax.plan", f"--config={config}", "--topology=v5e:2x2", *flags],
        cwd=ROOT,
        env={**inherited, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_compiler_at_once_and_without_a_trace(config, tmp_path, number):
    output = tmp_path / "plan.json"
    planning = start(config, f"--output={output}", JAX_LOG_COMPILES="1")
    for line in planning.stderr:
        if "Finished jaxpr to MLIR module conversion jit(step)" in line:
            break
    planning.send_signal(number)
    said, complaints = planning.communicate(timeout=60)
    assert planning.returncode == 128 + number
    *_, compiling, stopped = said.splitlines()
    assert compiling.startswith("compiling the step for 4 devices of v5e:2x2 at effort 0, roughly ")
    assert stopped == f"stopped by {number.name}"
    # Without our handlers, SIGTERM prints the stacks of libtpu, and SIGINT waits for the compiler.
    assert not complaints and not output.exists()


def test_the_plan_of_the_config_comes_first(config, tmp_path):
    """It is printed and saved before anything else is compiled, and a stop leaves it."""
    output = tmp_path / "plan.json"
    planning = start(f"{config}:7168", f"--output={output}", "--effort=-1", "--advice")
    lines = []
    for line in planning.stdout:
        lines.append(line.split("  ")[0].strip())
        if line.startswith("looking for settings that fit"):
            break
    plan = json.loads(output.read_text())
    assert not plan["fits"] and plan["over_by_bytes"] > 0
    assert (plan["tried"], plan["remedy"]) == ([], None)
    assert lines[:2] == ["slice", "teacher"]
    assert lines[-3:-1] == ["does not fit", f"written to {output}"]
    planning.send_signal(signal.SIGINT)
    said, complaints = planning.communicate(timeout=60)
    assert planning.returncode == 130 and said == "stopped by SIGINT\n" and not complaints
    assert json.loads(output.read_text()) == plan


def test_nothing_is_looked_for_at_the_lowest_effort_unless_asked(config):
    planning = start(f"{config}:7168", "--effort=-1")
    said, complaints = planning.communicate(timeout=200)
    assert planning.returncode == 1, complaints
    assert "looking for" not in said
    assert said.endswith("\n--advice looks for settings that fit\n")


def test_settings_that_fit_are_planned(config, tmp_path):
    output = tmp_path / "plan.json"
    flags = (f"--output={output}", "--effort=-1", "--advice")
    planning = start(f"{config}:7168", *flags)
    said, complaints = planning.communicate(timeout=400)
    assert planning.returncode == 1, complaints
    plan = json.loads(output.read_text())
    (attempt,) = plan["tried"]
    assert attempt["fits"] and attempt["changes"] == {"mesh.data": 1, "mesh.fsdp": -1}
    remedy = plan["remedy"]
    assert remedy["fits"] and remedy["mesh"]["fsdp"] == 4
    memory = remedy["hbm_bytes_per_device"]
    assert attempt["hbm"] == memory["total"] < memory["capacity"]
    assert "\nwith --config.mesh.data=1 --config.mesh.fsdp=-1\nslice " in said
