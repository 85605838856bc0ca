"""Atomic writes of small files, and reading those that anybody may have written."""

import json
import os
from typing import Any

from etils import epath

LARGEST = 256 << 20  # bytes of a small file


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file under another name and renames it, so a kill leaves the old or the new one."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a binary file in the same way as `write_text`."""
    staging = path.with_name(f"{path.name}.new")
    staging.write_bytes(content)
    staging.replace(path)


def check_regular(path: epath.Path) -> None:
    """Refuses what exists and is no regular file: opening a pipe or a device may wait for ever.

    Raises:
      ValueError: the message says what it is, and is meant to follow the path.
    """
    if path.is_dir():
        raise ValueError("is a folder, not a file")
    name = os.fspath(path)
    # epath takes everything that is no folder for a file.
    if "://" not in name and os.path.exists(name) and not os.path.isfile(name):
        raise ValueError("is a pipe, socket or device, not a file")


def read_bytes(path: epath.Path, *, any_size: bool = False) -> bytes:
    """The content of a small file, or of one that may grow without bounds.

    Raises:
      ValueError: it is no regular file, or too large.
    """
    check_regular(path)
    size = epath.Path(path).stat().length
    if size > LARGEST and not any_size:
        raise ValueError(f"has {size:,} bytes; expected at most {LARGEST:,}")
    return path.read_bytes()


def read_text(path: epath.Path, *, any_size: bool = False) -> str:
    """The text of a small file, or of one that may grow without bounds.

    Raises:
      ValueError: it is no regular file, too large, or not UTF-8.
    """
    try:
        return read_bytes(path, any_size=any_size).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from error


def read_object(path: epath.Path) -> dict[str, Any]:
    """The JSON object that a small file holds.

    Raises:
      ValueError: it holds none.
    """
    return parse_object(read_text(path))


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object of a text.

    Raises:
      ValueError: there is none; the message is meant to follow what was parsed.
    """
    if not text.strip():
        raise ValueError("is empty")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error!s:.100})") from error
    if not isinstance(found, dict):
        raise ValueError(f"holds a {type(found).__name__}, not an object in braces")
    return found
