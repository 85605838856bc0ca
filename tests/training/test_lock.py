"""Two runs on one workdir, in real processes: who holds it, who is refused, who takes it over."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

from etils import epath
import pytest

from fd_jax.errors import CheckpointError
from fd_jax.training import lock as locks

PULSE, SILENCE = 0.1, 1.5

HOLD = """
import sys, time
from etils import epath
from fd_jax.training import lock
with lock.held(epath.Path(sys.argv[1]), pulse=0.1, silence=1.5):
    print("holding", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def holder(workdir):
    """Another process that holds the workdir until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "holding\n"
        yield process
    finally:
        process.kill()
        process.wait()


def hold(workdir):
    return locks.held(epath.Path(workdir), pulse=PULSE, silence=SILENCE)


def test_a_run_leaves_no_lock_and_no_new_empty_folder(tmp_path):
    with hold(tmp_path / "new"):
        assert json.loads((tmp_path / "new" / locks.NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "new").exists()
    with hold(tmp_path / "used"):
        (tmp_path / "used" / "metrics.jsonl").write_text("{}")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["metrics.jsonl"]


def test_a_workdir_of_a_running_process_is_refused(tmp_path):
    with holder(tmp_path) as process:
        before = (tmp_path / locks.NAME).read_text()
        with pytest.raises(CheckpointError, match=f"in use by process {process.pid} on .* running"):
            with hold(tmp_path):
                pytest.fail("two runs hold the workdir")
        after = json.loads((tmp_path / locks.NAME).read_text())
        assert after["token"] == json.loads(before)["token"]


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, capsys):
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with hold(tmp_path):
            assert json.loads((tmp_path / locks.NAME).read_text())["pid"] == os.getpid()
    shown = capsys.readouterr().out
    assert f"left locked by process {process.pid}" in shown
    assert "waiting" not in shown


@pytest.mark.parametrize("content", ["other host", "other namespace", "reused pid", "damaged"])
def test_a_lock_that_only_its_silence_shows_to_be_dead(tmp_path, capsys, content):
    """Of another machine or container nothing can be asked; a number may be another process's."""
    with hold(tmp_path):
        written = json.loads((tmp_path / locks.NAME).read_text())
    changes = {
        "other host": {"host": "elsewhere"},
        "other namespace": {"namespace": "pid:[1]"},
        "reused pid": {"birth": "1"},
    }
    text = json.dumps({**written, **changes[content]}) if content in changes else "{"
    (tmp_path / locks.NAME).write_text(text)
    with hold(tmp_path):
        pass
    shown = capsys.readouterr().out
    assert ("waiting up to" in shown) == (content != "reused pid")
    assert "which has ended; going on" in shown


def test_a_lock_of_another_host_that_beats_is_refused(tmp_path):
    with holder(tmp_path):
        # The same process, seen from a machine on which its number means nothing.
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(locks.socket, "gethostname", lambda: "elsewhere")
            with pytest.raises(CheckpointError, match="which is running"), hold(tmp_path):
                pass


def test_a_run_whose_lock_was_taken_over_stops(tmp_path):
    with hold(tmp_path) as lock:
        lock.check()
        content = {**json.loads((tmp_path / locks.NAME).read_text()), "token": "another", "pid": 7}
        (tmp_path / locks.NAME).write_text(json.dumps(content))
        deadline = time.monotonic() + 60
        while not lock._lost and time.monotonic() < deadline:
            time.sleep(PULSE)
        with pytest.raises(CheckpointError, match="taken over by process 7 .*writes nothing more"):
            lock.check()
    # The other run's lock stays.
    assert json.loads((tmp_path / locks.NAME).read_text())["token"] == "another"


@pytest.mark.slow
@pytest.mark.parametrize("dead", [False, True], ids=["new workdir", "lock of a killed run"])
def test_of_many_that_start_together_one_gets_the_workdir(tmp_path, dead):
    if dead:
        with holder(tmp_path) as process:
            process.send_signal(signal.SIGKILL)
    runs = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    try:
        deadline = time.monotonic() + 120
        while sum(run.poll() is None for run in runs) > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        (winner,) = [run for run in runs if run.poll() is None]
        refusals = [run.stderr.read().decode() for run in runs if run is not winner]
        assert all(f"by process {winner.pid} on" in text for text in refusals)
        assert json.loads((tmp_path / locks.NAME).read_text())["pid"] == winner.pid
    finally:
        for run in runs:
            run.kill()


def test_a_workdir_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match="file/run: Not a directory; a file is where a folder"
    ):
        with hold(tmp_path / "file" / "run"):
            pass
