"""Tracking of runs with Weights & Biases; the only module that uses wandb.

wandb's own variables say where a run goes, above all WANDB_MODE=offline, WANDB_PROJECT and
WANDB_ENTITY. The keys of an account are left to wandb: nothing here reads or writes them.
"""

from collections.abc import Mapping, Sequence
import importlib.util
import json
import os
from typing import Any
import uuid

from etils import epath
import jax

from fd_jax import files
from fd_jax.console import say
from fd_jax.errors import CheckpointError, ConfigError, UserError

FILE = "wandb.json"  # of the workdir: which run of wandb it is
PROJECT = "fd_jax"  # unless WANDB_PROJECT names another one


def check() -> None:
    """Refuses tracking that cannot work, before any work is done.

    Raises:
      ConfigError: wandb is missing, its settings are wrong, or it has no key of an account.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("--wandb needs the package wandb: pip install 'fd_jax[wandb]'")
    # Reports of wandb's own errors go to the network in every mode.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    try:
        online = wandb.setup().settings.mode in ("online", "run", "shared")
        if online and not wandb.login(prompt=False, verify=False):
            raise ConfigError(
                "--wandb: wandb has no API key; run `wandb login` once, or set WANDB_MODE=offline "
                "to keep the records in the workdir"
            )
    except (wandb.Error, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--wandb: wandb refuses its settings ({error})") from None


class Tracker:
    """A run of wandb that belongs to a workdir; only the first process makes one.

    A run that resumes continues the same run of wandb. What goes wrong in wandb after its start is
    noted once and never ends a training.

    Args:
      workdir: folder whose run it is; receives wandb.json and, if it is local, the folder wandb.
      config: config of the run, or None to leave the recorded one as it is.

    Raises:
      CheckpointError: wandb.json is damaged.
      ConfigError: wandb cannot start the run.
    """

    def __init__(self, workdir: epath.Path, config: Mapping[str, Any] | None = None):
        import wandb

        record = _record(workdir)
        local = None if "://" in str(workdir) or "WANDB_DIR" in os.environ else str(workdir)
        try:
            self._run = wandb.init(
                id=record["id"],
                project=record["project"],
                name=workdir.name,
                dir=local,
                resume="allow",
                config=None if config is None else dict(config),
                settings=wandb.Settings(
                    console="off", silent=True, save_code=False, allow_val_change=True
                ),
            )
            # A step has a row for training and one for evaluation, and a run that was killed
            # repeats steps, so the steps are not those of wandb, which may only grow.
            self._run.define_metric("step", hidden=True)
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # wandb raises errors of many kinds
            raise ConfigError(
                f"--wandb: wandb cannot start a run ({error}); set WANDB_MODE=offline to keep the "
                "records in the workdir"
            ) from error
        self._failed = False

    @property
    def place(self) -> str:
        """Where the run can be seen, or what makes it visible."""
        if not self._run.offline:
            return self._run.url or "disabled"
        folder = epath.Path(self._run.dir).parent  # of the part of the run that begins here
        return f"offline in {folder}; `wandb sync {folder.parent}` sends it"

    def log(self, row: Mapping[str, float]) -> None:
        """Records a row of metrics.jsonl, which has a step."""
        self._send(dict(row))

    def add_pictures(self, pictures: Sequence[epath.Path], *, step: int) -> None:
        """Adds PNG files at a step, by their names without the suffix."""
        import wandb

        self._send(
            {"step": step} | {f"report/{path.stem}": wandb.Image(str(path)) for path in pictures}
        )

    def finish(self, *, failed: bool = False, preempted: bool = False) -> None:
        """Ends this part of the run; online, this waits until all of it is sent.

        Args:
          failed: whether an error ended it.
          preempted: whether it was asked to stop, to go on later.
        """
        try:
            if preempted:
                self._run.mark_preempting()
            self._run.finish(exit_code=int(failed or preempted))
        except Exception as error:  # as above
            self._note(error)

    def _send(self, row: dict[str, Any]) -> None:
        if self._failed:
            return
        try:
            self._run.log(row)
        except Exception as error:  # as above
            self._note(error)

    def _note(self, error: Exception) -> None:
        self._failed = True
        say(f"note: wandb records nothing more of this run ({error}); metrics.jsonl has all of it")


def start(workdir: epath.Path, config: Mapping[str, Any]) -> Tracker | None:
    """Starts tracking a run, and says where; only the first process does, the others get None."""
    if jax.process_index() != 0:
        return None
    tracker = Tracker(workdir, config)
    say(f"  wandb      {tracker.place}")
    return tracker


def check_tracked(workdir: epath.Path) -> None:
    """Refuses a workdir whose run was not tracked.

    Raises:
      UserError: it has no wandb.json.
    """
    if not (workdir / FILE).exists():
        raise UserError(
            f"--wandb: {workdir} has no {FILE}, since its run was not logged to wandb; run the "
            "command of the training with --wandb, or leave --wandb out"
        )


def _record(workdir: epath.Path) -> dict[str, str]:
    """The id and project of a workdir, which are made up and written if there are none."""
    path = workdir / FILE
    if not path.exists():
        project = os.environ.get("WANDB_PROJECT") or PROJECT
        record = {"id": uuid.uuid4().hex[:12], "project": project}
        files.write_text(path, json.dumps(record) + "\n")
        return record
    try:
        record = files.read_object(path)
        if not all(type(record.get(name)) is str for name in ("id", "project")):
            raise ValueError("has no id or no project")
    except ValueError as error:
        raise CheckpointError(
            f"{path} {error}: it is damaged. Delete it, and the run goes on as a new one in wandb"
        ) from error
    return {"id": record["id"], "project": record["project"]}
