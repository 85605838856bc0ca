"""Start-up of the commands with absl flags, and how they report errors."""

from collections.abc import Callable, Sequence
import itertools
import os
import re
import signal
import sys
from typing import NoReturn

from absl import app, flags, logging

from fd_jax import console, settings, storage
from fd_jax.errors import HangError, StorageError, UserError

READER_LEFT = 128 + signal.SIGPIPE  # exit status of a process whose output nobody reads any more


def run_app(main: Callable[[Sequence[str]], int | None], *, about: str = "") -> None:
    """Runs `main` under absl; a user error becomes one message and exit status 2.

    Args:
      main: receives the words of the command line that are no flags.
      about: what `--help` begins with; the docstring of the script if empty.
    """

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
        except BrokenPipeError:
            if not console.reader_has_left():
                raise
            console.discard_output()
            sys.exit(READER_LEFT)
        except Exception as error:
            failure = storage.explained(error)
            if failure is None:
                raise
            _exit_at_once(failure)

    if _asked("help", "helpshort", "h", "?"):
        print(_help(about or sys.modules["__main__"].__doc__ or ""))
        sys.exit(0)
    if _asked("version"):
        print(console.version())
        sys.exit(0)
    logging.set_verbosity(logging.WARNING)
    storage.quiet_threads()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # hides TensorFlow's start-up messages
    app.run(guarded, flags_parser=parse)


def _asked(*names: str) -> bool:
    return any(argument.lstrip("-") in names for argument in sys.argv[1:] if argument[0:1] == "-")


def _help(about: str) -> str:
    """What the command is about, and a line for each of its own flags."""
    lines = [about.rstrip(), "", "flags:"]
    for module, defined in sorted(flags.FLAGS.flags_by_module_dict().items()):
        if module == sys.argv[0] or module.startswith(("fd_jax.", "__main__")):
            lines += [_line(flag) for flag in defined]
    lines += [
        f"  {'--config.FIELD':<24} Any field of the config, such as --config.batch_size=64.",
        f"  {'--verbosity':<24} 0 also shows what libraries say, 1 more. Default: -1.",
        f"  {'--version':<24} Print the version.",
        f"  {'--helpfull':<24} List the flags of all libraries, too.",
        "",
        "configs/base.py describes every field of a config; configs/ has a file per experiment.",
    ]
    return "\n".join(lines)


def _line(flag: flags.Flag) -> str:
    default = "" if flag.default in (None, "", False) else f" Default: {flag.default}."
    negation = "[no]" if flag.default is True else ""
    return f"  {f'--{negation}{flag.name}':<24} {' '.join(str(flag.help).split())}{default}"


def _unknown_field(message: str) -> str:
    """Returns a message that names the field, and a suggestion if ml_collections makes one."""
    if "get_config" in message:
        return f"--config names a file without get_config(), so it is not a config ({message})"
    field = re.search(r"\w+", message)
    name = field[0] if field else message
    suggestion = re.search(r"Did you mean \W*(\w+)", message)
    hint = f"did you mean {suggestion[1]}? " if suggestion else ""
    return f"the config has no field {name}; {hint}{_alike(name)}configs/base.py lists all fields"


def _alike(name: str) -> str:
    """Fields of sections that have the name as a word of their own: optim.peak_lr for lr."""
    fields = {*settings.COMMON, *itertools.chain(*settings.TASKS.values())}
    last = {field: field.rpartition(".")[2] for field in fields}
    found = sorted(field for field, word in last.items() if name in word.split("_"))
    return f"there is {', '.join(found)}; " if found else ""


def _without_traceback(message: str) -> str:
    """What a config file raised, of a message in which ml_collections put a traceback.

    Of errors that are no UserError, the flag and the type of the error are said as well.
    """
    raised = re.search(r"^(?P<type>[\w.]+): (?P<text>.*)\Z", message, re.MULTILINE | re.DOTALL)
    if "Traceback" not in message or not raised:
        return message
    if raised["type"].startswith("fd_jax.errors."):
        return raised["text"].strip()
    flag = message.strip().splitlines()[0].removesuffix(":")
    return f"{flag}: {raised['type']}: {raised['text'].strip()}"


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
