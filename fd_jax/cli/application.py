"""How a command with absl flags starts, and how an error reaches the user."""

from collections.abc import Callable, Sequence
import os
import re
import sys
from typing import NoReturn

from absl import app, flags, logging
import ml_collections

from fd_jax.errors import ConfigError, HangError, UserError
from fd_jax.typing import Config


def run_app(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs `main` under absl; what the user got wrong becomes one message and exit status 2."""

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except (AttributeError, KeyError) as error:  # how a locked config says it
            _fail(_unknown_field(str(error)))
        except (flags.Error, TypeError, ValueError, OSError) as error:
            _fail(_without_traceback(str(error)))

    def guarded(argv: Sequence[str]) -> int | None:
        try:
            return main(argv)
        except HangError as error:
            _tell(str(error))
            os._exit(2)  # leaving in an orderly way would wait for the thread that hangs
        except UserError as error:
            _fail(str(error))

    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # TensorFlow greets at length otherwise
    app.run(guarded, flags_parser=parse)


def read_config(flag: flags.FlagHolder) -> Config:
    """The config that a flag of config_flags names.

    Raises:
      ConfigError: there is no such file, or it cannot be read.
    """
    try:
        return ml_collections.FrozenConfigDict(flag.value)
    except OSError as error:  # raised at the first look at its fields
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--{flag.name} names no config that can be read, such as configs/NAME.py ({reason})"
        ) from None


def _unknown_field(message: str) -> str:
    """Names the field, and the one that was meant, out of a message with quotes within quotes."""
    if "get_config" in message:
        return f"--config names a file without get_config(), so it is no experiment ({message})"
    field = re.search(r"\w+", message)
    name = field[0] if field else message
    meant = re.search(r"Did you mean \W*(\w+)", message)
    guess = f"; did you mean {meant[1]}?" if meant else ";"
    return f"the config has no field {name}{guess} configs/base.py lists what there is"


def _without_traceback(message: str) -> str:
    """The first and the last line of a message into which ml_collections wrote a traceback."""
    if "Traceback" not in message:
        return message
    lines = message.strip().splitlines()
    return f"{lines[0]} {lines[-1]}"


def _tell(message: str) -> None:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)


def _fail(message: str) -> NoReturn:
    _tell(message)
    sys.exit(2)
