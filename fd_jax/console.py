"""What commands have in common on the terminal: messages, a bar of progress, their own flags."""

import argparse
from collections.abc import Callable, Iterator
import contextlib
import logging as python_logging
import os
import select
import sys
import tempfile
from typing import Any

from absl import logging
import jax

from fd_jax.__about__ import __version__

_bars: list[Any] = []  # the bar on the terminal, if there is one


def say(line: str) -> None:
    """Prints a line, above the bar if there is one; with several processes only in the first."""
    if jax.process_index() != 0:
        return
    if _bars:
        _bars[-1].write(line)
    else:
        print(line, flush=True)


@contextlib.contextmanager
def bar(*, start: int, total: int) -> Iterator["Bar"]:
    """Shows the progress of steps on a terminal. A file gets the lines of `Bar.log` instead.

    Args:
      start: number of steps that are done.
      total: number of all steps.
    """
    if jax.process_index() != 0 or not sys.stdout.isatty():
        yield Bar(None)
        return
    import tqdm

    with tqdm.tqdm(initial=start, total=total, unit="step", file=sys.stdout) as shown:
        _bars.append(shown)
        try:
            yield Bar(shown)
        finally:
            _bars.remove(shown)


class Bar:
    """Progress as a bar of tqdm, or as lines where there is none."""

    def __init__(self, shown: Any):
        self._shown = shown

    def step(self) -> None:
        """Counts a step."""
        if self._shown is not None:
            self._shown.update()

    def log(self, line: str, short: str) -> None:
        """Shows the state of the run: `line` for a file, `short` beside the bar."""
        if self._shown is None:
            say(line)
        else:
            self._shown.set_postfix_str(short)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Withholds what libraries in C++ write on the error stream while they start.

    They write before any setting of their logs is read. It is shown after all if the code inside
    fails, and with --verbosity=0 or more; warnings of JAX itself, of a GPU that it cannot use, say,
    always are. Lines of other threads are withheld too, so the code should be no more than an
    import, or the first use of devices.

    If C++ aborts the process inside, the text is lost. In distributed runs nothing is withheld,
    since an abort is how jax.distributed reports that another process has died.
    """
    if logging.get_verbosity() > logging.WARNING or jax.distributed.is_initialized():
        yield
        return
    sys.stderr.flush()
    with tempfile.TemporaryFile() as withheld, os.fdopen(os.dup(2), "w") as stream:
        warnings = python_logging.StreamHandler(stream)
        python_logging.getLogger("jax").addHandler(warnings)
        os.dup2(withheld.fileno(), 2)
        try:
            yield
        except BaseException:
            withheld.seek(0)
            os.write(stream.fileno(), withheld.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(stream.fileno(), 2)
            python_logging.getLogger("jax").removeHandler(warnings)


def reader_has_left() -> bool:
    """Whether nobody reads what this process prints, as after `| head`."""
    output = select.poll()
    output.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0))


def discard_output() -> None:
    """Lets what is still to be printed vanish, so that the process can end quietly."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def open_devices() -> None:
    """Finds the devices of this process, without the complaints of libraries that find none."""
    with quiet():
        jax.devices()


def called(command: str) -> str:
    """How a user called a command: by its console script (`fd-jax-plan`), or else as `command`."""
    name = os.path.basename(sys.argv[0])
    return name if name.startswith("fd-jax-") else command


def parser(command: str, description: str | None, **options: Any) -> argparse.ArgumentParser:
    """Starts the flags of a command that takes no config.

    Args:
      command: as a user types it who has only the Python package.
      description: what it does, with an example; the docstring of its module.
      **options: of argparse.
    """
    name = called(command)
    result = argparse.ArgumentParser(
        prog=name,
        description=description and description.replace(command, name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    result.add_argument("--version", action="version", version=version())
    return result


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag that is a whole number from `least` on."""

    def parsed(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}: expected a whole number from {least} on")
        return value

    parsed.__name__ = "whole number"  # in the message of argparse about a text that is none
    return parsed


def version() -> str:
    """Name and version of this library."""
    return f"fd_jax {__version__}"
