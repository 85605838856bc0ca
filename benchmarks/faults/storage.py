"""Storage that fails under a run: one line, an end within seconds, and nothing lost that was saved.

Each fault begins at the start or at a step of a small run. Afterwards it is undone, and the same
command has to go on to the model of an undisturbed run. Faults that mount something run in a mount
namespace of their own, which needs the rights of root.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import os
import pathlib
import shutil
import subprocess
from typing import Any

from benchmarks.faults import runs
from benchmarks.faults.runs import Lab

LIMIT = 15.0  # seconds to the end of the process, from the fault or from the line of the error
LATER = 30  # step at which most faults begin
STEPS = 400
NAMESPACE = "FD_JAX_FAULTS_NAMESPACE"  # set to 1 where mounts are seen by nobody else
HERE = pathlib.Path(__file__).parent


def _nothing(scene: "Scene") -> None:
    """The run comes to the fault by itself, or nothing has to be undone."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One way in which storage fails.

    Attributes:
      name: what happens, for the table.
      begin: (scene, process or None) -> None, makes it happen; without a process before the start.
      undo: (scene) -> None, lets the same command run again.
      step: step at which it begins; 0 before the start.
      flags: further flags of the run.
      before: command that starts the run.
      env: further environment of the run.
      mount: options of the tmpfs that the workdir is; "" if it is an ordinary folder.
      needs: programs without which it cannot be tried.
    """

    name: str
    begin: Callable[["Scene"], None] = _nothing
    undo: Callable[["Scene"], None] = _nothing
    step: int = LATER
    flags: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    env: Callable[["Scene"], dict[str, str]] = lambda scene: {}
    mount: str = ""
    needs: tuple[str, ...] = ()

    @property
    def since(self) -> str:
        """From where the seconds to the end count: the error where the fault has no moment."""
        return "fault" if self.step and self.begin is not _nothing else "error line"


@dataclasses.dataclass
class Scene:
    """Where a fault happens.

    Attributes:
      folder: of this fault alone.
      workdir: of the run.
    """

    folder: pathlib.Path
    workdir: pathlib.Path

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of the checkpoints."""
        return self.workdir / "checkpoints"

    @property
    def aside(self) -> pathlib.Path:
        """Where something is put out of the way."""
        return self.folder / "aside"


