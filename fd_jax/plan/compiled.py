"""Compiles the real train step ahead of time, without the chips, and records its properties."""

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

# Windowed einsum is off, because it turns gathers and matmuls of sharded weights into loops, whose
# bodies the compiler counts only once. Without it, a step overlaps less than that of a real run.
_NO_WINDOWED_EINSUM = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


class DoesNotFitError(Exception):
    """The compiled program does not fit into memory.

    Attributes:
      needed, available: bytes of HBM on a device, according to the compiler.
      temporaries_only: whether `needed` leaves out the arguments; the compiler does not count
        further if the temporaries alone are too much.
    """

    def __init__(self, needed: float, available: float, *, temporaries_only: bool = False):
        super().__init__(f"needs {needed:.3e} bytes of HBM, {available:.3e} are available")
        self.needed, self.available = needed, available
        self.temporaries_only = temporaries_only


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled train step; all numbers are per device.

    Attributes:
      program: the program that was compiled.
      executable: jax's compiled executable.
      module: its parsed text.
      seconds: compile time.
      effort: compiler effort; 0 is that of real runs, lower compiles faster, but to slower code.
      flops: FLOPs of one step by the compiler's count, with loop bodies once.
      bytes_accessed: bytes that instructions access in HBM or VMEM, with loop bodies once.
      arguments, outputs, aliased, temporaries, code: bytes of HBM; outputs include aliased ones.
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
        """Peak bytes of HBM that the step uses."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    @property
    def hbm_traffic(self) -> int:
        """Bytes accessed outside VMEM: close to the real HBM traffic, and not more than it."""
        return max(int(self.bytes_accessed) - self.module.vmem_bytes(), 0)

    @property
    def collectives(self) -> list[hlo.Collective]:
        """Collectives of one step, largest first."""
        return self.module.collectives(dict(self.program.mesh.shape))


def compile_step(
    experiment: Experiment, target: Slice, *, effort: float = 0.0, windowed_einsum: bool = False
) -> Compiled:
    """Compiles the train step of an experiment for a slice.

    Args:
      experiment: experiment to train.
      target: slice to train on.
      effort: compiler effort, from -1 (a fraction of the compile time) to 0.
      windowed_einsum: leave windowed einsum on, as in a real run; the counts are then too low.

    Raises:
      ConfigError: the mesh or the batch does not fit the slice.
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
    options: dict[str, Any] = {} if windowed_einsum else _NO_WINDOWED_EINSUM
    began = time.monotonic()
    try:
        with _effort(effort):
            executable = program.compile_train_step(**options)
    except jax.errors.JaxRuntimeError as error:
        excess = _memory_excess(str(error))
        if excess is None:
            raise
        raise excess from None
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
    """Sets the compiler effort, a global setting of jax, and restores it for later compiles."""
    name = "jax_exec_time_optimization_effort"
    before = getattr(jax.config, name)
    jax.config.update(name, effort)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _memory_excess(message: str) -> DoesNotFitError | None:
    """The error that an out-of-memory message of the compiler tells, else None."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern, temporaries_only in (
        (r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", False),
        (r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", True),
    ):
        match = re.search(pattern, message)
        if match:
            needed, needed_unit, available, available_unit = match.groups()
            return DoesNotFitError(
                float(needed) * _UNITS[needed_unit],
                float(available) * _UNITS[available_unit],
                temporaries_only=temporaries_only,
            )
    return None
