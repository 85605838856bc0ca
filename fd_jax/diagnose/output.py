"""The output folder: which command it belongs to, and what is written into it."""

import json
from typing import Any

from etils import epath
import jax

from fd_jax import files, sharding
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
    if any(output.iterdir()) and not (output / COMMAND).exists():
        raise ConfigError(
            f"--output={output} holds files that python -m fd_jax.diagnose did not write; name a "
            "new or an empty folder" + (" (--overwrite replaces only results)" * overwrite)
        )


def claim(output: epath.Path, identity: dict[str, Any], *, overwrite: bool) -> bool:
    """Takes the output folder for this command; returns whether its numbers are already there.

    Raises:
      ConfigError: the folder belongs to another command, or it cannot be written.
    """
    path = output / COMMAND
    text = json.dumps(identity, indent=2) + "\n"
    old = json.loads(path.read_text()) if path.exists() else None
    if old is not None and old != json.loads(text):
        if not overwrite:
            raise ConfigError(
                f"--output={output} holds the results of another command:\n"
                + "\n".join(differences(old, json.loads(text)))
                + "\nname another folder, or add --overwrite to replace them"
            )
        old = None
    sharding.barrier("the output folder was read")
    if old is None and jax.process_index() == 0:
        _clear(output)
        try:
            output.mkdir(parents=True, exist_ok=True)
            files.write_text(path, text)
        except OSError as error:
            raise ConfigError(f"cannot write to --output={output}: {error}") from error
    sharding.barrier("the output folder is claimed")
    return old is not None and (output / record.FILE).exists()


def _clear(output: epath.Path) -> None:
    """Removes the results of an earlier command; files of others are not touched."""
    drawn = [f"{name}.{kind}" for name in draw.DRAWINGS for kind in draw.KINDS]
    for name in (record.FILE, PARTIAL, REPORT, *drawn):
        (output / name).unlink(missing_ok=True)


def write(result: record.Record, output: epath.Path) -> None:
    """Writes figures.json, the drawings and the report; then partial sums are no longer needed."""
    record.write(result, output)
    result = record.read(output)  # rounded, so that drawing it again gives the same bytes
    drawings = draw.draw_all(result, output)
    files.write_text(output / REPORT, html.page(result, drawings))
    (output / PARTIAL).unlink(missing_ok=True)
    say(f"{len(drawings)} drawings, {record.FILE} and {REPORT} are in {output}")
