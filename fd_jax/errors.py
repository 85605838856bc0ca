"""Errors that a user can cause. The message names the input, what was expected and what to do.

Entry points print the message of a `UserError` and exit with status 2. So they do with an error of
the system that `storage` can explain. Any other exception is a bug and keeps its traceback.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any


class UserError(ValueError):
    """Base class of the errors that user input causes; the message contains the remedy."""


class ConfigError(UserError):
    """An unknown field, a wrong type, or an impossible combination of settings."""


class DataError(UserError):
    """A dataset that is missing, not prepared, too small, or holds too many broken images."""


class HangError(DataError):
    """Storage that does not respond. The process exits, since a blocked thread cannot be ended."""


class StorageError(UserError):
    """Files cannot be read or written. The process exits, since threads may wait for them."""


class ConversionError(UserError):
    """A weights file that does not match its source name, or cannot be read safely."""


class ModelFolderError(UserError):
    """A model folder that is missing, incomplete or of another version, or must not be replaced."""


class CheckpointError(UserError):
    """A workdir that cannot be resumed: it has another config, or a step cannot be read."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that cannot be read, or whose arrays are not those that were written."""


def check_positive(name: str, value: int) -> None:
    """Refuses a setting below 1.

    Raises:
      ConfigError: `value` is below 1.
    """
    if value < 1:
        raise ConfigError(f"{name}={value}: expected a whole number above 0")


def check_choice(name: str, value: str, known: Collection[str]) -> None:
    """Refuses a value that is not one of the choices of a setting.

    Args:
      name: name of the setting, as users write it.
      value: value of the setting.
      known: valid values, which the error lists.

    Raises:
      ConfigError: `value` is not one of `known`.
    """
    if value not in known:
        listed = ", ".join(repr(choice) for choice in known)
        raise ConfigError(f"{name}={value!r} is unknown; expected one of {listed}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns a line for each name whose value differs; a missing name counts as None."""

    def shown(values: Mapping[str, Any], name: str) -> str:
        return repr(values[name]) if name in values else "(absent)"

    return [
        f"  {name}: {shown(old, name)} -> {shown(new, name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)  # a new field that is None does not count
    ]


def printable(text: str) -> str:
    """A text for any stream; bytes of a file name that are no text are escaped.

    Nothing is lost, so a message still says which file it means. For pages, `show.html.printable`
    also replaces control characters, which a terminal may show and an HTML file may not hold.
    """
    return text.encode(errors="backslashreplace").decode()


def first_few(names: Sequence[str], count: int = 3) -> str:
    """The first names of a list that may be long, for a message."""
    return ", ".join([*names[:count], *["..."] * (len(names) > count)])
