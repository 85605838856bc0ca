"""figures.json: all numbers of a command, from which its pictures are drawn."""

from collections.abc import Mapping, Sequence
import json
import math
from typing import Any

from etils import epath

from fd_jax import files
from fd_jax.errors import UserError

VERSION = 1
FILE = "figures.json"
DIGITS = 9  # significant digits of a number

Record = dict[str, Any]


def make(
    *,
    command: Sequence[str],
    data: str,
    images: int,
    image_size: Any,
    settings: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]] = (),
    picture: Mapping[str, Any] | None = None,
) -> Record:
    """Puts the results of a command together.

    Args:
      command: the command line.
      data: name of the dataset and its split.
      images: number of images that were measured.
      image_size: input size in pixels, a side or [height, width].
      settings: everything else on which the numbers depend.
      models: for each model "about" and its figures.
      pairs: for each pair of models "models", their two names, and its figures.
      picture: "name" and "pixels" of the one picture that some figures show; None for none.
    """
    record: Record = {
        "version": VERSION,
        "command": list(command),
        "data": data,
        "images": images,
        "image_size": image_size,
        "settings": dict(settings),
        "models": {name: dict(values) for name, values in models.items()},
        "pairs": [dict(pair) for pair in pairs],
    }
    if picture is not None:
        record["picture"] = dict(picture)
    return record


def write(record: Record, folder: epath.Path) -> None:
    """Writes figures.json into a folder."""
    text = json.dumps(_rounded(record), allow_nan=False, separators=(",", ":"))
    files.write_text(folder / FILE, text + "\n")


def read(folder: epath.Path) -> Record:
    """Reads the figures.json of a folder.

    Raises:
      UserError: the file is missing, damaged, or of another version.
    """
    path = folder / FILE
    try:
        record = json.loads(path.read_text())
        version = record["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); measure again") from error
    if version != VERSION:
        raise UserError(f"{path} has version {version}; this fd_jax reads {VERSION}")
    return record


def _rounded(value: Any) -> Any:
    """The value with floats of DIGITS significant digits, which halves the file."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError("a result is not finite; check the weights of the models")
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
