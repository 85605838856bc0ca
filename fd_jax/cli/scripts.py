"""Flags and start of processes, shared by the training scripts."""

from collections.abc import Callable, Sequence
import sys

from absl import flags
from ml_collections import config_flags

from fd_jax import console
from fd_jax.cli import application, config_flag, next_steps, processes
from fd_jax.console import say
from fd_jax.errors import UserError
from fd_jax.tasks.base import Task
from fd_jax.training import loop, tracking
from fd_jax.typing import Config

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, such as configs/NAME.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run, local or gs://.")
_ACCEPT = flags.DEFINE_bool(
    "accept_config", False, "Continue in a workdir that was started with another config."
)
_ACCEPT_DATA = flags.DEFINE_bool(
    "accept_data", False, "Continue although files of the data were added, removed or changed."
)
_FALL_BACK = flags.DEFINE_bool(
    "fall_back", False, "Resume from the newest whole checkpoint if the latest is damaged."
)
_WANDB = flags.DEFINE_bool(
    "wandb", False, "Also log the training to Weights & Biases; WANDB_MODE=offline keeps it local."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Start jax.distributed, which detects Cloud TPU pods and Slurm."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0, if the launcher does not provide it."
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout", 100, "Seconds after which a silent process counts as dead."
)


Action = Callable[[Config, str], int]


def run(action: Action) -> None:
    """Parses flags, joins the other processes, and calls `action` with the config and the workdir.

    The result of the action is the exit status.
    """

    def main(argv: Sequence[str]) -> int:
        if len(argv) > 1:
            raise UserError(f"unexpected arguments {argv[1:]}; flags begin with --")
        for flag in (_CONFIG, WORKDIR):
            if flag.value is None:
                raise UserError(f"--{flag.name} is missing; see {argv[0]} --help")
        assert WORKDIR.value is not None
        config = config_flag.read(_CONFIG)
        if _WANDB.value:
            tracking.check()
        processes.start(
            distributed=_DISTRIBUTED.value,
            coordinator=_COORDINATOR.value,
            num_processes=_PROCESSES.value,
            process_id=_PROCESS.value,
            heartbeat_timeout=_HEARTBEAT.value,
        )
        console.open_devices()
        return action(config, WORKDIR.value)

    application.run_app(main)


def train(make_task: Callable[[Config], Task]) -> Action:
    """Returns the action that trains the task which `make_task` builds from the config."""

    def action(config: Config, workdir: str) -> int:
        result = loop.fit(
            make_task(config),
            config,
            workdir,
            accept_config=_ACCEPT.value,
            accept_data=_ACCEPT_DATA.value,
            fall_back=_FALL_BACK.value,
            wandb=_WANDB.value,
        )
        if result.preempted:
            say(f"stopped by SIGTERM at step {result.step}; the same command resumes from there")
            return loop.PREEMPTED
        say(next_steps.at_end(config, workdir, sys.argv))
        return 0

    return action