def _as_file(path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file\n")


def _swap_for_file(scene: Scene) -> None:
    scene.checkpoints.rename(scene.aside)
    _as_file(scene.checkpoints)


def _swap_back(scene: Scene) -> None:
    scene.checkpoints.unlink()
    scene.aside.rename(scene.checkpoints)


def _metrics_to_folder(scene: Scene) -> None:
    (scene.workdir / "metrics.jsonl").rename(scene.aside)
    (scene.workdir / "metrics.jsonl").mkdir()


def _metrics_back(scene: Scene) -> None:
    (scene.workdir / "metrics.jsonl").rmdir()
    scene.aside.rename(scene.workdir / "metrics.jsonl")


def _fill(scene: Scene) -> None:
    """Writes until the file system is full, twice, since a checkpoint may be deleted meanwhile."""
    for number in range(2):
        with contextlib.suppress(OSError), open(scene.workdir / f"filler{number}", "wb") as file:
            while True:
                file.write(b"x" * 4096)
                file.flush()


def _empty(scene: Scene) -> None:
    for file in scene.workdir.glob("filler*"):
        file.unlink()


def _foreign_model(scene: Scene) -> None:
    (scene.workdir / "model").mkdir(parents=True)
    (scene.workdir / "model" / "thesis.txt").write_text("precious\n")


def _run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


def _read_only(scene: Scene) -> None:
    """The workdir covered by a view of itself that cannot be written to."""
    scene.aside.mkdir()
    _run("mount", "--bind", scene.workdir, scene.aside)
    _run("mount", "-o", "remount,bind,ro", scene.aside)
    _run("mount", "--bind", scene.aside, scene.workdir)


def _uncover(scene: Scene) -> None:
    _run("umount", "--lazy", scene.workdir)
    _run("umount", "--lazy", scene.aside)


def _unmount(scene: Scene) -> None:
    """An empty folder, as is below the place of a mount."""
    scene.aside.mkdir()
    _run("mount", "--bind", scene.aside, scene.workdir)


def _mount_again(scene: Scene) -> None:
    _run("umount", "--lazy", scene.workdir)


def _inodes(scene: Scene) -> None:
    for number in range(1000):
        with contextlib.suppress(OSError):
            (scene.workdir / f"filler{number}").touch()


def _small_shm(scene: Scene) -> None:
    _run("mount", "-t", "tmpfs", "-o", "size=4k", "none", "/dev/shm")


def _compile_eio(scene: Scene) -> dict[str, str]:
    library = scene.folder.parent / "eio.so"
    if not library.exists():
        _run("cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "eio.c", "-ldl")
    return {"LD_PRELOAD": str(library), "FAULT_NOW": str(scene.folder / "now")}


def _eio(part: str) -> dict[str, Any]:
    return {
        "env": lambda scene: {**_compile_eio(scene), "FAULT_PATH": part},
        "begin": lambda scene: (scene.folder / "now").touch(),
        "undo": lambda scene: (scene.folder / "now").unlink(),
        "needs": ("cc",),
    }


FAULTS = (
    Fault(
        "the folder of the checkpoints becomes a file",
        _swap_for_file,
        _swap_back,
    ),
    Fault(
        "the folder of the checkpoints is moved away",
        lambda s: s.checkpoints.rename(s.aside) and None,
        lambda s: shutil.rmtree(s.checkpoints, ignore_errors=True) or s.aside.rename(s.checkpoints),
    ),
    Fault(
        "the workdir is moved away",
        lambda s: s.workdir.rename(s.aside) and None,
        lambda s: shutil.rmtree(s.workdir, ignore_errors=True) or s.aside.rename(s.workdir),
    ),
    Fault("the workdir is a file", lambda s: _as_file(s.workdir), lambda s: s.workdir.unlink(), 0),
    Fault(
        "the parent of the workdir is a file",
        lambda s: _as_file(s.workdir.parent),
        lambda s: s.workdir.parent.unlink(),
        0,
    ),
    Fault(
        "the workdir has a `model/` that is not a model",
        _foreign_model,
        lambda s: shutil.rmtree(s.workdir / "model"),
        0,
    ),
    Fault("files of at most 8 KB", before=("prlimit", "--fsize=8192"), needs=("prlimit",), step=0),
    Fault("`metrics.jsonl` becomes a folder", _metrics_to_folder, _metrics_back),
    Fault("EIO in the checkpoints", **_eio("/checkpoints/")),
    Fault("EIO in `metrics.jsonl`", **_eio("metrics.jsonl")),
    # Before the start, since only the end of a run meets it.
    Fault("EIO in the export", step=0, **_eio(".model.incomplete")),
    Fault("EIO in `config.json`", step=0, **_eio("config.json")),
    Fault(
        "no new entries in the folder of the checkpoints",
        lambda s: _run("chattr", "+i", s.checkpoints),
        lambda s: _run("chattr", "-i", s.checkpoints),
        needs=("chattr",),
    ),
    Fault("the disk is full from the start", _fill, _empty, 0, mount="size=4m"),
    Fault("the disk gets full", _fill, _empty, mount="size=4m"),
    Fault(
        "no room for the third checkpoint",
        undo=lambda s: _run("mount", "-o", "remount,size=64m", s.workdir),
        mount="size=300k",
    ),
    Fault(
        "60 inodes",
        undo=lambda s: _run("mount", "-o", "remount,nr_inodes=4000", s.workdir),
        mount="size=64m,nr_inodes=60",
    ),
    Fault("the inodes run out", _inodes, _empty, mount="size=64m,nr_inodes=400"),
    Fault("read-only from the start", _read_only, _uncover, 0, mount="size=64m"),
    Fault("read-only in mid-run", _read_only, _uncover, mount="size=64m"),
    Fault("the workdir is unmounted", _unmount, _mount_again, mount="size=64m"),
    Fault(
        "4 KB of /dev/shm for two workers",
        _small_shm,
        lambda s: _run("umount", "/dev/shm"),
        0,
        ("--config.data.workers=2",),
        mount="size=64m",
    ),
)


def run(lab: Lab, count: int, log: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Tries the first `count` faults; yields one row for each.

    Args:
      lab: where runs are made; its runs have `STEPS` steps.
      count: number of faults.
      log: receives the name of each fault before it is tried.
    """
    whole = lab.folder / "whole"
    assert lab.finish(whole).status == 0
    expected = runs.model(whole)
    for number, fault in enumerate(FAULTS[:count]):
        log(fault.name)
        if missing := [name for name in _needed(fault) if not _usable(name)]:
            yield {"fault": fault.name, "outcome": f"not run: no {', '.join(missing)}"}
            continue
        folder = lab.folder / f"fault{number}"
        scene = Scene(folder, folder / "parent" / "run")
        folder.mkdir()
        try:
            yield _try(lab, fault, scene, expected)
        finally:
            if fault.mount:
                subprocess.run(["umount", "--lazy", str(scene.workdir)])
            runs.remove(folder)


def _needed(fault: Fault) -> tuple[str, ...]:
    return fault.needs + (("mount",) if fault.mount else ())


def _usable(program: str) -> bool:
    if program != "mount":
        return shutil.which(program) is not None
    # Without the rights of root, or outside of a namespace of one's own, nothing is mounted.
    return os.geteuid() == 0 and os.environ.get(NAMESPACE) == "1"


def _try(lab: Lab, fault: Fault, scene: Scene, expected: str) -> dict[str, Any]:
    if fault.mount:
        scene.workdir.mkdir(parents=True)
        _run("mount", "-t", "tmpfs", "-o", fault.mount, "none", scene.workdir)
    if not fault.step:
        fault.begin(scene)
    process = lab.start(scene.workdir, *fault.flags, before=fault.before, env=fault.env(scene))
    if fault.step and process.wait_for_step(fault.step):
        fault.begin(scene)
        process.disturbed()
    if fault.since == "error line" and process.wait_for_error():
        process.disturbed()
    ended = process.wait(seconds=240.0)
    fault.undo(scene)
    again = lab.finish(scene.workdir, *fault.flags)
    same = again.status == 0 and runs.model(scene.workdir) == expected
    return {
        "fault": fault.name,
        "status": ended.status,
        "seconds": round(ended.seconds, 1),
        "since": fault.since,
        "error": ended.errors[0] if ended.errors else ended.output[-300:],
        "errors": len(ended.errors),
        "traceback": "Traceback" in ended.output,
        "rerun": again.status,
        "outcome": "one line, nothing lost" if _is_good(ended) and same else "wrong",
    }


def _is_good(ended: runs.Ended) -> bool:
    one_line = len(ended.errors) == 1 and "Traceback" not in ended.output
    return ended.status not in (0, None) and one_line and ended.seconds < LIMIT
