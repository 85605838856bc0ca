"""Storage that fails under a run: one message, no waiting, and the same command goes on."""

import errno
import os
import pathlib
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fd_jax
from fd_jax import checkpoint, console, features, storage
from fd_jax.convert import cli as convert
from fd_jax.data import prepare
from fd_jax.errors import DataError, ModelFolderError, StorageError
from fd_jax.reproduce import __main__ as reproduce
from fd_jax.tasks.distill import DistillTask
from fd_jax.training import loop, metric_writer
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_every_remedy_is_a_sentence_about_an_error_that_exists():
    for code in storage.REMEDIES:
        text = storage.message(code, "/data/run")
        assert text.startswith(f"/data/run: {os.strerror(code)}; ") and "\n" not in text


@pytest.mark.parametrize(
    "error, path, code",
    [
        (OSError(errno.EIO, "Input/output error", "/data/a"), "/data/a", errno.EIO),
        (OSError(errno.EROFS, "no", "/data/a.new", None, "/data/a"), "/data/a", errno.EROFS),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "/run", errno.EDQUOT),
        (
            ValueError(
                'FAILED_PRECONDITION: Error writing local file "/run/checkpoints/28.orbax-'
                'checkpoint-tmp/state.orbax-checkpoint-tmp/ocdbt.process_0/d/1f": Failed: File too '
                "large [os_error_code='27']"
            ),
            "/run/checkpoints/28",
            errno.EFBIG,
        ),
        (
            ValueError(
                'Error reading local file "/mnt/d/run/checkpoints/28/state/ocdbt.process_0/d/1f": '
                "Input/output error [os_error_code='5']"
            ),
            "/mnt/d/run/checkpoints/28/state",
            errno.EIO,
        ),
        (
            OSError(errno.ENOSPC, "full", "/mnt/d/runs/x/metrics.jsonl"),
            "/mnt/d/runs/x/metrics.jsonl",
            errno.ENOSPC,
        ),
        (
            RuntimeError("RESOURCE_EXHAUSTED: /run/tensorboard/events.1; No space left on device"),
            "/run/tensorboard/events.1",
            errno.ENOSPC,
        ),
    ],
    ids=["path", "renamed", "no path", "TensorStore", "drive D", "a file of it", "TensorFlow"],
)
def test_errors_of_the_system_are_recognised_in_whatever_form(error, path, code):
    wrapped = RuntimeError("a thread failed")
    wrapped.__cause__ = error
    for raised in (error, wrapped, ExceptionGroup("several", [ValueError("x"), error])):
        assert str(storage.explained(raised, "/run")) == storage.message(code, path)


@pytest.mark.parametrize(
    "error",
    [
        TypeError("unsupported operand"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes"),
        KeyError("step"),
        RuntimeError("INTERNAL: ptxas: No such file or directory"),
        ValueError("[Errno 5] is what they wrote into a column"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        DataError("a.jpg: [Errno 5] Input/output error: '/data/a.jpg'"),
    ],
    ids=repr,
)
def test_other_errors_keep_their_traceback(error):
    assert storage.explained(error, "/run") is None
    with pytest.raises(type(error)), storage.one_message("/run"):
        raise error


def test_a_program_that_does_not_exist_keeps_its_traceback():
    with pytest.raises(FileNotFoundError), storage.one_message("/run"):
        subprocess.run(["/usr/nowhere/ptxas"])


def test_an_error_while_another_is_handled_is_not_its_cause():
    try:
        try:
            open("/nowhere/at/all")
        except OSError:
            raise TypeError("a bug in the handler")  # noqa: B904
    except TypeError as error:
        assert storage.explained(error) is None


@pytest.fixture
def config(teacher, embedded_data):
    return tiny.config(teacher, **{"data.data_dir": embedded_data, "profile_steps": 0})


def fit(config, workdir, **kwargs):
    return loop.fit(DistillTask(config), config, workdir, **kwargs)


def at_step(monkeypatch, step, saved, action):
    """Something happens when the line of a step is printed and a checkpoint is complete."""
    real = console.say

    def say(text):
        real(text)
        if text.startswith(f"step {step}/"):
            wait_for(saved)
            action()

    monkeypatch.setattr(console, "say", say)


def wait_for(path, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path} after {seconds} s"
        time.sleep(0.01)


class Fault:
    """The base of faults; `undo` brings back what was there."""

    def __init__(self, workdir):
        self.workdir, self.aside = workdir, workdir.parent / "aside"


class FileInPlaceOfTheCheckpoints(Fault):
    names = "checkpoints"

    def begin(self):
        (self.workdir / "checkpoints").rename(self.aside)
        (self.workdir / "checkpoints").write_text("a file\n")

    def undo(self):
        (self.workdir / "checkpoints").unlink()
        self.aside.rename(self.workdir / "checkpoints")


class WorkdirMovedAway(Fault):
    names = "(checkpoints|metrics.jsonl|config.json)"

    def begin(self):
        self.workdir.rename(self.aside)

    def undo(self):
        shutil.rmtree(self.workdir, ignore_errors=True)  # what Orbax makes anew
        self.aside.rename(self.workdir)


class FolderInPlaceOfTheMetrics(Fault):
    names = "metrics.jsonl: Is a directory; a file is where a folder should be, or the reverse"

    def begin(self):
        (self.workdir / "metrics.jsonl").rename(self.aside)
        (self.workdir / "metrics.jsonl").mkdir()

    def undo(self):
        (self.workdir / "metrics.jsonl").rmdir()
        self.aside.rename(self.workdir / "metrics.jsonl")


class SmallFilesOnly(Fault):
    names = "File too large; raise the limit of the size of a file"

    def begin(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, self.before[1]))

    def undo(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        FileInPlaceOfTheCheckpoints,
        pytest.param(WorkdirMovedAway, marks=pytest.mark.slow),
        pytest.param(FolderInPlaceOfTheMetrics, marks=pytest.mark.slow),
        pytest.param(SmallFilesOnly, marks=pytest.mark.slow),
    ],
)
def test_a_fault_in_mid_run_is_one_message_and_loses_nothing(
    kind, config, finished, tmp_path, monkeypatch
):
    fault = kind(tmp_path / "run")
    with monkeypatch.context() as patch:
        at_step(patch, 4, tmp_path / "run" / "checkpoints" / "2", fault.begin)
        try:
            with pytest.raises(StorageError, match=kind.names) as caught:
                fit(config, tmp_path / "run")
        finally:
            fault.undo()
    assert "\n" not in str(caught.value) and str(caught.value).endswith(storage.AGAIN)
    assert 2 in [int(path.name) for path in (tmp_path / "run" / "checkpoints").glob("[0-9]")]
    assert fit(config, tmp_path / "run").step == 6
    losses = [
        [row.get("loss") for row in metric_writer.read(w)] for w in (tmp_path / "run", finished[0])
    ]
    assert losses[0] == losses[1]
    ours, theirs = (fd_jax.load_model(w / "model").params for w in (tmp_path / "run", finished[0]))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("name", ["model", "best"])
