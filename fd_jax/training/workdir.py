"""Layout of a workdir, and the check that it belongs to the config of the run."""

import json

from etils import epath
import jax

from fd_jax import files, sharding
from fd_jax.errors import CheckpointError, differences
from fd_jax.settings import flat
from fd_jax.typing import Config

CONFIG, CHECKPOINTS, PROFILE, MODEL = "config.json", "checkpoints", "profile", "model"
BEST = "best"  # model folder of the best evaluation, with eval.keep_best


def check(workdir: epath.Path, config: Config, *, accept: bool) -> None:
    """Refuses a workdir that belongs to another config; writes nothing.

    Raises:
      CheckpointError: config.json differs and `accept` is not set; the message lists each field.
    """
    _, text, existing = _read(workdir, config)
    if existing is not None and not accept:
        changed = differences(flat(json.loads(existing)), flat(json.loads(text)))
        if changed:
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
    path, text, existing = _read(workdir, config)
    sharding.barrier("workdir_checked")
    if jax.process_index() == 0 and existing != text:
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_text(path, text)


def has_checkpoint(workdir: epath.Path) -> bool:
    """Whether there is a checkpoint, complete or not. This makes no folder."""
    folder = workdir / CHECKPOINTS
    return folder.exists() and any(path.name.isdigit() for path in folder.iterdir())


def _read(workdir: epath.Path, config: Config) -> tuple[epath.Path, str, str | None]:
    """The path of config.json, its text for this config, and the text that is there, if any."""
    path = workdir / CONFIG
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
    return path, text, path.read_text() if path.exists() else None
