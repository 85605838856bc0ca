"""Looks for settings with which a run fits into memory, by compiling its step with them."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from typing import Any

import ml_collections

from fd_jax.errors import UserError
from fd_jax.plan.compiled import Compiled, DoesNotFitError
from fd_jax.plan.experiment import Experiment
from fd_jax.typing import Config

Fit = tuple[Experiment, Compiled]
Changes = dict[str, Any]
Proposal = Callable[[Config], Changes]

# A change is kept if it saves this share of the memory that there is. The compiler's figures vary
# by less from program to program.
WORTHWHILE = 0.01


@dataclasses.dataclass(frozen=True)
class Attempt:
    """Changes of a config, and what came of compiling with them.

    Attributes:
      changes: new values of config fields by dotted name: those kept before, and one more.
      hbm: bytes of HBM that a device needs, or None if the settings cannot work together.
      kept: whether the last change helped, so that later attempts begin with all of these.
      fit: the experiment and its compiled step, if it fits into memory.
      refused: message of the error if the settings cannot work together, else "".
    """

    changes: Changes
    hbm: float | None
    kept: bool
    fit: Fit | None = None
    refused: str = ""

    def to_json(self) -> dict[str, Any]:
        """The attempt as plain values."""
        return {
            "changes": self.changes,
            "fits": self.fit is not None,
            "hbm": self.hbm,
            "kept": self.kept,
            "refused": self.refused,
        }


def search(
    experiment: Experiment,
    devices: int,
    compile_with: Callable[[Config], Fit],
    *,
    lacking: DoesNotFitError,
) -> Iterator[Attempt]:
    """Tries one change after the other, each on top of those that helped, until the run fits.

    Changes that leave the losses as they are come first, and a smaller batch comes last.

    Args:
      experiment: experiment that does not fit.
      devices: number of devices in the mesh.
      compile_with: defines the experiment of another config and compiles it.
      lacking: the error of `experiment`.
    """
    kept: Changes = {}
    tried: list[Changes] = [{}]
    for propose in proposals(experiment, devices):
        changes = kept | propose(_changed(experiment.config, kept))
        if changes in tried:
            continue
        tried.append(changes)
        attempt, lacking = _attempt(experiment.config, changes, compile_with, lacking)
        yield attempt
        if attempt.fit is not None:
            return
        if attempt.kept:
            kept = changes


def _attempt(
    config: Config,
    changes: Changes,
    compile_with: Callable[[Config], Fit],
    lacking: DoesNotFitError,
) -> tuple[Attempt, DoesNotFitError]:
    """Compiles with `changes`. -> the attempt, and the error of the best changes so far."""
    try:
        fit = compile_with(_changed(config, changes))
    except DoesNotFitError as error:
        helped = _helped(lacking, error)
        return Attempt(changes, error.needed, helped), error if helped else lacking
    except UserError as error:
        return Attempt(changes, None, False, refused=str(error)), lacking
    return Attempt(changes, float(fit[1].hbm), True, fit), lacking


def _helped(before: DoesNotFitError, after: DoesNotFitError) -> bool:
    """Whether memory was saved, as far as the two errors count the same."""
    if before.temporaries_only != after.temporaries_only:
        return before.temporaries_only
    return before.needed - after.needed > WORTHWHILE * after.available


def _changed(config: Config, changes: Changes) -> Config:
    result = ml_collections.ConfigDict(config.to_dict())
    result.update_from_flattened_dict(changes)
    return ml_collections.FrozenConfigDict(result)


def proposals(experiment: Experiment, devices: int) -> Sequence[Proposal]:
    """What `search` tries, in this order; a proposal returns {} where the config has it already."""
    trains = experiment.task.trains_encoder  # a probe recomputes nothing, and has to see its batch
    return (
        *([_shard] if devices > 1 else []),
        *([_recompute_activations, _recompute_all, *3 * [_accumulate]] if trains else []),
        _round_moments,
        *3 * [_halve_batch],
    )


def _shard(config: Config) -> Changes:
    whole = config.mesh.fsdp == 1 and config.mesh.tensor == 1
    return {"mesh.data": 1, "mesh.fsdp": -1} if whole else {}


def _recompute_activations(config: Config) -> Changes:
    return {} if config.remat else {"remat": "dots"}


def _recompute_all(config: Config) -> Changes:
    return {} if config.remat == "full" else {"remat": "full"}


def _accumulate(config: Config) -> Changes:
    return {"accumulation": 2 * config.accumulation}


def _round_moments(config: Config) -> Changes:
    wide = config.optim.name == "adamw" and config.optim.moments == "float32"
    return {"optim.moments": "bfloat16"} if wide else {}


def _halve_batch(config: Config) -> Changes:
    return {"batch_size": config.batch_size // 2}
