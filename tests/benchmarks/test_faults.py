"""The short form of `python -m benchmarks.faults`, as users run it, and what its report says."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks.faults import __main__ as bench
from benchmarks.faults import runs, stops, storage

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_the_short_form_finds_nothing_wrong(tmp_path):
    command = [sys.executable, "-m", "benchmarks.faults", "--short"]
    command += [f"--output={tmp_path / 'faults.json'}", f"--folder={tmp_path}"]
    ended = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-5000:]
    parts = json.loads((tmp_path / "faults.json").read_text())["parts"]
    assert parts.keys() == {"kills", "terms", "storage", "bits", "json", "soak"}
    assert all(row["outcome"] == "one line, nothing lost" for row in parts["storage"]["rows"])
    assert sum(target["refused"] for target in parts["bits"]["by_target"].values()) > 10
    assert parts["json"]["refused"] > 100


HELD = {"memory_mb": 100, "files": 9, "threads": 5, "shm": 0}


def report(*, short=True, status=0, count=stops.SAMPLES, **last):
    """The report of a long run that holds something else at its end."""
    samples = [HELD] * (count - 1) + [{**HELD, **last}] * bool(count)
    soak = {"steps": 200, "status": status, "samples": samples, "date": "D", "code": "C"}
    return {"short": short, "processors": 2, "python": "3", "parts": {"soak": soak}}


@pytest.mark.parametrize(
    "found, fine",
    [
        (report(), True),
        (report(memory_mb=200), True),  # memory is still being filled
        (report(memory_mb=200, short=False), False),
        (report(memory_mb=109, files=17, short=False), True),
        (report(files=18), False),
        (report(shm=1), False),
        (report(status=1), False),
        (report(count=9), False),  # it ended too early
        (report(count=0), False),
    ],
)
def test_a_long_run_has_to_be_flat_to_its_end(found, fine):
    assert bench.is_fine(found, "soak") == fine


def test_the_table_has_a_row_for_every_part():
    header, *_, soak = [x for x in bench.table(report(files=10)).splitlines() if x]
    assert header == "`python -m benchmarks.faults --short`, 2 processors, Python 3:"
    assert soak.endswith("threads 5 -> 5, shm 0 -> 0 | flat | D, C |") and "files 9 -> 10" in soak
    assert "| SIGKILL at random moments | not yet run | | | |" in bench.table(report())


def run(code):
    return runs.Process([sys.executable, "-c", code], os.environ)


def test_a_process_that_has_ended_holds_nothing(tmp_path):
    code = (
        "import mmap, time\n"
        f"file = open('/dev/shm/{tmp_path.parent.name}', 'w+b')\n"
        "file.truncate(4096); kept = mmap.mmap(file.fileno(), 4096)\n"
        "import os; os.unlink(file.name)\n"
        "print('ready', flush=True); time.sleep(100)"
    )
    process = run(code)
    assert process.wait_for("ready", 60.0)
    held = stops.held(process)
    assert held is not None and held["shm"] == 1 and held["memory_mb"] > 1
    process.popen.kill()
    os.waitid(os.P_PID, process.popen.pid, os.WEXITED | os.WNOWAIT)  # not yet reaped
    assert stops.held(process) is None
    process.wait(60.0)
    assert stops.held(process) is None


def test_seconds_to_the_end_count_from_the_error_where_a_fault_has_no_moment():
    since = {fault.name: fault.since for fault in storage.FAULTS}
    assert since["the workdir is a file"] == since["60 inodes"] == "error line"
    assert since["the workdir is moved away"] == "fault"
    process = run("import time; print('error: full', flush=True); time.sleep(0.5)")
    assert process.wait_for_error()
    process.disturbed()
    assert process.wait(60.0).seconds > 0.1
    process = run("print('an error: none')")
    assert not process.wait_for_error()
    process.wait(60.0)
