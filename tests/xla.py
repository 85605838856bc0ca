"""How XLA compiles the programs of the tests, in this process and in those that tests start."""

import importlib.metadata

# Most of the suite's time is compilation, and a third of that is LLVM's optimisation.
UNOPTIMIZED = "--xla_backend_optimization_level=0"
# Half of the rest is MLIR's passes for fusions. What XLA does without them takes longer for large
# networks (twice as long for the step of the quickstart). A newer XLA has no such flag, and ends a
# process that it is given to.
_JAXLIB = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
FAST = f"{UNOPTIMIZED} --xla_cpu_use_fusion_emitters=false" if _JAXLIB < (0, 11) else UNOPTIMIZED


def flags(devices):
    """XLA_FLAGS for a process with this number of fake devices and small networks."""
    return f"--xla_force_host_platform_device_count={devices} {FAST}"
