"""How well a run uses its chips: memory in use, and model FLOPs over the chips' peak (MFU)."""

from collections.abc import Sequence
from typing import Any

from fd_jax.cost import flops, hardware
from fd_jax.tasks.base import Task


class Utilization:
    """Figures of this run's devices; nothing where the chip or the task's FLOPs are not known.

    Args:
      task: what is trained.
      devices: all of the mesh.
      local: those of this process, whose memory can be asked for.
    """

    def __init__(self, task: Task, devices: Sequence[Any], local: Sequence[Any]):
        self._local = local
        self._seconds_per_image = None
        chip = hardware.of_kind(devices[0].device_kind)
        try:
            work = flops.of_task(task).model
        except TypeError:  # a task of the user's own
            return
        if chip is not None:
            self._seconds_per_image = work / (chip.bf16_flops * _chips(devices))

    def figures(self, images_per_second: float) -> dict[str, float]:
        """Of a stretch of training at this rate over the whole mesh.

        Returns:
          "mfu", of the bfloat16 peak, what remat repeats not counted; "hbm_gib" and
          "hbm_peak_gib", of the fullest device of this process, where the device tells.
        """
        made = {}
        if self._seconds_per_image is not None:
            made["mfu"] = images_per_second * self._seconds_per_image
        memory = [stats for device in self._local if (stats := device.memory_stats())]
        for name, key in (("hbm_gib", "bytes_in_use"), ("hbm_peak_gib", "peak_bytes_in_use")):
            sizes = [stats[key] for stats in memory if key in stats]
            if sizes:
                made[name] = max(sizes) / hardware.GIB
        return made


def _chips(devices: Sequence[Any]) -> int:
    """TPUs tell where they are, and two devices may be on one chip; elsewhere each is one."""
    if not hasattr(devices[0], "coords"):
        return len(devices)
    return len({(getattr(d, "slice_index", 0), *d.coords) for d in devices})
