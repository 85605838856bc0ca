"""How long the compiler will take, roughly, so that a user knows whether to wait.

Its time grows with the instructions of the step, of which every array of weights brings its share:
one part for the forward pass, and two more if it trains.
"""

import dataclasses

import jax

from fd_jax.plan.experiment import Experiment
from fd_jax.plan.topology import Slice


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds that a step takes to compile on two idle cores.

    Attributes:
      start: of any step.
      part: of each part.
    """

    start: float
    part: float


# From the seconds in benchmarks/scale, which vary by a factor of two with the load of the machine,
# and from small networks on idle cores.
QUICK, FULL = Pace(5.0, 0.045), Pace(5.0, 0.16)


def seconds(experiment: Experiment, effort: float) -> float:
    """Rough time to trace and compile a step on two idle cores.

    Args:
      experiment: experiment that is planned.
      effort: compiler effort, from -1 to 0.
    """
    params, _ = jax.eval_shape(experiment.task.init, jax.random.key(0))
    trained = len(jax.tree.leaves(params))
    frozen = len(jax.tree.leaves(experiment.task.abstract_frozen()))
    passes = 3 + bool(experiment.config.remat)
    parts = passes * trained + frozen
    return sum(
        share * (pace.start + pace.part * parts)
        for share, pace in ((-effort, QUICK), (1 + effort, FULL))
    )


def of(experiment: Experiment, target: Slice, effort: float) -> str:
    """What is compiled, and about how long that takes."""
    needed = seconds(experiment, effort)
    time = f"{needed / 60:.0f} min" if needed > 90 else f"{max(round(needed, -1), 10):.0f} s"
    return (
        f"the step for {len(target.devices)} devices of {target.name} at effort {effort:g}, "
        f"roughly {time} on two idle cores"
    )
