"""The errors a user can cause: one message that names the input, what was expected, what to do.

Entry points print a `UserError` as a single line and exit with status 2; any other exception is a
bug and keeps its traceback.
"""

from collections.abc import Collection, Mapping
from typing import Any


class UserError(ValueError):
    """Base of every error whose cause is the user's input and whose message says the remedy."""


class ConfigError(UserError):
    """An unknown field, a wrong type, or an impossible combination of settings."""


class DataError(UserError):
    """A dataset that is missing, not prepared, too small, or holds too many broken images."""


class HangError(DataError):
    """Storage that does not answer. No thread that waits can be ended, so the process is."""


class ConversionError(UserError):
    """A weights file that is not what its source name says, or cannot be read safely."""


class ModelFolderError(UserError):
    """A model folder that is missing, incomplete, of another version, or in the way."""


class CheckpointError(UserError):
    """A workdir that cannot be resumed: another config, a missing or unreadable step."""


def check_positive(name: str, value: int) -> None:
    """Refuses a setting below 1.

    Raises:
      ConfigError: it is.
    """
    if value < 1:
        raise ConfigError(f"{name}={value}: a whole number above 0 is expected")


def check_choice(name: str, value: str, known: Collection[str]) -> None:
    """Refuses a value that is not among those that a setting may have.

    Args:
      name: of the setting, as a user writes it.
      value: that it has.
      known: that it may have.

    Raises:
      ConfigError: `value` is not one of `known`, which the message lists.
    """
    if value not in known:
        listed = ", ".join(repr(choice) for choice in known)
        raise ConfigError(f"{name}={value!r} is unknown; expected one of {listed}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines for a message: one per name whose value differs; what one side lacks counts as None."""

    def shown(values: Mapping[str, Any], name: str) -> str:
        return repr(values[name]) if name in values else "(absent)"

    return [
        f"  {name}: {shown(old, name)} -> {shown(new, name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)  # a new field that is None is no difference
    ]
