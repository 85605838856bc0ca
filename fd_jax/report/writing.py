"""Reads a finished workdir and writes its report."""

import json
import time

from etils import epath
import ml_collections

from fd_jax import model_folder
from fd_jax.console import say
from fd_jax.errors import UserError
from fd_jax.report import classes, distillation, training
from fd_jax.show import document
from fd_jax.tasks import registry
from fd_jax.training import metric_writer, tracking
from fd_jax.training import workdir as workdirs
from fd_jax.typing import Config

NAME = "report"


def write_report(workdir: epath.PathLike) -> epath.Path:
    """Writes the report of a finished run of any task, and returns its folder.

    The folder `report` in the workdir receives report.html, report.md and their plots; that of a
    distillation run also agreement.json.

    Raises:
      UserError: the workdir has no finished run, or its data or teacher are not there any more.
    """
    start = time.monotonic()
    workdir = epath.Path(workdir)
    path = workdir / workdirs.CONFIG
    if not path.exists():
        raise UserError(
            f"{workdir} is not a workdir: it has no config.json; use the --workdir of train.py or "
            "finetune.py"
        )
    config: Config = ml_collections.ConfigDict(workdirs.read_config(workdir))
    kind = registry.kind_of(config)
    model_folder.load_spec(workdir / workdirs.MODEL)  # refuses a run that is not finished
    rows = metric_writer.read(workdir)
    if not rows:
        raise UserError(f"{workdir} has no {metric_writer.FILE_NAME}, so there is nothing to show")
    folder = workdir / NAME
    folder.mkdir(parents=True, exist_ok=True)
    blocks = training.blocks(config, rows, folder)
    if kind is registry.DISTILLATION and distillation.has_maps(config):
        say("measuring the agreement with the teacher, about half a minute on a laptop ...")
        blocks += distillation.blocks(config, workdir, folder)
    if kind is registry.CLASSIFICATION and config.data.eval_split:
        blocks += classes.blocks(workdir, folder)
    document.write(folder, NAME, f"{kind.name.capitalize()}: {workdir.name}", blocks)
    say(f"written in {time.monotonic() - start:.0f} s")
    return folder


def track(folder: epath.Path) -> None:
    """Adds the pictures of a written report to the tracked run of its workdir."""
    workdir = folder.parent
    step = int(metric_writer.read(workdir)[-1]["step"])
    tracker = tracking.Tracker(workdir)
    pictures = sorted(path for path in folder.iterdir() if path.suffix == ".png")
    tracker.add_pictures(pictures, step=step)
    tracker.finish()
    say(f"{len(pictures)} pictures added to wandb, {tracker.place}")


def summary(folder: epath.Path) -> str:
    """The main results of a written report, in a few lines for the terminal."""
    lines = [f"report: {folder / NAME}.html (and {NAME}.md)"]
    agreement = folder / distillation.AGREEMENT
    if agreement.exists():
        lines += distillation.summary(json.loads(agreement.read_text()))
    else:
        lines += training.summary(metric_writer.read(folder.parent))
    return "\n".join(lines)
