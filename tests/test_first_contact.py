"""What commands say: their flags, their version, a run's account of itself, and what comes next."""

import json
import os
import pathlib
import runpy
import shlex
import subprocess
import sys

import jax
import ml_collections
import numpy as np
from PIL import Image
import pytest

from configs import own_finetune
from fd_jax import __version__, features, sharding
from fd_jax.cli import application, next_steps
from fd_jax.convert import cli as convert
from fd_jax.data import hold_out, prepare
from fd_jax.data.feed import Feed
from fd_jax.diagnose import cli as diagnose
from fd_jax.report import cli as report
from fd_jax.reproduce import __main__ as reproduce
from fd_jax.tasks.distill import DistillTask
from fd_jax.training import account, program
from fd_jax.training.clock import Clock
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent
COMMANDS = {
    "convert": (convert.main, ("import", "export", "sources")),
    "prepare": (prepare.main, ("--name", "--data_dir", "--manual_dir")),
    "features": (features.main, ("--model", "--input", "--tokens")),
    "diagnose": (diagnose.main, ("--model", "--data", "--figures")),
    "hold_out": (hold_out.main, ("--input", "--output", "--every")),
    "report": (report.main, ("--workdir",)),
    "reproduce": (reproduce.main, ("--scale", "--table")),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_flags_and_an_example_and_version_the_version(name, capsys):
    main, flags = COMMANDS[name]
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    assert all(flag in text for flag in flags)
    assert "\n    python -m fd_jax" in text or "\n    convert_checkpoints.py" in text
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert (done.value.code, capsys.readouterr().out) == (0, f"fd_jax {__version__}\n")


def printed(script, flag, capsys, monkeypatch):
    """What a script prints before it exits with status 0."""
    monkeypatch.setattr(sys, "argv", [script, flag])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert done.value.code == 0
    return capsys.readouterr().out


# A script that defines flags can run only once in a process.
@pytest.mark.parametrize(
    "script,own,foreign",
    [
        ("train.py", ("--config ", "--workdir", "--accept_config", "--fall_back"), "--eval_only"),
        ("finetune.py", ("--config ", "--workdir", "--eval_only", "--per_class"), "--logtostderr"),
    ],
)
def test_help_of_the_scripts_lists_their_own_flags(script, own, foreign, capsys, monkeypatch):
    text = printed(script, "--help", capsys, monkeypatch)
    assert all(flag in text for flag in own)
    assert foreign not in text
    assert f"python {script} --config=configs/" in text and "configs/base.py describes" in text


def test_version_of_a_script(capsys, monkeypatch):
    assert printed("train.py", "--version", capsys, monkeypatch) == f"fd_jax {__version__}\n"


@pytest.fixture
def defined(teacher, embedded_data):
    """Makes the config, program and feed of a run with some fields changed."""

    def define(**fields):
        config = tiny.config(teacher, **{"data.data_dir": embedded_data, **fields})
        mesh = sharding.make_mesh(**config.mesh)
        feed = Feed(**config.data)
        steps = feed.steps_per_epoch(config.batch_size)
        built = program.build(
            DistillTask(config), config, mesh, steps_per_epoch=steps, total_steps=config.steps
        )
        return config, built, feed

    return define


def test_a_run_begins_with_what_it_found(defined, tmp_path):
    config, built, feed = defined(steps=20)
    text = account.at_start(
        config,
        built,
        feed,
        attention={"student": "xla"},
        workdir=tmp_path,
        peak=account.peak(built),
    )
    shown = {line.split()[0]: line for line in text.splitlines()}
    params, _ = DistillTask(config).init(jax.random.key(0))
    values = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert f"distillation: {values / 1e6:.3g} M parameters" in shown["task"]
    assert "8 x cpu, mesh data 8, fsdp 1, tensor 1" in shown["devices"]
    assert "photos/train: 1,190 pictures; 13 classes; held out: photos/test: 503" in shown["data"]
    assert "16 pictures of 32 px, 74 steps an epoch" in shown["batch"]
    assert shown["peak"].endswith("0.001 after 2 steps of warm-up")
    assert "20 (0.2703 epochs)" in shown["steps"]


@pytest.mark.parametrize(
    "fields,message",
    [
        ({}, None),
        ({"optim.lr_batch": 150}, None),  # a little more than a tenth
        ({"optim.lr_batch": 512}, "reaches only 3.13e-05, because optim.peak_lr=0.001 is for 512"),
        ({"optim.warmup_epochs": 0.1}, None),
        ({"optim.warmup_epochs": 0.2}, "takes 16 of 20 steps; lower optim.warmup_epochs=0.2"),
    ],
)
def test_settings_that_train_nothing_are_noted(defined, fields, message):
    config, built, _ = defined(steps=20, **fields)
    notes = account.doubts(config, built, peak=account.peak(built))
    assert len(notes) == (message is not None)
    assert message is None or message in notes[0]


def test_the_expected_time_is_that_of_the_first_steps_without_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(batch_size=1, start=5, total=105)
    clock.start()
    now[0] += 20.0
    with clock.paused():
        now[0] += 1000.0
    assert clock.expected(15) == "0:03:20"  # 100 steps of 2 s


def test_one_slow_lap_does_not_change_the_time_that_remains(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(batch_size=1, start=0, total=100)
    clock.start()
    for step, seconds in enumerate((2, 2, 60, 2), start=1):
        now[0] += seconds
        assert clock.lap(step)["step_seconds"] == seconds
    assert clock.remaining(4) == "0:03:12"  # 96 steps of 2 s


@pytest.mark.slow
def test_the_commands_after_distillation_work_as_they_stand(finished, monkeypatch, capsys):
    workdir, _ = finished
    config = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
    mains = {"fd_jax.report": report.main, "fd_jax.features": features.main}
    commands = [shlex.split(c) for c in next_steps.commands(config, workdir, ["train.py"])]
    fine_tuning = commands.pop(1)
    assert fine_tuning[:2] == ["python", "finetune.py"]
    file, _, arguments = fine_tuning[2].partition(":")
    assert file == "--config=configs/own_finetune.py"
    tuned = own_finetune.get_config(arguments)
    assert (tuned.init_from, tuned.model.classes) == (str(workdir / "model"), 13)
    for field in ("name", "split", "eval_split", "data_dir", "image_size"):
        assert tuned.data[field] == config.data[field]
    assert [words[:3] for words in commands] == [["python", "-m", name] for name in mains]
    for words in commands:
        assert mains[words[2]](words[3:]) == 0, capsys.readouterr().err
    assert (workdir / "report" / "report.html").exists()
    assert np.load(workdir / "features.npz")["mean"].shape == (503, 32)


@pytest.mark.parametrize("exif", [False, True])
def test_features_are_those_of_pictures_turned_as_in_the_run(exif, tmp_path):
    config = tiny.fine_tuning("somewhere", **{"data.exif": exif})
    (words,) = [
        shlex.split(command)
        for command in next_steps.commands(config, tmp_path, ["finetune.py"])
        if "fd_jax.features" in command
    ]
    assert ("--exif" in words) == exif


@pytest.mark.slow
def test_pictures_without_classes_or_held_out_ones_are_not_fine_tuned_on(finished, tmp_path):
    workdir, _ = finished
    config = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))

    def offered():
        return "own_finetune" in str(next_steps.commands(config, workdir, ["train.py"]))

    assert offered()
    config.data.eval_split = ""
    assert not offered()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    config.data.update(name=f"folder:{tmp_path}", eval_split="test")
    assert not offered()


