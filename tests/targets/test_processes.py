"""The command in real processes: killed at any moment and given again, and several that share."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from fd_jax.data.stored import replay
from tests import ports, xla
from tests.targets.making import COUNT

ROOT = pathlib.Path(__file__).parent.parent.parent
KILLS = 12
pytestmark = pytest.mark.slow


def start(teacher, data, output, *flags, devices=2, code="0"):
    """Starts the command; `code` runs before it."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla.flags(devices)}
    given = [str(teacher), str(data), str(output), "--shard_size=5", "--batch_size=4", *flags]
    script = f"from tests.targets import making; {code}; raise SystemExit(making.make(*{given!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Shards take a moment to write and to rename, so that kills meet every state of them.
SLOW = (
    "import time; from fd_jax.targets import shards; from etils import epath; "
    "add = shards.Writer.add; "
    "shards.Writer.add = lambda *a: (time.sleep(0.01), add(*a))[1]; "
    "replace = type(epath.Path('.')).replace; "
    "type(epath.Path('.')).replace = lambda *a: "
    "(time.sleep(0.05), replace(*a), time.sleep(0.05))[1]"
)


def test_kills_at_random_moments_leave_neither_gap_nor_duplicate(teacher, embedded_data, tmp_path):
    finish(start(teacher, embedded_data, tmp_path / "whole"))
    rng, met = random.Random(0), set()
    folder = tmp_path / "killed"
    for _ in range(KILLS):
        process = start(teacher, embedded_data, folder, code=SLOW)
        deadline = time.monotonic() + 120
        before = len(list(folder.glob("*"))) if folder.exists() else 0
        while process.poll() is None and time.monotonic() < deadline:
            if folder.exists() and len(list(folder.glob("*"))) != before:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if folder.exists():
            met |= {path.suffix for path in folder.iterdir()}
    assert {".incomplete", ".array_record"} <= met
    finish(start(teacher, embedded_data, folder))
    assert contents(folder) == contents(tmp_path / "whole")
    store = replay.Store(folder)
    assert [store.read(i, v)[0][:2] for i in range(COUNT) for v in range(2)] == [
        (i, v) for i in range(COUNT) for v in range(2)
    ]


def test_two_processes_write_the_shards_of_one(teacher, embedded_data, tmp_path):
    finish(start(teacher, embedded_data, tmp_path / "one"))
    port = ports.free()
    shared = (f"--coordinator=localhost:{port}", "--num_processes=2")
    # Each process says which shards it writes.
    code = (
        "from fd_jax.targets import making as m; write = m.Maker.write; "
        "m.Maker.write = lambda s, f, n: (print('writes', n, flush=True), write(s, f, n))[1]"
    )
    processes = [
        start(teacher, embedded_data, tmp_path / "two", *shared, f"--process_id={i}", code=code)
        for i in range(2)
    ]
    outputs = [finish(process) for process in processes]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    for process, output in enumerate(outputs):
        wrote = [int(line.split()[1]) for line in output.splitlines() if line[:7] == "writes "]
        assert wrote == list(range(process, 9, 2))
    assert "targets of tiny in" in outputs[0] and "targets of tiny in" not in outputs[1]


def test_a_second_command_on_a_folder_is_refused(teacher, embedded_data, tmp_path):
    slow = SLOW.replace("0.01", "0.5")
    first = start(teacher, embedded_data, tmp_path / "out", code=slow)
    while not (tmp_path / "out" / "targets.json").exists():
        assert first.poll() is None
        time.sleep(0.05)
    second = start(teacher, embedded_data, tmp_path / "out")
    output, _ = second.communicate(timeout=120)
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert "is in use by process" in output and "name another folder" in output


def test_a_full_disk_is_named_and_the_same_command_goes_on(teacher, embedded_data, tmp_path):
    limit = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (9000, 9000))"
    failed = start(teacher, embedded_data, tmp_path / "out", code=limit)
    output, _ = failed.communicate(timeout=120)
    assert failed.returncode == 2 and "File too large" in output, output
    assert "maps-00000-of-00009.array_record" in output and "Traceback" not in output
    finish(start(teacher, embedded_data, tmp_path / "out"))
    finish(start(teacher, embedded_data, tmp_path / "whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
