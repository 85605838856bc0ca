r"""Compiles the steps of benchmarks.gpu for an H100 without a GPU; prints memory and kernels.

    python -m benchmarks.gpu_ahead
    python -m benchmarks.gpu_ahead --model=l --batch=128 --attention=cudnn

XLA's compiler for NVIDIA GPUs gets a description of the GPU instead of the GPU itself. This needs
`pip install 'jax-cuda13-plugin[with-cuda]'` in the version of jax, but no GPU. Nothing is timed, so
no matmul is tuned. Throughput, and the library that computes the matmuls, can only be measured with
benchmarks.gpu.
"""

import argparse
import collections
import os
import re
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jax.experimental import topologies

from benchmarks.gpu import BATCHES, CHOICES
from benchmarks.gpu_worker import GIB, Job, define
from fd_jax import sharding
from fd_jax.models import kernels
from fd_jax.training.program import build

# The properties that CUDA reports for this GPU, as text of XLA's GpuTargetConfigProto.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_memory_size: 84942979072 memory_bandwidth: 3352320000000
}
"""


def compile_step(model: str, batch: int, attention: str) -> jax.stages.Compiled:
    """The train step of a model in bfloat16, for one H100."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
    )
    with kernels.compiling_for("gpu"):
        task, config = define(Job("fd_jax", model, batch, attention), attention, dtype="bfloat16")
    mesh = sharding.make_mesh(devices=topology.devices)
    return build(task, config, mesh, steps_per_epoch=100, total_steps=1000).compile_train_step()


def attention_kernels(text: str) -> dict[str, int]:
    """Counts each of cuDNN's attention kernels in a compiled program: name -> count."""
    found = re.findall(r'custom_call_target="__cudnn\$(\w+)"', text)
    return dict(sorted(collections.Counter(found).items()))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=BATCHES, help="default: both")
    parser.add_argument("--batch", type=int, help="default: the larger batch of benchmarks.gpu")
    parser.add_argument("--attention", choices=CHOICES, help="default: all")
    args = parser.parse_args()
    print("| model | batch | attention | GiB held | of which temporary | cuDNN's kernels | s |")
    print("|---|---|---|---|---|---|---|")
    for model in [args.model] if args.model else BATCHES:
        for attention in [args.attention] if args.attention else CHOICES:
            batch = args.batch or BATCHES[model][0]
            began = time.monotonic()
            compiled = compile_step(model, batch, attention)
            seconds = time.monotonic() - began
            memory = compiled.memory_analysis()
            assert memory is not None
            arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
            calls = attention_kernels(compiled.as_text() or "")
            shown = ", ".join(f"{count} {name}" for name, count in calls.items()) or "none"
            print(
                f"| ViT-{model.upper()} | {batch} | {attention} | "
                f"{(arguments + temporary) / GIB:.1f} | {temporary / GIB:.1f} | {shown} | "
                f"{seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
