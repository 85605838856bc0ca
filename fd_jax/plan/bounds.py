"""What a compiled step can reach at most on its chips, and what the compiler guesses.

A bound divides work by the peak of one resource and supposes that all else costs nothing: no real
run is faster. An estimate is the compiler's own: no measurement.
"""

import dataclasses

from fd_jax.plan.compiled import Compiled
from fd_jax.plan.experiment import Experiment
from fd_jax.plan.topology import Slice


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Of one step of the whole slice; times in seconds.

    Attributes:
      compute: the model's matmuls, with what remat repeats, at peak.
      hbm: traffic of this compiled program at full bandwidth.
      interconnect: bytes each chip has to receive, at the bandwidth of all its links together.
      images_per_second: at most, of the slice.
      mfu: at most: model FLOPs at that rate over peak.
      chip_hours: at least, for the whole run.
      estimated_seconds: the compiler's cycles of all instructions, one after the other, without
        collectives that take longer than it thinks; None below the compiler's full effort.
      estimated_mfu: of that estimate.
    """

    compute: float
    hbm: float
    interconnect: float
    images_per_second: float
    mfu: float
    chip_hours: float
    estimated_seconds: float | None
    estimated_mfu: float | None

    @property
    def seconds(self) -> float:
        """Lower bound of a step."""
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def limit(self) -> str:
        """The resource that sets it."""
        times = {"compute": self.compute, "HBM": self.hbm, "interconnect": self.interconnect}
        return max(times, key=lambda name: times[name])


def of_step(experiment: Experiment, target: Slice, compiled: Compiled) -> Bounds:
    """The bounds of a compiled step."""
    chip, batch = target.chip, experiment.config.batch_size
    work = experiment.work
    peak = chip.bf16_flops * target.chips
    # Two devices of one chip may share what they receive: a chip needs what one of them needs.
    received = sum(c.received for c in compiled.collectives)
    compute = work.executed * batch / peak
    hbm = compiled.hbm_traffic * target.devices_per_chip / chip.hbm_bandwidth
    interconnect = received / chip.interconnect
    seconds = max(compute, hbm, interconnect)
    estimated = None
    if compiled.effort == 0 and chip.clock_hz:
        estimated = compiled.module.cycles() / chip.clock_hz
    return Bounds(
        compute=compute,
        hbm=hbm,
        interconnect=interconnect,
        images_per_second=batch / seconds,
        mfu=work.model * batch / peak / seconds,
        chip_hours=experiment.total_steps * seconds * target.chips / 3600,
        estimated_seconds=estimated,
        estimated_mfu=work.model * batch / peak / estimated if estimated else None,
    )
