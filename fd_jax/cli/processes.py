"""Start of several processes that compute together, and the end of one that cannot go on."""

import argparse
from collections.abc import Callable
import os
import sys

import jax

from fd_jax import console, storage
from fd_jax.errors import UserError


def start(
    *,
    distributed: bool,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    heartbeat_timeout: int = 100,
) -> None:
    """Joins the other processes of this command, if there are any.

    Args:
      distributed: whether to start jax.distributed, which detects Cloud TPU pods and Slurm.
      coordinator: host:port of process 0, if no launcher provides it.
      num_processes: number of processes.
      process_id: index of this process, from 0.
      heartbeat_timeout: seconds after which a silent process counts as dead.

    Raises:
      UserError: the settings do not fit together, or the other processes are not found.
    """
    if not (distributed or coordinator):
        if num_processes is not None or process_id is not None:
            raise UserError(
                "--num_processes and --process_id are for several processes, which need a way to "
                "find each other: add --coordinator=HOST:PORT, or --distributed under a launcher"
            )
        return
    if coordinator and not distributed:
        process, count = process_id, num_processes
        if process is None or count is None or not 0 <= process < count:
            raise UserError(
                f"--coordinator={coordinator} needs --num_processes=N and a --process_id "
                f"from 0 to N - 1, but they are {count} and {process}; if a launcher provides "
                "them, add --distributed"
            )
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except ValueError as error:
        raise UserError(
            f"jax.distributed cannot detect the other processes ({error}); set "
            "--coordinator=HOST:PORT, --num_processes and --process_id"
        ) from None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of which `start` takes the values."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="start jax.distributed, which detects Cloud TPU pods and Slurm",
    )
    parser.add_argument(
        "--coordinator", help="host:port of process 0, if the launcher does not provide it"
    )
    parser.add_argument("--num_processes", type=int, help="number of processes")
    parser.add_argument("--process_id", type=int, help="index of this process, from 0")


def run(args: argparse.Namespace, work: Callable[[], None]) -> int:
    """Joins the other processes, opens the devices and does the work of a command.

    Args:
      args: values of the flags of `add_flags`, and of `--output`, which errors of storage name.
      work: what the command does.

    Returns:
      The exit status: 2 after a mistake of the user, which is one message.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # hides TensorFlow's start-up messages
    try:
        start(
            distributed=args.distributed,
            coordinator=args.coordinator,
            num_processes=args.num_processes,
            process_id=args.process_id,
        )
        console.open_devices()
        with storage.one_message(args.output):
            work()
    except ModuleNotFoundError as error:
        return _fail(f"{error}; install it with pip install 'fd_jax[train]'")
    except UserError as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    """Prints an error and returns the exit status; one of several processes ends here."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    if jax.process_count() > 1:
        os._exit(2)  # a regular exit would wait for the other processes, which wait for this one
    return 2
