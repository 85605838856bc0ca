"""Runs that are killed or asked to stop at random moments, and one that goes on for long."""

from collections.abc import Callable, Iterator
import os
import pathlib
import random
import signal
import time
from typing import Any

from benchmarks.faults import runs
from benchmarks.faults.runs import Lab, Process

SAMPLES = 10  # of what a long run holds


def run(
    lab: Lab, count: int, number: signal.Signals, seed: int, log: Callable[[str], None]
) -> dict[str, Any]:
    """Stops runs `count` times; each run is started again until it ends, and is then compared.

    Args:
      lab: where runs are made.
      count: number of signals.
      number: SIGKILL or SIGTERM.
      seed: of the moments.
      log: receives the state after each signal.

    Returns:
      How many signals were sent, runs compared, and how many differ from an undisturbed one.
    """
    rng = random.Random(seed)
    whole = lab.folder / "whole"
    undisturbed = lab.finish(whole)
    assert undisturbed.status == 0, undisturbed.output
    expected, rows = runs.model(whole), runs.rows(whole)
    lasts = undisturbed.seconds
    found = {"signals": 0, "runs": 0, "models": 0, "rows": 0, "statuses": {}}
    while found["signals"] < count:
        workdir, before = lab.folder / f"run{found['runs']}", found["signals"]
        while (ended := _stopped(lab, workdir, number, rng.uniform(0, lasts), found)).status != 0:
            log(f"{found['signals']} signals, {found['runs']} runs")
            if found["signals"] >= count:
                assert lab.finish(workdir).status == 0
                break
        if found["signals"] == before:  # it was never disturbed: so long do runs last by now
            lasts = ended.seconds
        found["runs"] += 1
        found["models"] += runs.model(workdir) != expected
        found["rows"] += runs.differing_rows(runs.rows(workdir), rows)
        runs.remove(workdir)
    return found


def _stopped(
    lab: Lab, workdir: pathlib.Path, number: signal.Signals, moment: float, found: dict[str, Any]
) -> runs.Ended:
    """Starts a run and sends a signal after some seconds, unless it has ended before."""
    process = lab.start(workdir)
    deadline = time.monotonic() + moment
    while time.monotonic() < deadline and process.popen.poll() is None:
        time.sleep(0.02)
    if process.popen.poll() is None:
        process.signal(number)
        found["signals"] += 1
    ended = process.wait(seconds=300.0)
    status = str(ended.status)
    found["statuses"][status] = found["statuses"].get(status, 0) + 1
    assert status in ("0", "75", str(-number)), ended.output
    return ended


def soak(lab: Lab, steps: int, log: Callable[[str], None]) -> dict[str, Any]:
    """One long run: what it holds at a tenth of its steps and at the end."""
    workdir = lab.folder / "soak"
    process = lab.start(workdir, f"--config.steps={steps}")
    samples = []
    for part in range(1, SAMPLES + 1):
        step = part * steps // SAMPLES - 1  # one before the last, when the process is still there
        if not process.wait_for_step(step, seconds=3600.0):
            break
        if (found := held(process)) is None:
            break
        samples.append(found)
        log(f"step {step}: {found}")
    ended = process.wait(seconds=600.0)
    result = {"steps": steps, "status": ended.status, "samples": samples}
    runs.remove(workdir)
    return result


def held(process: Process) -> dict[str, int] | None:
    """Resident memory in MB, open files, threads, and mapped files of /dev/shm; None at its end."""
    folder = pathlib.Path("/proc") / str(process.popen.pid)
    try:
        lines = (folder / "status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines)
        mapped = [x for x in (folder / "maps").read_text().splitlines() if "/dev/shm/" in x]
        return {
            "memory_mb": int(values["VmRSS"].split()[0]) // 1024,
            "files": len(os.listdir(folder / "fd")),
            "threads": int(values["Threads"]),
            "shm": len({line.split(maxsplit=5)[5] for line in mapped}),
        }
    except (OSError, KeyError):  # a process that has ended has no memory, and soon no folder
        return None


def changes(samples: list[dict[str, int]]) -> Iterator[tuple[str, int, int]]:
    """Each quantity after a tenth of the steps and at the end."""
    for name in samples[0] if samples else ():
        yield name, samples[0][name], samples[-1][name]