def test_a_foreign_folder_in_the_place_of_a_model_is_refused_at_the_start(config, tmp_path, name):
    config.eval.keep_best = "loss"
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / name / "thesis.txt").write_text("precious")
    with pytest.raises(ModelFolderError, match=f"run/{name} is not a model folder.*not overwritte"):
        fit(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "fails"), StorageError("fails")], ids=repr)
def test_threads_that_wait_for_the_storage_are_left_alone(error, tmp_path, monkeypatch):
    """Orbax's threads may wait for each other for minutes after one of them has failed."""
    monkeypatch.setattr(checkpoint, "PATIENCE", 0.01)
    checkpoints = checkpoint.Checkpoints(
        epath.Path(tmp_path / "checkpoints"), keep=1, keep_every=None
    )
    storage_answers = threading.Event()
    monkeypatch.setattr(checkpoints, "wait", storage_answers.wait)
    with pytest.raises(type(error)), checkpoints:
        raise error
    storage_answers.set()
    monkeypatch.undo()
    checkpoints.wait()


@pytest.mark.parametrize("error", [KeyError("x"), DataError("/a.jpg: [Errno 5]")], ids=repr)
def test_after_any_other_error_a_checkpoint_in_progress_is_completed(error, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PATIENCE", 0.0)
    folder = epath.Path(tmp_path / "checkpoints")
    with pytest.raises(type(error)):
        with checkpoint.Checkpoints(folder, keep=1, keep_every=None) as checkpoints:
            checkpoints.save(3, {"weight": jnp.ones(1_000_000)}, {})
            raise error
    assert checkpoint.Checkpoints(folder, keep=1, keep_every=None).steps() == [3]


CONFIG = """
from tests import tiny

def get_config(arg=""):
    return tiny.config({teacher!r}, **{{"data.data_dir": {data!r}, "profile_steps": 0}})
"""


@pytest.mark.slow
def test_the_command_prints_one_line_and_ends(teacher, embedded_data, tmp_path):
    """No traceback of any thread, exit status 2, within seconds of the fault."""
    (tmp_path / "config.py").write_text(CONFIG.format(teacher=teacher, data=embedded_data))
    process = subprocess.Popen(
        ["prlimit", "--fsize=8192", sys.executable, "train.py"]
        + [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 2, output
    assert output.count("error: ") == 1 and "Traceback" not in output, output
    assert "File too large; raise the limit of the size of a file (`ulimit -f`)" in output


@pytest.mark.parametrize("command", ["prepare", "reproduce", "features", "convert"])
def test_every_command_explains_a_folder_that_is_a_file(command, teacher, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    below = str(tmp_path / "file" / "below")
    mains = {
        "prepare": lambda: prepare.main(["--name=digits", f"--data_dir={below}"]),
        "reproduce": lambda: reproduce.main(["--scale=cpu", "--collect", f"--workdir={below}"]),
        "features": lambda: features.main(
            [f"--model={teacher}", f"--input={tmp_path}", f"--output={below}/f.npz"]
        ),
        "convert": lambda: convert.main(
            ["export", "--format=timm", f"--input={teacher}", f"--output={below}/x.safetensors"]
        ),
    }
    assert mains[command]() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error and "file" in error
