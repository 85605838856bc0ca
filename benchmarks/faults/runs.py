"""Small runs of train.py that can be started, watched, stopped and compared."""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent.parent
PREEMPTED = 75
# What differs between two runs of the same steps: how fast they were.
TIMES = ("images_per_second", "step_seconds", "input_wait", "mfu", "memory", "memory_peak")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
      status: exit status; negative for a signal, None if it had to be killed.
      output: what it printed.
      seconds: from its start, or from the moment it was disturbed.
    """

    status: int | None
    output: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The lines that begin with "error: "."""
        return [line for line in self.output.splitlines() if line.startswith("error: ")]


class Lab:
    """A folder of runs, all made from the same inputs.

    Args:
      folder: of the runs; new or empty.
      inputs: folder of a teacher, the digits and a compilation cache, which several labs can share;
        filled if it does not exist.
      flags: further flags of every run, such as --config.steps=20.
    """

    def __init__(self, folder: pathlib.Path, inputs: pathlib.Path, *flags: str):
        self.folder, self._inputs, self._flags = folder, inputs, flags
        folder.mkdir(parents=True, exist_ok=True)
        if not inputs.exists():
            _prepare(inputs)

    def command(self, workdir: pathlib.Path, *flags: str) -> list[str]:
        """The command of a run."""
        return [
            *(sys.executable, "-u", "train.py"),
            f"--config={pathlib.Path(__file__).parent / 'config.py'}",
            f"--config.teacher.path={self._inputs / 'teacher'}",
            f"--config.data.data_dir={self._inputs / 'data'}",
            f"--workdir={workdir}",
            *self._flags,
            *flags,
        ]

    def start(
        self,
        workdir: pathlib.Path,
        *flags: str,
        before: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> "Process":
        """Starts a run; `before` is a command that starts it, such as `prlimit ...`."""
        return Process([*before, *self.command(workdir, *flags)], self._environment(env))

    def finish(self, workdir: pathlib.Path, *flags: str, seconds: float = 300.0) -> Ended:
        """Starts a run and waits for its end."""
        return self.start(workdir, *flags).wait(seconds)

    def _environment(self, more: Mapping[str, str] | None) -> dict[str, str]:
        return {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self._inputs / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
            **(more or {}),
        }


class Process:
    """A run in a process of its own, whose output goes to a file in memory."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]):
        self._log = os.memfd_create("output")
        self._began = time.monotonic()
        self.popen = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=self._log, stderr=self._log, text=True
        )

    def output(self) -> str:
        """What it has printed so far."""
        size = os.fstat(self._log).st_size
        return os.pread(self._log, size, 0).decode(errors="replace")

    def wait_for(self, text: str, seconds: float = 240.0) -> bool:
        """Waits until it prints a text; False if it ends first."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ended = self.popen.poll() is not None
            if text in "\n" + self.output():
                return True
            if ended:
                return False
            time.sleep(0.02)
        return False

    def wait_for_step(self, step: int, seconds: float = 240.0) -> bool:
        """Waits until the line of a step is printed; False if the run ends first."""
        return self.wait_for(f"\nstep {step}/", seconds)

    def wait_for_error(self) -> bool:
        """Waits until the line of an error is printed; False if the run ends first."""
        return self.wait_for("\nerror: ")

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, and counts the seconds to its end from here."""
        self.disturbed()
        self.popen.send_signal(number)

    def disturbed(self) -> None:
        """Counts the seconds to its end from here."""
        self._began = time.monotonic()

    def wait(self, seconds: float) -> Ended:
        """Waits for its end, and kills it after a time."""
        try:
            status = self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            status = None
        taken = time.monotonic() - self._began
        output = self.output()
        os.close(self._log)
        return Ended(status, output, taken)


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what depends on the time."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIMES}
        for line in lines
    ]


def model(workdir: pathlib.Path) -> str:
    """A digest of all bits of the exported model: its description, and every array."""
    from fd_jax import digests, model_folder

    spec, params = model_folder.load(workdir / "model")
    found = hashlib.sha256(spec.to_json().encode())
    for name, array in sorted(digests.by_path(params).items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def differing_rows(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> int:
    """The number of rows that are missing, double or different."""
    differing = 0
    for step in sorted({row["step"] for row in found + expected}):
        ours, theirs = ([row for row in side if row["step"] == step] for side in (found, expected))
        differing += max(len(ours), len(theirs)) if ours != theirs else 0
    return differing


def remove(folder: pathlib.Path) -> None:
    """Removes a workdir that is no longer needed."""
    shutil.rmtree(folder, ignore_errors=True)


def _prepare(folder: pathlib.Path) -> None:
    """The teacher and the data, in a process of their own, since this one keeps no devices."""
    code = "import sys\nfrom benchmarks.faults import runs\nruns.make(sys.argv[1])\n"
    subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=True,
        stdout=subprocess.DEVNULL,
    )


def make(folder: str) -> None:
    """Writes the teacher, and prepares the digits."""
    from flax import nnx

    from benchmarks.faults.config import STUDENT
    from configs import base
    from fd_jax import model_folder
    from fd_jax.data import prepare
    from fd_jax.models.spec import ModelSpec, split

    arch = base.student({**STUDENT, "width": 48, "heads": 3}, image_size=32, position="ape")
    spec = ModelSpec("vit", arch, source="random")
    _, encoder = split(spec.build(rngs=nnx.Rngs(0)))
    path = pathlib.Path(folder) / "teacher"
    model_folder.save(path, spec, {"encoder": encoder}, overwrite=True)
    prepare.prepare("digits", data_dir=str(pathlib.Path(folder) / "data"))
