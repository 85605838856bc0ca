"""What every evaluation without training begins and ends with: its model folder and its record."""

from collections.abc import Mapping
import json

from etils import epath

from fd_jax import files
from fd_jax.errors import ConfigError
from fd_jax.typing import Config


def trained(config: Config, workdir: epath.Path, what: str) -> epath.Path:
    """The model folder to evaluate: `workdir`/model or, if there is none, `config.init_from`.

    Args:
      config: config of the evaluation.
      workdir: folder of the run.
      what: what the folder holds, for the message.

    Raises:
      ConfigError: there is no held-out split, or no folder.
    """
    if not config.data.eval_split:
        raise ConfigError("--eval_only measures data.eval_split, which is empty; set it to a split")
    folder = workdir / "model"
    if folder.exists():
        return folder
    if not config.init_from:
        raise ConfigError(
            f"--eval_only needs a trained {what}: there is no {folder}; name its folder in "
            "--config.init_from"
        )
    return epath.Path(config.init_from)


def write_record(
    workdir: epath.Path, *, folder: epath.PathLike, data: str, figures: Mapping[str, float]
) -> None:
    """Writes evaluation.json: the model folder, the name of the data, and the figures."""
    workdir.mkdir(parents=True, exist_ok=True)
    record = {"init_from": str(folder), "data": data, **figures}
    files.write_text(workdir / "evaluation.json", json.dumps(record, indent=2) + "\n")
