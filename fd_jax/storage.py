"""Errors of the system as one message: the path, the reason, and what to do.

Orbax, TensorStore and TensorFlow report the system's errors as errors of their own, some of them
only in the text. `explained` recognises those as well.
"""

from collections.abc import Callable, Iterator
import contextlib
import errno
import logging as python_logging
import os
import re
import sys
import threading
import traceback
from typing import Any

from absl import logging

from fd_jax.errors import StorageError, UserError

_FULL = "make room, or name a folder on another file system (`df -h`, and `df -i` for inodes)"
_DEVICE = "the device or the connection to it fails (see `dmesg`); repair it"
_GONE = "it was removed or unmounted while it was in use, or a part of its path never existed"
_NETWORK = "the file server does not answer as it should; mount it again, or wait until it responds"
_OTHER_KIND = "a file is where a folder should be, or the reverse; move it away"
_DENIED = "let the user of this process read and write there, or name another folder"
_HANDLES = "raise the limit of open files (`ulimit -n`), or lower data.workers and data.threads"

# What to do about each error of the system.
REMEDIES: dict[int, str] = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: f"the quota is used up; {_FULL}",
    errno.EFBIG: "raise the limit of the size of a file (`ulimit -f`), or use another file system",
    errno.EROFS: "mount the file system for writing, or name a folder on another one",
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EIO: _DEVICE,
    errno.ENXIO: _DEVICE,
    errno.ENODEV: _DEVICE,
    errno.ENOENT: _GONE,
    errno.ENOTDIR: _OTHER_KIND,
    errno.EISDIR: _OTHER_KIND,
    errno.EEXIST: _OTHER_KIND,
    errno.ENOTEMPTY: "another process writes there; stop it",
    errno.ESTALE: _NETWORK,
    errno.ENOTCONN: _NETWORK,
    errno.ETIMEDOUT: _NETWORK,
    errno.EHOSTDOWN: _NETWORK,
    errno.EMFILE: _HANDLES,
    errno.ENFILE: _HANDLES,
    errno.ENAMETOOLONG: "name a shorter path",
    errno.EBUSY: "another process uses it; stop it",
    errno.ENOMEM: "the machine has no memory left; free some, or lower data.workers",
}
# Errors that say nothing about what a file holds.
NOT_DAMAGE = frozenset(
    code for code, remedy in REMEDIES.items() if remedy in (_DENIED, _NETWORK, _HANDLES)
) | {errno.ENOMEM}
AGAIN = "What was saved before stays: mend this, and run the same command again"

# How an error is named in the text of an error of another library. The words alone are common:
# "ptxas: No such file or directory" is about a program, and no fault of the storage.
_TEXTS = {os.strerror(code): code for code in REMEDIES}
_TENSORSTORE = re.compile(r"os_error_code='(\d+)'")
_NUMBERED = re.compile(r"\[Errno (\d+)\]")
_PATHS = re.compile(r"""["'](/[^"'\n]+)["']|(?<!\S)(/[^\s"';:]+)""")
_WRITERS = ("orbax", "tensorstore", "tensorflow")
# Where the name of a checkpoint ends and those of its inner files begin.
_CONTENTS = ("ocdbt.process_", ".orbax-checkpoint-tmp")


def explained(error: BaseException, place: object = "") -> StorageError | None:
    """The error with its path, its reason and what to do; None if the system did not cause it.

    Args:
      error: what was raised.
      place: what the command was writing or reading, for errors that name no path.
    """
    for link in _causes(error):
        if isinstance(link, StorageError):
            return link
        code = code_of(link)
        if code is not None:
            path = _path(link) or str(place)
            return StorageError(message(code, path))
    return None


@contextlib.contextmanager
def one_message(place: object) -> Iterator[None]:
    """Turns errors of the system into a `StorageError`; `place` as in `explained`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = explained(error, place)
        if found is None:
            raise
        raise found from error


def quiet_threads() -> None:
    """Leaves out what libraries' threads print about errors that the main thread raises as well."""
    logging.get_absl_logger().addFilter(_is_news)
    python_logging.getLogger("asyncio").addFilter(lambda record: not record.exc_info)
    unraisable, in_thread = sys.unraisablehook, threading.excepthook
    sys.unraisablehook = lambda found: _unless_explained(found.exc_value, unraisable, found)
    threading.excepthook = lambda found: _unless_explained(found.exc_value, in_thread, found)


def _is_news(record: Any) -> bool:
    """Whether a line of the log is no traceback of Orbax's or clu's threads."""
    return not (record.exc_info and re.search(r"[/\\](orbax|clu)[/\\]", record.pathname))


def _unless_explained(error: BaseException | None, hook: Callable, found: Any) -> None:
    # TensorStore calls back after a write has failed, when Orbax no longer listens.
    if error is None or not (explained(error) or str(error) == "Event loop is closed"):
        hook(found)


def message(code: int, path: str) -> str:
    """One line about an error of the system.

    Args:
      code: its number, as in `errno`.
      path: the file or folder that it concerns.
    """
    remedy = REMEDIES.get(code, "make sure that the storage works")
    subject = path or "a file that the system does not name"
    return f"{subject}: {os.strerror(code)}; {remedy}. {AGAIN}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it says that it was raised from, and the members of groups.

    What a `UserError` was raised from is explained by it.
    """
    waiting, seen = [error], set()
    while waiting:
        link = waiting.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        if isinstance(link, UserError):
            continue
        waiting += getattr(link, "exceptions", ())
        waiting += [link.__cause__] if link.__cause__ is not None else []


def code_of(error: BaseException) -> int | None:
    """The number in `REMEDIES` of the system's error; None if it is another error.

    The text is read only if it says that it is about a file: a `UserError` may quote anything.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in REMEDIES and not _of_a_program(error) else None
    text = str(error)
    if isinstance(error, UserError):
        return None
    if found := _TENSORSTORE.search(text):
        return int(found[1])
    if not (_PATHS.search(text) or _origin(error) in _WRITERS):
        return None
    if found := _NUMBERED.search(text):
        return int(found[1]) if int(found[1]) in REMEDIES else None
    return next((code for words, code in _TEXTS.items() if words in text), None)


def _of_a_program(error: BaseException) -> bool:
    """Whether an error is that of a program that cannot be started."""
    return _origin(error) == "subprocess"


def _origin(error: BaseException) -> str:
    """The package of an error, or else the one whose code raised it."""
    package = type(error).__module__.partition(".")[0]
    frames = list(traceback.walk_tb(error.__traceback__))
    if package != "builtins" or not frames:
        return package
    return frames[-1][0].f_globals.get("__name__", "").partition(".")[0]


def _path(error: BaseException) -> str:
    """The path that an error names, without the inner files of a checkpoint; "" if none."""
    names = [getattr(error, name, None) for name in ("filename2", "filename")]
    named = next((os.fsdecode(name) for name in names if isinstance(name, str | bytes)), "")
    if not named and (found := _PATHS.search(str(error))):
        named = found[1] or found[2]
    for mark in _CONTENTS:
        named = named.partition(mark)[0]
    return named.rstrip("/.")
