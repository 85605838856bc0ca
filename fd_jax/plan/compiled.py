"""Compiles the real train step ahead of time, without the chips, and keeps what it shows."""

import contextlib
import dataclasses
import re
import time
from typing import Any

import jax

from fd_jax import sharding
from fd_jax.plan import hlo
from fd_jax.plan.experiment import Experiment
from fd_jax.plan.topology import Slice
from fd_jax.training.program import Program, build

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

# Off: the compiler otherwise turns gathers and matmuls of sharded weights into loops, whose bodies
# its FLOP and byte counts take once. What runs then overlaps less than what a run compiles.
_NO_WINDOWED_EINSUM = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


class DoesNotFitError(Exception):
    """The compiler found no way to hold the program in memory.

    Attributes:
      needed, available: bytes of HBM on a device, as the compiler counts.
    """

    def __init__(self, needed: float, available: float):
        super().__init__(f"needs {needed:.3e} bytes of HBM, {available:.3e} are available")
        self.needed, self.available = needed, available


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled train step; all figures are of one device.

    Attributes:
      program: that was compiled.
      executable: of jax.
      module: its text, read.
      seconds: that compiling took.
      effort: 0 is what runs use; lower compiles faster, and worse.
      flops: of one step by the compiler's count, bodies of loops once.
      bytes_accessed: by instructions, in HBM or VMEM alike, bodies of loops once.
      arguments, outputs, aliased, temporaries, code: bytes of HBM; outputs hold the aliased ones.
    """

    program: Program
    executable: Any
    module: hlo.Module
    seconds: float
    effort: float
    flops: float
    bytes_accessed: float
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def hbm(self) -> int:
        """Bytes of HBM that the step holds at most."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    @property
    def hbm_traffic(self) -> int:
        """Bytes accessed less those in VMEM: nearly what crosses to HBM, and not more."""
        return max(int(self.bytes_accessed) - self.module.vmem_bytes(), 0)

    @property
    def collectives(self) -> list[hlo.Collective]:
        """Of one step, largest first."""
        return self.module.collectives(dict(self.program.mesh.shape))


def compile_step(
    experiment: Experiment, target: Slice, *, effort: float = 0.0, windowed_einsum: bool = False
) -> Compiled:
    """Compiles the train step of an experiment for a slice.

    Args:
      experiment: what to train.
      target: what to train it on.
      effort: of the compiler, from -1 (a fraction of the time) to 0.
      windowed_einsum: leave that transformation on, as in a run; counts are then too low.

    Raises:
      ConfigError: mesh or batch do not fit the slice.
      DoesNotFitError: the program does not fit into memory.
    """
    config = experiment.config
    mesh = sharding.make_mesh(**config.mesh, devices=target.devices)
    program = build(
        experiment.task,
        config,
        mesh,
        steps_per_epoch=experiment.steps_per_epoch,
        total_steps=experiment.total_steps,
    )
    options = {} if windowed_einsum else _NO_WINDOWED_EINSUM
    began = time.monotonic()
    try:
        with _effort(effort):
            executable = program.compile_train_step(**options)
    except jax.errors.JaxRuntimeError as error:
        needed = _memory_excess(str(error))
        if needed is None:
            raise
        raise DoesNotFitError(*needed) from None
    seconds = time.monotonic() - began
    memory, cost = executable.memory_analysis(), executable.cost_analysis()
    assert memory is not None and cost is not None
    return Compiled(
        program=program,
        executable=executable,
        module=hlo.Module(executable.as_text() or ""),
        seconds=seconds,
        effort=effort,
        flops=cost["flops"],
        bytes_accessed=cost["bytes accessed"],
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )


@contextlib.contextmanager
def _effort(effort: float):
    """The compiler's effort is a global setting of jax: it must not leak into later compiles."""
    name = "jax_exec_time_optimization_effort"
    before = getattr(jax.config, name)
    jax.config.update(name, effort)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _memory_excess(message: str) -> tuple[float, float] | None:
    """(needed, available) bytes, from the compiler's message that memory does not suffice."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in (
        r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
    ):
        found = re.search(pattern, message)
        if found:
            needed, unit, available, other = found.groups()
            return float(needed) * _UNITS[unit], float(available) * _UNITS[other]
    return None
