"""Storage that fails under a run: one line, an end within seconds, and nothing lost that was saved.

Each fault begins at the start or at a step of a small run. Afterwards it is undone, and the same
command has to go on to the model of an undisturbed run. Faults that mount something run in a mount
namespace of their own, which needs the rights of root.
"""

from collections.abc import Callable
import dataclasses
import pathlib
import shutil
import subprocess
from typing import Any

LIMIT = 15.0  # seconds from the fault to the end of the process
LATER = 30  # step at which most faults begin
STEPS = 400
HERE = pathlib.Path(__file__).parent


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
      mounts: whether the workdir is a file system of its own: options of a tmpfs, or "".
      needs: programs without which it cannot be tried.
    """

    name: str
    begin: Callable[["Scene"], None] = lambda scene: None
    undo: Callable[["Scene"], None] = lambda scene: None
    step: int = LATER
    flags: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    env: Callable[["Scene"], dict[str, str]] = lambda scene: {}
    mount: str = ""
    needs: tuple[str, ...] = ()


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
        with contextlib_suppressed(), open(scene.workdir / f"filler{number}", "wb") as file:
            while True:
                file.write(b"x" * 4096)
                file.flush()


def contextlib_suppressed():
    """Nothing happens when the file system is full, which is what is wanted."""
    import contextlib

    return contextlib.suppress(OSError)


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
        with contextlib_suppressed():
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
    Fault("`metrics.jsonl` becomes a folder", _metrics_to_folder, _metrics_back),
    Fault("EIO in the checkpoints", **_eio("/checkpoints/")),
    Fault("EIO in `metrics.jsonl`", **_eio("metrics.jsonl")),
    Fault("EIO in the export", **_eio(".model.incomplete")),
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
