"""One run per workdir: a lock file with a pulse, on any file system.

The file names the host, the process and the start of the run that holds it, and a thread rewrites
it every few seconds. So a later run can tell a living holder from one that was killed, also where
the holder was on another machine, and on file systems whose own locks do not reach other machines.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from typing import Any
import uuid

from absl import logging
from etils import epath
import jax

from fd_jax import files, sharding, storage
from fd_jax.console import say
from fd_jax.errors import CheckpointError

NAME = "run.lock"
PULSE = 10.0  # seconds between two signs of life
SILENCE = 45.0  # seconds without one after which the holder counts as dead


class Lock:
    """A workdir's lock, held by this process. `held` makes one.

    Args:
      path: the lock file.
      pulse: seconds between two signs of life.
    """

    def __init__(self, path: epath.Path, pulse: float):
        self._path, self._pulse = path, pulse
        self._holder: dict[str, Any] = {**_this_process(), "token": uuid.uuid4().hex}
        self._beats = 0
        self._lost = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="workdir-lock", daemon=True)

    def take(self) -> bool:
        """Creates the lock file; False if there is one already."""
        if not _create(self._path, self._text()):
            return False
        if _token(_read(self._path)) != self._holder["token"]:
            return False
        self._thread.start()
        return True

    def check(self) -> None:
        """Refuses to go on where another run has taken the workdir over.

        Raises:
          CheckpointError: the lock file is another run's.
        """
        if self._lost:
            raise CheckpointError(self._lost)

    def release(self) -> None:
        """Ends the pulse and removes the lock file if it is still this run's."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):
            if _token(_read(self._path)) == self._holder["token"]:
                self._path.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(self._pulse):
            try:
                found = _read(self._path)
                if _token(found) not in ("", self._holder["token"]):
                    self._lost = (
                        f"{self._path.parent} was taken over by {_described(found)}, since this "
                        "process gave no sign of life for too long (was it suspended?); this run "
                        "writes nothing more"
                    )
                    return
                self._beats += 1
                files.write_text(self._path, self._text())
            except OSError as error:  # a file system that fails for a moment ends no run
                logging.warning("cannot renew %s: %s", self._path, error)

    def _text(self) -> str:
        return json.dumps({**self._holder, "beats": self._beats}) + "\n"


@contextlib.contextmanager
def held(
    workdir: epath.Path, *, pulse: float = PULSE, silence: float = SILENCE
) -> Iterator[Lock | None]:
    """Holds the lock of a workdir, which is created if it does not exist.

    All processes of a run call this; the first one holds the lock. A workdir that did not exist is
    removed again if the run leaves nothing in it.

    Args:
      workdir: folder of the run.
      pulse: seconds between two signs of life.
      silence: seconds without one after which another holder counts as dead.

    Yields:
      The lock in the first process, None in the others.

    Raises:
      CheckpointError: another run holds the workdir, or the lock cannot be written.
    """
    refusal, lock, is_new = "", None, False
    if jax.process_index() == 0:
        try:
            is_new = not workdir.exists()
            workdir.mkdir(parents=True, exist_ok=True)
            lock = _acquire(workdir / NAME, pulse, silence)
        except CheckpointError as error:
            refusal = str(error)
        except OSError as error:
            refusal = str(storage.explained(error, workdir) or error)
    if not sharding.first_decides(not refusal):
        raise CheckpointError(refusal or f"the first process cannot use the workdir {workdir}")
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()
            with contextlib.suppress(OSError):  # the workdir may be gone
                if is_new and not any(workdir.iterdir()):
                    workdir.rmdir()


def _acquire(path: epath.Path, pulse: float, silence: float) -> Lock:
    lock = Lock(path, pulse)
    if lock.take():
        return lock
    holder = _read(path)
    if not _is_dead_here(holder):
        say(
            f"{path.parent} is in use by {_described(holder)}, or was when that run was killed; "
            f"waiting up to {silence:.0f} s for a sign of life ..."
        )
        alive = _changes(path, holder, silence)
        if alive is not None:
            raise CheckpointError(
                f"{path.parent} is in use by {_described(alive)}, which is running. Two runs would "
                "overwrite each other's files: stop that one, or name another folder"
            )
    say(f"{path.parent} was left locked by {_described(holder)}, which has ended; going on")
    if not (_remove(path, holder) and lock.take()):
        raise CheckpointError(
            f"{path.parent} was taken by {_described(_read(path))} at the same moment; stop that "
            "run, or name another folder"
        )
    return lock


def _create(path: epath.Path, text: str) -> bool:
    """Writes a file that does not exist yet; False if it does."""
    name = os.fspath(path)
    if "://" in name:  # in a bucket the last of two writers wins, and the other finds its token
        if path.exists():
            return False
        path.write_text(text)
        return True
    try:
        with open(name, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _remove(path: epath.Path, holder: dict[str, Any]) -> bool:
    """Removes the lock file of a dead holder; False if it is another run's by now.

    It is moved first and looked at then, since between a look and a removal another run that waits
    for the same workdir could have put its own there.
    """
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return True
    if _token(_read(aside)) != _token(holder):
        aside.rename(path)
        return False
    aside.unlink()
    return True


def _changes(path: epath.Path, before: dict[str, Any], silence: float) -> dict[str, Any] | None:
    """The content of the lock file once it changes; None if it does not, or is removed."""
    deadline = time.monotonic() + silence
    while time.monotonic() < deadline:
        time.sleep(min(0.5, silence / 10))
        if not path.exists():
            return None
        found = _read(path)
        if found and found != before:
            return found
    return None


def _read(path: epath.Path) -> dict[str, Any]:
    """The content of a lock file; {} where it is missing, or being written, or no lock file."""
    try:
        return files.read_object(path)
    except (FileNotFoundError, ValueError):
        return {}


def _token(content: dict[str, Any]) -> str:
    return str(content.get("token", ""))


def _this_process() -> dict[str, Any]:
    process = _Process.current()
    started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {**dataclasses.asdict(process), "started": started}


def _described(content: dict[str, Any]) -> str:
    if not content:
        return "a process that is not known"
    return (
        f"process {content.get('pid')} on {content.get('host')}, started {content.get('started')}"
    )


def _is_dead_here(content: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    here = _Process.current()
    if (content.get("host"), content.get("namespace")) != (here.host, here.namespace):
        return False
    pid = content.get("pid")
    return isinstance(pid, int) and _birth(pid) != content.get("birth")


@dataclasses.dataclass(frozen=True)
class _Process:
    """What tells a process from all others.

    Attributes:
      host: name of its machine.
      namespace: in which its number counts; containers of one machine have their own.
      pid: its number.
      birth: when it began, in the clock of the kernel; numbers are used again.
    """

    host: str
    namespace: str
    pid: int
    birth: str

    @classmethod
    def current(cls) -> "_Process":
        try:
            namespace = os.readlink("/proc/self/ns/pid")
        except OSError:  # not Linux
            namespace = ""
        return cls(socket.gethostname(), namespace, os.getpid(), _birth(os.getpid()))


def _birth(pid: int) -> str:
    """When a process of this machine began; "" if there is none, or it is a zombie."""
    try:
        fields = epath.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if epath.Path("/proc/self/stat").exists() else _exists(pid)
    state, started = fields[0], fields[19]
    return "" if state in "ZX" else started


def _exists(pid: int) -> str:
    """For systems without /proc: "running" if there is such a process, else ""."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "running"
