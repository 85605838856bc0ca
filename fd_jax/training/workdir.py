"""Layout of a workdir, and the check that it belongs to the config of the run."""

import json
from typing import Any

from etils import epath
import jax

from fd_jax import files, sharding
from fd_jax.errors import CheckpointError, differences
from fd_jax.typing import Config

CONFIG, CHECKPOINTS, PROFILE, MODEL = "config.json", "checkpoints", "profile", "model"


def claim(workdir: epath.Path, config: Config, *, accept: bool) -> None:
    """Writes config.json, or refuses a workdir that belongs to another config.

    Raises:
      CheckpointError: config.json differs and `accept` is not set; the message lists each field.
    """
    path = workdir / CONFIG
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
    existing = path.read_text() if path.exists() else None
    if existing is not None and not accept:
        changed = differences(_flat(json.loads(existing)), _flat(json.loads(text)))
        if changed:
            raise CheckpointError(
                f"{workdir} was started with another config:\n"
                + "\n".join(changed)
                + "\nUse another workdir, or add --accept_config to continue with the new values."
            )
    sharding.barrier("workdir_checked")
    if jax.process_index() == 0 and existing != text:
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_text(path, text)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested dicts by their dotted names."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return flat
