"""Upper bounds of the speed of a compiled step on its chips, and the compiler's estimate.

A bound divides the work by the peak of one resource and assumes that everything else costs nothing,
so that no real run is faster. The estimate comes from the compiler; it is not a measurement.
"""

import dataclasses

from fd_jax.plan.compiled import Compiled
from fd_jax.plan.experiment import Experiment
from fd_jax.plan.topology import Slice


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Bounds of one step on the whole slice; all times are in seconds.

    Attributes:
      compute: time of the model's matmuls at peak, including those that remat repeats; at that of
        narrow numbers where a teacher multiplies such.
      hbm: time of the compiled program's HBM traffic at full bandwidth.
      interconnect: time for each chip to receive its bytes over all its links together.
      images_per_second: upper bound for the slice.
      mfu: upper bound: model FLOPs at that rate, divided by the bfloat16 peak.
      chip_hours: lower bound for the whole run; of its matmuls alone where image sizes vary, since
        only the step of the largest size is compiled.
      estimated_seconds: the compiler's estimated cycles of all instructions in sequence, and the
        bundles of our kernels; it may underestimate collectives. None below the compiler's full
        effort.
      estimated_mfu: MFU at the estimated time, or None.
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
        """Lower bound of the time of a step."""
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def limit(self) -> str:
        """Name of the resource that sets this bound."""
        times = {"compute": self.compute, "HBM": self.hbm, "interconnect": self.interconnect}
        return max(times, key=lambda name: times[name])


def step_bounds(
    experiment: Experiment, target: Slice, compiled: Compiled, kernel_cycles: int = 0
) -> Bounds:
    """The bounds of a compiled step.

    Args:
      experiment: experiment to train.
      target: slice to train on.
      compiled: its step.
      kernel_cycles: cycles of our kernels, see `plan.bundles`.
    """
    chip, batch = target.chip, experiment.config.batch_size
    work = experiment.work
    peak = chip.bf16_flops * target.chips
    # Devices on one chip can share what they receive: a chip needs at least what one of them needs.
    received = sum(c.received for c in compiled.collectives)
    compute = work.seconds(chip) * batch / target.chips
    hbm = compiled.hbm_traffic * target.devices_per_chip / chip.hbm_bandwidth
    interconnect = received / chip.interconnect
    seconds = max(compute, hbm, interconnect)
    varies = experiment.resolutions.varies
    mean_seconds = compute * experiment.mean_share if varies else seconds
    estimated = None
    if compiled.effort == 0 and chip.clock_hz:
        estimated = (compiled.module.cycles() + kernel_cycles) / chip.clock_hz
    return Bounds(
        compute=compute,
        hbm=hbm,
        interconnect=interconnect,
        images_per_second=batch / seconds,
        mfu=work.model * batch / peak / seconds,
        chip_hours=experiment.total_steps * mean_seconds * target.chips / 3600,
        estimated_seconds=estimated,
        estimated_mfu=work.model * batch / peak / estimated if estimated else None,
    )
