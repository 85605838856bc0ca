"""Tries changes that may make a run fit into memory, by compiling each of them."""

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
    """A set of config changes and the result of compiling with them.

    Attributes:
      changes: new values of config fields by dotted name.
      fits: whether the step compiled and fits into memory.
      hbm: bytes of HBM that a device needs, or None if it was not compiled.
      refused: error message if the settings cannot work together, else "".
    """

    changes: dict[str, Any]
    fits: bool
    hbm: float | None
    refused: str = ""

    @property
    def flags(self) -> str:
        """The changes as command-line flags."""
        return " ".join(f"--config.{name}={value}" for name, value in self.changes.items())


def candidates(experiment: Experiment, devices: int) -> Iterator[dict[str, Any]]:
    """Changes that save memory: single ones, cheapest first, then combinations of them."""
    config = experiment.config
    sharded = {"mesh.data": 1, "mesh.fsdp": -1}
    single: list[dict[str, Any]] = []
    trains_encoder = experiment.task.trains_encoder
    if config.mesh.fsdp in (1,) and config.mesh.tensor == 1 and devices > 1:
        single.append(sharded)
    if config.optim.moments == "float32" and config.optim.name == "adamw":
        single.append({"optim.moments": "bfloat16"})
    if trains_encoder:
        if not config.remat:
            single.append({"remat": "dots"})
        if config.remat != "full":
            single.append({"remat": "full"})
    yield from single
    if trains_encoder:  # a probe refuses accumulation
        yield {"accumulation": 2 * config.accumulation}
    yield {"batch_size": config.batch_size // 2}
    combined: dict[str, Any] = {}
    for change in single:
        combined |= change
    for divisor in (1, 2, 4, 8):
        smaller = {"batch_size": config.batch_size // divisor} if divisor > 1 else {}
        if len(combined | smaller) > 1:
            yield combined | smaller


def try_candidates(
    experiment: Experiment,
    devices: int,
    compile_with: Compile,
    *,
    report: Callable[[Attempt], None] = lambda _: None,
) -> list[Attempt]:
    """Tries all single changes; if none fits, tries combinations until one fits.

    Args:
      experiment: the experiment that does not fit.
      devices: number of devices in the mesh.
      compile_with: compiles the experiment with another config.
      report: called with each attempt when it is done.
    """
    attempts: list[Attempt] = []
    single = True
    for changes in candidates(experiment, devices):
        combined = len(changes.keys() - {"mesh.data", "mesh.fsdp"}) + ("mesh.fsdp" in changes) > 1
        single = single and not combined
        if not single and any(attempt.fits for attempt in attempts):
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
