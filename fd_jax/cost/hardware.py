"""Peak rates and capacities of chips, from their vendors' public data sheets.

TPU v4, v5e, v5p, v6e: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e (peak compute, HBM capacity
and bandwidth, inter-chip interconnect bandwidth per chip, in Gbit/s there and bytes/s here).
`clock_hz` is what peak compute implies with the number of matrix units: the compiler's cycle
estimates for a large matmul imply 88 to 90 % of that clock, on v6e 70 %. A100, H100, H200 (SXM):
NVIDIA's data sheets, dense without sparsity, NVLink in one direction.

These are limits, not measurements.
"""

import dataclasses
import math
import re

from fd_jax.errors import ConfigError
from fd_jax.models.narrow import KINDS

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Limits of one chip.

    Attributes:
      name: common name, with which the names of TPU topologies begin.
      kinds: values of `jax.Device.device_kind` for this chip.
      bf16_flops: peak bfloat16 FLOP/s with float32 accumulation; a multiply-add is two FLOPs.
      int8_ops, float8_flops: the same of int8 and of float8 numbers; None without units for them.
      hbm_bytes: memory capacity in bytes.
      hbm_bandwidth: bytes/s between memory and chip.
      interconnect: bytes/s that leave the chip in one direction, over all links to other chips.
      clock_hz: clock of the matrix units, for cycle estimates; None for chips that need none here.
      dimensions: dimensions of its topologies, 2 (AxB) or 3 (AxBxC); 0 for chips without
        topologies.
      largest: number of chips in the largest slice.
    """

    name: str
    kinds: tuple[str, ...]
    bf16_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    interconnect: float
    clock_hz: float | None = None
    dimensions: int = 0
    largest: int = 0
    int8_ops: float | None = None
    float8_flops: float | None = None

    def peak(self, matmuls: str) -> float | None:
        """Peak of matmuls of narrow numbers, a key of `narrow.KINDS`; None without units."""
        return {"int8": self.int8_ops, "float8_e4m3fn": self.float8_flops}[matmuls]


def _clock(peak: float, *, matrix_units: int, side: int) -> float:
    return peak / (matrix_units * side * side * 2)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4",
            ("TPU v4",),
            bf16_flops=275e12,
            hbm_bytes=32 * GIB,
            hbm_bandwidth=1228e9,
            interconnect=2400e9 / 8,
            clock_hz=_clock(275e12, matrix_units=8, side=128),
            dimensions=3,
            largest=4096,
            int8_ops=275e12,
        ),
        Chip(
            "v5e",
            ("TPU v5 lite", "TPU v5e"),
            bf16_flops=197e12,
            hbm_bytes=16 * GIB,
            hbm_bandwidth=819e9,
            interconnect=1600e9 / 8,
            clock_hz=_clock(197e12, matrix_units=4, side=128),
            dimensions=2,
            largest=256,
            int8_ops=393e12,
        ),
        Chip(
            "v5p",
            ("TPU v5", "TPU v5p"),
            bf16_flops=459e12,
            hbm_bytes=95 * GIB,
            hbm_bandwidth=2765e9,
            interconnect=4800e9 / 8,
            clock_hz=_clock(459e12, matrix_units=8, side=128),
            dimensions=3,
            largest=8960,
            int8_ops=918e12,
        ),
        Chip(
            "v6e",
            ("TPU v6 lite", "TPU v6e"),
            bf16_flops=918e12,
            hbm_bytes=32 * GIB,
            hbm_bandwidth=1640e9,
            interconnect=3584e9 / 8,
            clock_hz=_clock(918e12, matrix_units=4, side=256),
            dimensions=2,
            largest=256,
            int8_ops=1836e12,
        ),
        Chip(
            "A100",
            ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"),
            bf16_flops=312e12,
            hbm_bytes=40e9,  # the smaller of the two
            hbm_bandwidth=1555e9,
            interconnect=300e9,
            int8_ops=624e12,
        ),
        Chip(
            "H100",
            ("NVIDIA H100 80GB HBM3",),
            bf16_flops=989e12,
            hbm_bytes=80e9,
            hbm_bandwidth=3350e9,
            interconnect=450e9,
            int8_ops=1979e12,
            float8_flops=1979e12,
        ),
        Chip(
            "H200",
            ("NVIDIA H200",),
            bf16_flops=989e12,
            hbm_bytes=141e9,
            hbm_bandwidth=4800e9,
            interconnect=450e9,
            int8_ops=1979e12,
            float8_flops=1979e12,
        ),
    )
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip of a jax device of this kind (one of two devices on a v4); None if unknown."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)


def check_matmuls(matmuls: str, chip: Chip | None) -> None:
    """Refuses narrow numbers for which a chip has no matrix units.

    CPUs compute them all, and chips that are not known here are not refused.

    Args:
      matmuls: key of `narrow.KINDS`.
      chip: chip that is to compute them; None for another than those of CHIPS.

    Raises:
      ConfigError: the chip would compute them in another dtype.
    """
    if chip is None or chip.peak(matmuls):
        return
    others = [repr(kind) for kind in KINDS if chip.peak(kind)]
    instead = " or ".join([*others, "'', the compute dtype"])
    raise ConfigError(
        f"teacher.matmuls={matmuls!r}, but the matrix units of a {chip.name} multiply no such "
        f"numbers; set it to {instead}"
    )


def topologies() -> list[str]:
    """Names of common TPU topologies for each chip, smallest first, for error messages."""
    flat = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
    cubes = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
    shapes = {2: flat, 3: cubes}
    return [f"{chip.name}:{s}" for chip in CHIPS.values() for s in shapes.get(chip.dimensions, ())]


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
    """Chip and shape of a topology such as "v5e:4x4" or "v4:2x2x4".

    Raises:
      ConfigError: there is no such chip or shape; the message lists topologies that exist.
    """
    kind, _, layout = name.partition(":")
    chip = CHIPS.get(kind)
    if chip is not None and chip.dimensions and re.fullmatch(r"\d+(x\d+)*", layout):
        shape = tuple(int(side) for side in layout.split("x"))
        if len(shape) == chip.dimensions and 0 < math.prod(shape) <= chip.largest:
            return chip, shape
    raise ConfigError(
        f"topology {name!r} is unknown; expected a TPU and its shape, such as one of "
        f"{', '.join(topologies())}"
    )
