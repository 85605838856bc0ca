"""Layout of a workdir, and the checks that it belongs to the config of the run and is whole."""

import json
from typing import Any

from etils import epath
import jax

from fd_jax import files, sharding
from fd_jax.data.contents import changes
from fd_jax.errors import CheckpointError, differences
from fd_jax.settings import changes_nothing, flat
from fd_jax.training import metric_writer
from fd_jax.typing import Config

Contents = dict[str, dict[str, Any]]  # by split

DATA = "data.json"
CONFIG, CHECKPOINTS, PROFILE, MODEL = "config.json", "checkpoints", "profile", "model"
BEST = "best"  # model folder of the best evaluation, with eval.keep_best


def check(workdir: epath.Path, config: Config, *, accept: bool) -> None:
    """Refuses a workdir that belongs to another config; writes nothing.

    Raises:
      CheckpointError: config.json differs and `accept` is not set; the message lists each field.
    """
    if (workdir / CONFIG).exists() and not accept:
        before, now = flat(read_config(workdir)), flat(json.loads(_text(config)))
        known = {n: v for n, v in now.items() if n in before or not changes_nothing(n, v)}
        if changed := differences(before, known):
            raise CheckpointError(
                f"{workdir} was started with another config:\n"
                + "\n".join(changed)
                + "\nUse another workdir, or add --accept_config to continue with the new values."
            )


def claim(workdir: epath.Path, config: Config, *, accept: bool) -> None:
    """Writes config.json after `check`, once nothing in the config can be refused any more.

    Raises:
      CheckpointError: see `check`.
    """
    check(workdir, config, accept=accept)
    sharding.barrier("workdir_checked")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_text(workdir / CONFIG, _text(config))


def read_config(workdir: epath.Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
      CheckpointError: it is damaged.
    """
    path = workdir / CONFIG
    try:
        return files.read_object(path)
    except ValueError as error:
        raise CheckpointError(
            f"{path} {error}: it is damaged. Delete it if the config of this command is the one "
            "that the workdir was started with; it is written again then"
        ) from error


def check_data(workdir: epath.Path, contents: Contents, *, accept: bool) -> None:
    """Refuses data other than those that the run was started with; writes nothing.

    Workdirs of earlier versions have no data.json, and nothing to compare.

    Args:
      workdir: folder of the run.
      contents: what each split consists of now, see `data.contents.of_files`.
      accept: whether to continue with data that have changed.

    Raises:
      CheckpointError: a split has changed; the message says how.
    """
    path = workdir / DATA
    if accept or not path.exists() or not has_checkpoint(workdir):
        return
    try:
        before = files.read_object(path)
        changed = {
            split: lines
            for split in sorted(before.keys() & contents.keys())
            if (lines := changes(before[split], contents[split]))
        }
    except (AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{path} {error}: it is damaged. Delete it, or add --accept_data, to continue without "
            "knowing whether the data are those that the run was started with"
        ) from error
    if changed:
        what = "figures" if all(split.startswith("eval") for split in changed) else "batches"
        listed = [f"  {split}: {line}" for split, lines in changed.items() for line in lines]
        raise CheckpointError(
            f"the data of {workdir} have changed since it was started:\n"
            + "\n".join(listed)
            + f"\nLater {what} would differ. Bring the files back, use another workdir, or add "
            "--accept_data to continue with the new ones."
        )


def claim_data(workdir: epath.Path, contents: Contents) -> None:
    """Writes data.json, after `check_data`; only the first process does."""
    if jax.process_index() == 0:
        files.write_text(workdir / DATA, json.dumps(contents, sort_keys=True) + "\n")


def has_checkpoint(workdir: epath.Path) -> bool:
    """Whether there is a checkpoint, complete or not. This makes no folder."""
    folder = workdir / CHECKPOINTS
    return folder.exists() and any(path.name.isdigit() for path in folder.iterdir())


def check_checkpoints(workdir: epath.Path) -> None:
    """Refuses a workdir whose checkpoints were taken away, since a run would start anew in it.

    Raises:
      CheckpointError: there is none, though one was complete before.
    """
    if has_checkpoint(workdir) or not (workdir / CONFIG).exists():
        return
    if trace := _trace_of_checkpoints(workdir):
        raise CheckpointError(
            f"{workdir / CHECKPOINTS} holds no checkpoint, although {trace}. Put the folder back "
            f"to resume; to start from the beginning, delete {workdir}, or name another --workdir"
        )


def _trace_of_checkpoints(workdir: epath.Path) -> str:
    """What shows that there were checkpoints; "" if nothing does."""
    # A folder in a bucket exists only while something is in it.
    if not (workdir / CHECKPOINTS).exists() and "://" not in str(workdir):
        return "the run had that folder"
    every = read_config(workdir).get("checkpoint", {}).get("every", 0)
    if every and (workdir / MODEL).exists():
        return "the run has exported its model"
    # A save begins when the one before is complete.
    last = max((row["step"] for row in metric_writer.read(workdir)), default=0)
    return f"the run has reached step {last}" if every and last > 2 * every else ""


def _text(config: Config) -> str:
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
