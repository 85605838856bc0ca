"""The contract of a workdir: which config it belongs to, and where things lie in it."""

import json
from typing import Any

from etils import epath
import jax

from fd_jax import files, sharding
from fd_jax.errors import CheckpointError, differences
from fd_jax.typing import Config

CONFIG, CHECKPOINTS, PROFILE, MODEL = "config.json", "checkpoints", "profile", "model"


def claim(workdir: epath.Path, config: Config, *, accept: bool) -> None:
    """Writes config.json, or refuses a workdir that another config began.

    Raises:
      CheckpointError: config.json differs and `accept` is not set; the message lists each field.
    """
    path = workdir / CONFIG
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
    there = path.read_text() if path.exists() else None
    if there is not None and not accept:
        changed = differences(_flat(json.loads(there)), _flat(json.loads(text)))
        if changed:
            raise CheckpointError(
                f"{workdir} was begun with another config:\n"
                + "\n".join(changed)
                + "\nUse another workdir, or --accept_config to go on with the new values."
            )
    sharding.barrier("workdir_checked")
    if jax.process_index() == 0 and there != text:
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_text(path, text)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of nested dicts by its dotted name."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return flat