def test_after_fine_tuning_the_same_command_measures(tmp_path):
    config = tiny.fine_tuning("somewhere")
    trained = ["finetune.py", "--config=a.py", "--config.note=two words"]
    last = next_steps.commands(config, tmp_path, trained)[-1]
    assert shlex.split(last) == ["python", *trained, "--eval_only", "--per_class"]
    config.data.eval_split = ""
    assert "eval_only" not in str(next_steps.commands(config, tmp_path, trained))


NOISE = "import os; from fd_jax import console\nwith console.quiet(): os.write(2, b'noise')"


DISTRIBUTED = """
import socket
import jax
with socket.socket() as sock:
    sock.bind(("localhost", 0))
    port = sock.getsockname()[1]
jax.distributed.initialize(f"localhost:{port}", 1, 0)
"""


WARNING = """
import logging
from fd_jax import console
with console.quiet():
    logging.getLogger("jax._src.xla_bridge").warning("noise")
"""


@pytest.mark.parametrize(
    "code,shown",
    [
        (NOISE, False),
        (WARNING, True),
        *(
            pytest.param(code, True, marks=pytest.mark.slow)
            for code in (
                f"{NOISE}; raise KeyError",
                f"from absl import logging; logging.set_verbosity(0)\n{NOISE}",
                f"{DISTRIBUTED}{NOISE}",
            )
        ),
    ],
)
def test_noise_of_libraries_is_shown_only_if_they_fail_or_on_request(code, shown):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ("noise" in done.stderr) == shown


ENDLESS = """
import sys
from fd_jax.cli import application
def main(argv):
    while True:
        print("line", flush=True)
application.run_app(main)
"""
BROKEN = """
import errno
from fd_jax.cli import application
def main(argv):
    raise BrokenPipeError(errno.EPIPE, "a worker has died")
application.run_app(main)
"""


def test_a_command_ends_quietly_when_nobody_reads_on():
    command = [sys.executable, "-c", ENDLESS]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == application.READER_LEFT
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" in done.stderr and done.returncode == 1


def test_a_bar_on_a_terminal_and_lines_in_a_file():
    code = """
from fd_jax.console import bar, say
with bar(start=2, total=4) as shown:
    for step in (3, 4):
        shown.step()
        shown.log(f"line {step}", short=f"short {step}")
    say("said")
"""
    command = [sys.executable, "-c", code]
    in_file = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert in_file.stdout == "line 3\nline 4\nsaid\n"
    ours, theirs = os.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    subprocess.run(command, stdout=theirs, stderr=theirs, cwd=ROOT, check=True)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # how a terminal ends
        pass
    text = shown.decode()
    assert "4/4" in text and "short 4" in text and "said" in text
    assert "line 3" not in text
