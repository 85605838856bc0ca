"""Start-up of the commands with absl flags, and how they report errors."""

from collections.abc import Callable, Sequence
import os
import re
import sys
from typing import NoReturn

from absl import app, flags, logging

from fd_jax import storage
from fd_jax.errors import HangError, StorageError, UserError


def run_app(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs `main` under absl; a user error becomes one message and exit status 2."""

    def parse(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except (AttributeError, KeyError) as error:  # a locked config has no such field
            _fail(_unknown_field(str(error)))
        except (flags.Error, TypeError, ValueError, OSError) as error:
            _fail(_without_traceback(str(error)))

    def guarded(argv: Sequence[str]) -> int | None:
        try:
            return main(argv)
        except (HangError, StorageError) as error:
            _exit_at_once(error)
        except UserError as error:
            _fail(str(error))
        except Exception as error:
            failure = storage.explained(error)
            if failure is None:
                raise
            _exit_at_once(failure)

    logging.set_verbosity(logging.WARNING)
    storage.quiet_threads()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # hides TensorFlow's start-up messages
    app.run(guarded, flags_parser=parse)


def _unknown_field(message: str) -> str:
    """Returns a message that names the field, and a suggestion if ml_collections makes one."""
    if "get_config" in message:
        return f"--config names a file without get_config(), so it is not a config ({message})"
    field = re.search(r"\w+", message)
    name = field[0] if field else message
    suggestion = re.search(r"Did you mean \W*(\w+)", message)
    hint = f"did you mean {suggestion[1]}? " if suggestion else ""
    return f"the config has no field {name}; {hint}configs/base.py lists all fields"


def _without_traceback(message: str) -> str:
    """Returns the first and last line of a message in which ml_collections put a traceback."""
    if "Traceback" not in message:
        return message
    lines = message.strip().splitlines()
    return f"{lines[0]} {lines[-1]}"


def _print_error(message: str) -> None:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)


def _exit_at_once(error: UserError) -> NoReturn:
    """Ends the process; a regular exit would wait for threads that hang."""
    _print_error(str(error))
    os._exit(2)


def _fail(message: str) -> NoReturn:
    _print_error(message)
    sys.exit(2)
