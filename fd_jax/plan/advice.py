"""What would make a run fit into memory: changes that are tried, by compiling each."""

from collections.abc import Callable, Iterator
import dataclasses
from typing import Any

import ml_collections

from fd_jax.errors import UserError
from fd_jax.plan.compiled import Compiled, DoesNotFitError
from fd_jax.plan.experiment import Experiment
from fd_jax.typing import Config

Compile = Callable[[Config], Compiled]


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One change and what came of it.

    Attributes:
      changes: config fields by dotted name.
      fits: whether it compiled within memory.
      hbm: bytes a device needs.
      refused: why it was not compiled: the settings do not go together; else "".
    """

    changes: dict[str, Any]
    fits: bool
    hbm: float | None
    refused: str = ""

    @property
    def flags(self) -> str:
        """The change as flags of the command line."""
        return " ".join(f"--config.{name}={value}" for name, value in self.changes.items())


def candidates(experiment: Experiment, devices: int) -> Iterator[dict[str, Any]]:
    """Changes that save memory: each alone, from the one that costs least, then together."""
    config = experiment.config
    sharded = {"mesh.data": 1, "mesh.fsdp": -1}
    alone: list[dict[str, Any]] = []
    trains_encoder = experiment.task.trains_encoder
    if config.mesh.fsdp in (1,) and config.mesh.tensor == 1 and devices > 1:
        alone.append(sharded)
    if config.optim.moments == "float32" and config.optim.name == "adamw":
        alone.append({"optim.moments": "bfloat16"})
    if trains_encoder:
        if not config.remat:
            alone.append({"remat": "dots"})
        if config.remat != "full":
            alone.append({"remat": "full"})
    yield from alone
    if trains_encoder:  # a probe takes its batch whole
        yield {"accumulation": 2 * config.accumulation}
    yield {"batch_size": config.batch_size // 2}
    together: dict[str, Any] = {}
    for change in alone:
        together |= change
    for divisor in (1, 2, 4, 8):
        fewer = {"batch_size": config.batch_size // divisor} if divisor > 1 else {}
        if len(together | fewer) > 1:
            yield together | fewer


def find(
    experiment: Experiment,
    devices: int,
    compile_with: Compile,
    *,
    report: Callable[[Attempt], None] = lambda _: None,
) -> list[Attempt]:
    """Tries the candidates: all that change one thing, and together until one fits.

    Args:
      experiment: that does not fit.
      devices: of the mesh.
      compile_with: compiles the experiment under another config.
      report: called after each attempt.
    """
    attempts: list[Attempt] = []
    alone = True
    for changes in candidates(experiment, devices):
        combined = len(changes.keys() - {"mesh.data", "mesh.fsdp"}) + ("mesh.fsdp" in changes) > 1
        alone = alone and not combined
        if not alone and any(attempt.fits for attempt in attempts):
            break
        attempt = _attempt(experiment.config, changes, compile_with)
        attempts.append(attempt)
        report(attempt)
    return attempts


def _attempt(config: Config, changes: dict[str, Any], compile_with: Compile) -> Attempt:
    changed = ml_collections.ConfigDict(config.to_dict())
    changed.update_from_flattened_dict(changes)
    try:
        compiled = compile_with(ml_collections.FrozenConfigDict(changed))
    except DoesNotFitError as error:
        return Attempt(changes, False, error.needed)
    except UserError as error:
        return Attempt(changes, False, None, str(error))
    return Attempt(changes, True, float(compiled.hbm))
