"""How well a run uses its chips: memory in use, and model FLOPs over the chips' peak (MFU)."""

from collections.abc import Sequence
from typing import Any

from fd_jax.cost import hardware
from fd_jax.cost.flops import Flops


class Utilization:
    """Metrics of this run's devices; nothing where the chip or the task's FLOPs are not known.

    Args:
      work: of a step, per image; None where it is not known.
      devices: all of the mesh.
      local: those of this process, whose memory can be asked for.
    """

    def __init__(self, work: Flops | None, devices: Sequence[Any], local: Sequence[Any]):
        self._local = local
        self._seconds_per_image = None
        chip = hardware.of_kind(devices[0].device_kind)
        if chip is not None and work is not None:
            self._seconds_per_image = work.model / (chip.bf16_flops * _chips(devices))

    def metrics(self, images_per_second: float) -> dict[str, float]:
        """Of a stretch of training at this rate over the whole mesh.

        Returns:
          "mfu", of the bfloat16 peak, what remat repeats not counted; "hbm_gib" and
          "hbm_peak_gib", of the fullest device of this process, where the device says so.
        """
        found = {}
        if self._seconds_per_image is not None:
            found["mfu"] = images_per_second * self._seconds_per_image
        memory = [stats for device in self._local if (stats := device.memory_stats())]
        for name, key in (("hbm_gib", "bytes_in_use"), ("hbm_peak_gib", "peak_bytes_in_use")):
            sizes = [stats[key] for stats in memory if key in stats]
            if sizes:
                found[name] = max(sizes) / hardware.GIB
        return found


def _chips(devices: Sequence[Any]) -> int:
    """TPUs know their coordinates, and two devices may be on one chip; elsewhere each is one."""
    if not hasattr(devices[0], "coords"):
        return len(devices)
    return len({(getattr(d, "slice_index", 0), *d.coords) for d in devices})
