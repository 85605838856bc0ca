"""Cycles of our kernels, for which the compiler gives no estimate.

A TPU core runs one bundle of instructions per cycle, unless it waits. So the number of bundles in a
kernel's final code, which the compiler writes to a file on request, times the number of programs is
the time that a call takes if nothing waits: not for memory, nor for the start of a program. Our
kernels have no loops inside a program.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from fd_jax.models.kernels import pallas_tpu
from fd_jax.plan import hlo


def cycles(module: hlo.Module, topology: str) -> int:
    """Cycles of all kernels of a step, each compiled once more alone in a process of its own.

    Args:
      module: compiled program.
      topology: slice that it is compiled for.

    Raises:
      RuntimeError: a kernel is not one of ours, or its code was not found.
    """
    return sum(kernel.calls * _of_a_call(kernel.name, topology) for kernel in module.kernels)


def _of_a_call(name: str, topology: str) -> int:
    call = pallas_tpu.parse(name)
    if call is None:
        raise RuntimeError(f"the kernel {name!r} is not one whose cycles can be counted")
    with tempfile.TemporaryDirectory() as folder:
        # Read once, when the compiler's library is loaded: therefore a process of its own.
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        subprocess.run(
            [sys.executable, "-m", "fd_jax.plan.bundles", json.dumps([name, topology])],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags},
            check=True,
            stdout=sys.stderr,
            process_group=0,  # Ctrl-C reaches only this process, which then ends the other
        )
        return call.programs * _bundles(pathlib.Path(folder), name)


def _bundles(folder: pathlib.Path, name: str) -> int:
    files = [
        path
        for path in folder.glob(f"*{name}*-final_bundles.txt")
        if "schedule-analysis" not in path.name
    ]
    if len(files) != 1:
        raise RuntimeError(f"expected one file with the code of {name}, found {len(files)}")
    return len(re.findall(r"^ *0x[0-9a-f]+ +:", files[0].read_text(), re.MULTILINE))


def _main() -> None:
    """Compiles the one kernel that the first argument names."""
    import jax

    from fd_jax.plan import topology

    name, slice_name = json.loads(sys.argv[1])
    call = pallas_tpu.parse(name)
    assert call is not None
    device = topology.describe(slice_name).devices[0]
    call.lower(jax.sharding.SingleDeviceSharding(device)).compile()


if __name__ == "__main__":
    _main()
