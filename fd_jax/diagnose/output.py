"""The output folder: which command it belongs to, and what is written into it."""

from collections.abc import Callable, Mapping
import json
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from fd_jax import files
from fd_jax.console import say
from fd_jax.diagnose import draw, html, record
from fd_jax.errors import ConfigError, differences

COMMAND = "command.json"  # names the command that the folder belongs to
PARTIAL = "partial.npz"
REPORT = "report.html"


def check(output: epath.Path, *, overwrite: bool) -> None:
    """Refuses a folder that holds something else than results of this command.

    Raises:
      ConfigError: it is a file, or a folder with other files; also with --overwrite.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise ConfigError(f"--output={output} is a file; name a folder")
    names = {path.name for path in output.iterdir()}
    if names - {f"{COMMAND}.new"} and COMMAND not in names:  # the former may be left by a kill
        raise ConfigError(
            f"--output={output} holds files that python -m fd_jax.diagnose did not write; name a "
            "new or an empty folder" + (" (--overwrite replaces only results)" * overwrite)
        )


def is_complete(output: epath.Path, identity: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Returns whether the folder already holds the numbers of this command.

    The first process decides for all, since others may read different versions of the files.

    Args:
      output: the folder.
      identity: everything on which the numbers depend.
      overwrite: whether results of another command may be replaced.

    Raises:
      ConfigError: the folder holds results of another command, and `overwrite` is not set.
    """

    def decide() -> bool:
        old = _read_identity(output)
        if old is None:
            return False
        if old == _plain(identity):
            return (output / record.FILE).exists()
        if not overwrite:
            raise ConfigError(
                f"--output={output} holds the results of another command:\n"
                + "\n".join(differences(old, _plain(identity)))
                + "\nname another folder, or add --overwrite to replace them"
            )
        return False

    return _first_process(decide)


def claim(output: epath.Path, identity: Mapping[str, Any]) -> None:
    """Takes the folder for this command: removes results of another one, and names this one.

    Raises:
      ConfigError: the folder cannot be written.
    """

    def take() -> bool:
        if _read_identity(output) == _plain(identity):
            return True
        try:
            _clear(output)
            output.mkdir(parents=True, exist_ok=True)
            files.write_text(output / COMMAND, json.dumps(identity, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"cannot write to --output={output}: {error}") from error
        return True

    _first_process(take)


def _first_process(action: Callable[[], bool]) -> bool:
    """Runs an action in the first process; all processes return its result, or raise."""
    result, error = 0, None
    if jax.process_index() == 0:
        try:
            result = int(action())
        except ConfigError as raised:
            result, error = 2, raised
    if jax.process_count() > 1:
        result = int(multihost_utils.broadcast_one_to_all(np.int32(result)))
    if result == 2:
        raise error or ConfigError("the first process refused the output folder, see its message")
    return bool(result)


def _read_identity(output: epath.Path) -> dict[str, Any] | None:
    path = output / COMMAND
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}), so that nobody can say what the results in "
            f"--output={output} belong to; delete the folder, or name another one"
        ) from error


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity as JSON gives it back."""
    return json.loads(json.dumps(identity))


def _clear(output: epath.Path) -> None:
    """Removes the results of an earlier command; files of others are not touched."""
    drawn = [f"{name}.{kind}" for name in draw.DRAWINGS for kind in draw.KINDS]
    for name in (record.FILE, PARTIAL, REPORT, *drawn):
        (output / name).unlink(missing_ok=True)


def write(result: record.Record, output: epath.Path) -> None:
    """Writes figures.json, the drawings and the report; then partial sums are no longer needed.

    Raises:
      ConfigError: the folder cannot be written.
    """
    try:
        record.write(result, output)
        result = record.read(output)  # rounded, so that drawing it again gives the same bytes
        drawings = draw.draw_all(result, output)
        files.write_text(output / REPORT, html.page(result, drawings))
        (output / PARTIAL).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to --output={output}: {error}") from error
    pictures = len({drawing.stem for drawing in drawings})
    say(f"{pictures} pictures as PNG and SVG, {record.FILE} and {REPORT} are in {output}")
