"""Runs commands one after the other, so that the same call continues after any interruption."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from typing import IO, cast

from absl import flags
from etils import epath
from flax import traverse_util
import ml_collections
from ml_collections import config_flags

from fd_jax.errors import CheckpointError, ConfigError, ModelFolderError, UserError, differences
from fd_jax.reproduce.cells import Command, Diagnosis
from fd_jax.training import loop
from fd_jax.training import workdir as workdirs

LOG, LAUNCHES, LOCK = "log.txt", "launches.jsonl", "lock"
LAST_LINES = 5  # of a log, in the message about a command that failed


class CommandError(UserError):
    """A command ended with an error; the message names it and its log."""


def lines(
    commands: Sequence[Command], root: epath.PathLike, extra: Sequence[str] = ()
) -> list[str]:
    """The commands as a user would type them.

    Args:
      commands: in their order.
      root: workdir of the reproduction.
      extra: flags of the user for every command.
    """
    return [shlex.join(["python", *command.arguments(root, extra)]) for command in commands]


def check(commands: Sequence[Command], root: epath.Path, extra: Sequence[str] = ()) -> None:
    """Refuses what would stop one of the commands later, before the first one starts.

    Args:
      commands: to launch.
      root: workdir of the reproduction.
      extra: flags of the user for every command.

    Raises:
      ConfigError: there is no checkout here, the flags do not fit a config, or the workdir is in a
        bucket.
      ModelFolderError: teachers are missing; the message lists all of them.
      CheckpointError: a workdir belongs to a run with another config.
    """
    if "://" in str(root):
        raise ConfigError(
            f"--workdir={root}: the launcher keeps logs and a lock there, for which it needs a "
            "local or mounted folder; with --print it prints the commands for you to launch"
        )
    missing = [name for name in ("train.py", "configs/base.py") if not os.path.exists(name)]
    if missing:
        raise ConfigError(
            f"there is no {' and no '.join(missing)} in {os.getcwd()}; start the command in a "
            "checkout of fd_jax"
        )
    trained = [command for command in commands if not isinstance(command, Diagnosis)]
    configs = [read_config(command, root, extra) for command in trained]
    _check_teachers([command for command in trained if not command.finished(root)])
    for command, config in zip(trained, configs, strict=True):
        _check_workdir(command.workdir(root), config)


def launch(
    commands: Sequence[Command],
    root: epath.Path,
    extra: Sequence[str] = (),
    *,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Command]:
    """Runs the commands that are not finished, in their order.

    Yields:
      Each command, once it is finished.

    Raises:
      CommandError: a command ended with an error.
      SystemExit: a command was stopped by SIGTERM; the status is that of train.py.
    """
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root) as lock, _stopped_with_us() as children:
        for number, command in enumerate(commands, start=1):
            if not command.finished(root):
                _report(f"[{number}/{len(commands)}] {lines([command], root, extra)[0]}")
                _run(command, root, extra, lock, children, environment or {})
            yield command


def read_config(
    command: Command, root: epath.PathLike, extra: Sequence[str] = ()
) -> ml_collections.ConfigDict:
    """The config of a command, from its flags, as the script itself parses them.

    Raises:
      ConfigError: the config does not exist, or has no such field.
    """
    values = flags.FlagValues()
    given = [flag for flag in command.config_flags(root, extra) if flag.startswith("--config")]
    argv = [command.script[-1], *given]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
        return cast(ml_collections.ConfigDict, values["config"].value)
    except (AttributeError, KeyError, TypeError, ValueError, OSError, flags.Error) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"{command.config} does not accept {shlex.join(given[1:])}: {reason}"
        ) from None


def seconds(root: epath.Path) -> float:
    """Duration of all launches so far."""
    path = root / LAUNCHES
    if not path.exists():
        return 0.0
    return sum(json.loads(line)["seconds"] for line in path.read_text().splitlines())


def _check_teachers(commands: Sequence[Command]) -> None:
    sources = dict.fromkeys(command.source for command in commands if command.source)
    missing = [s for s in sources if not (epath.Path("teachers") / s / "model.json").exists()]
    if not missing:
        return
    listed = [
        f"  python convert_checkpoints.py import --source={source} --input=FILE "
        f"--output=teachers/{source}"
        for source in missing
    ]
    raise ModelFolderError(
        f"{len(missing)} teachers are missing. These commands make them from files of weights:\n"
        + "\n".join(listed)
        + "\nOr select other teachers with --teacher."
    )


def _check_workdir(workdir: epath.Path, config: ml_collections.ConfigDict) -> None:
    path = workdir / workdirs.CONFIG
    if not path.exists():
        return
    found = _flat(json.loads(path.read_text()))
    wanted = _flat(json.loads(json.dumps(config.to_dict())))
    if wanted["attention"] == "auto":  # a workdir names the implementation that was chosen
        wanted["attention"] = found["attention"]
    if changed := differences(found, wanted):
        raise CheckpointError(
            f"{workdir} belongs to a run with another config:\n"
            + "\n".join(changed)
            + "\nUse another --workdir, or the flags with which it was started."
        )


def _flat(tree: dict) -> dict:
    return traverse_util.flatten_dict(tree, sep=".", keep_empty_nodes=True)


def _report(line: str) -> None:
    """Prints a line. `console.say` would start JAX, which takes the chips from our commands."""
    print(line, flush=True)


def _run(
    command: Command,
    root: epath.Path,
    extra: Sequence[str],
    lock: IO,
    children: list[subprocess.Popen],
    environment: Mapping[str, str],
) -> None:
    """Runs one command to its end."""
    workdir = command.workdir(root)
    workdir.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (workdir / LOG).open("a") as log:
        child = subprocess.Popen(
            [sys.executable, *command.arguments(root, extra)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment, **os.environ},
            pass_fds=[lock.fileno()],  # a child that outlives us still holds the lock
        )
        children.append(child)
        try:
            status = child.wait()
        finally:
            children.remove(child)
    took = time.monotonic() - began
    with (root / LAUNCHES).open("a") as file:
        record = {"where": command.where, "status": status, "seconds": round(took, 1)}
        file.write(json.dumps(record) + "\n")
    if status in (loop.PREEMPTED, -signal.SIGTERM):  # the latter before its loop began
        _report(f"{command.where} was stopped by SIGTERM; the same command continues")
        raise SystemExit(loop.PREEMPTED)
    if status or not command.finished(root):
        raise CommandError(_failure(command, root, extra, status))


def _failure(command: Command, root: epath.Path, extra: Sequence[str], status: int) -> str:
    log = command.workdir(root) / LOG
    last = "\n".join(f"  {line}" for line in log.read_text().splitlines()[-LAST_LINES:])
    return (
        f"{command.where} ended with status {status}. Its command was\n"
        f"  {lines([command], root, extra)[0]}\nand the end of its log {log} is\n{last}\n"
        "Once the cause is gone, the same command continues from here."
    )


@contextlib.contextmanager
def _locked(root: epath.Path) -> Iterator[IO]:
    """Holds the workdir, so that no second launcher starts a run that is still going on."""
    with (root / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                f"another process works in {root}; wait for it, or end it and start again"
            ) from None
        yield file


@contextlib.contextmanager
def _stopped_with_us() -> Iterator[list[subprocess.Popen]]:
    """Passes SIGTERM on to the running command, which then saves and ends."""
    children: list[subprocess.Popen] = []

    def stop(number, frame):
        del frame
        for child in children:
            child.send_signal(number)
        if not children:
            raise SystemExit(loop.PREEMPTED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield children
    finally:
        signal.signal(signal.SIGTERM, before)
