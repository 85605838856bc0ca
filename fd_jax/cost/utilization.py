"""How well a run uses its chips: memory in use, and model FLOPs over the chips' peak (MFU)."""

from collections.abc import Sequence
from typing import Any

from fd_jax.cost import hardware
from fd_jax.cost.flops import Flops


class Utilization:
    """Utilization metrics of a run's devices; MFU is left out if chip or FLOPs are unknown.

    Args:
      work: FLOPs of a step, per image; None if they are unknown.
      devices: all devices of the mesh.
      local: devices of this process, whose memory statistics can be read.
    """

    def __init__(self, work: Flops | None, devices: Sequence[Any], local: Sequence[Any]):
        self._local = local
        self._seconds_per_image = None
        chip = hardware.find_chip(devices[0].device_kind)
        if chip is not None and work is not None:
            self._seconds_per_image = work.model / (chip.bf16_flops * _chips(devices))

    def metrics(self, images_per_second: float, share: float = 1.0) -> dict[str, float]:
        """Metrics of a stretch of training at this rate over the whole mesh.

        Args:
          images_per_second: the rate.
          share: FLOPs of a mean image of the stretch, over those of `work`.

        Returns:
          "mfu", relative to the bfloat16 peak and without what remat repeats; "hbm_gib" and
          "hbm_peak_gib" of the fullest device of this process, if devices report their memory.
        """
        metrics = {}
        if self._seconds_per_image is not None:
            metrics["mfu"] = images_per_second * share * self._seconds_per_image
        memory = [stats for device in self._local if (stats := device.memory_stats())]
        for name, key in (("hbm_gib", "bytes_in_use"), ("hbm_peak_gib", "peak_bytes_in_use")):
            sizes = [stats[key] for stats in memory if key in stats]
            if sizes:
                metrics[name] = max(sizes) / hardware.GIB
        return metrics


def _chips(devices: Sequence[Any]) -> int:
    """Number of chips. TPU devices have coordinates, and two of them can share a chip."""
    if not hasattr(devices[0], "coords"):
        return len(devices)
    return len({(getattr(d, "slice_index", 0), *d.coords) for d in devices})
