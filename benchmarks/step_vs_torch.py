r"""One distillation step, CLIP ViT-B/16 into ViT-B/16, on this CPU, compared with eager PyTorch.

    python -m benchmarks.step_vs_torch --rounds 7

Both sides use batch 4, float32, random weights, the same shapes and the same work
(benchmarks/torch_step.py). They take turns: each round runs some steps of each side. The medians
are compared, and the compile time is printed separately. Both sides may use all cores.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import torch

from benchmarks import jax_step
from benchmarks.torch_step import Step
from configs import distill_clip_vit_b16
from fd_jax.convert import families
from fd_jax.tasks import registry

BATCH, STEPS = 4, 2


def ours(images: np.ndarray) -> jax_step.JaxStep:
    """The step of fd_jax, compiled."""
    config = distill_clip_vit_b16.get_config()
    config.update(batch_size=BATCH, dtype="float32")
    source = families.get(config.teacher.source)
    spec = source.parts[source.default_part].spec
    task = registry.make(config, {registry.TEACHER: spec})
    return jax_step.distillation(task, config, images)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    images = np.random.default_rng(0).integers(0, 256, (BATCH, 224, 224, 3), dtype=np.uint8)
    step_of_ours, step_of_torch = ours(images), Step()
    tensor = torch.from_numpy(images)
    sides = {
        "fd_jax": lambda: jax.block_until_ready(step_of_ours()),
        "PyTorch, eager": lambda: step_of_torch(tensor).item(),
    }
    for step in sides.values():
        step()  # allocation, caches
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, step in sides.items():
            began = time.monotonic()
            for _ in range(STEPS):
                step()
            times[name].append((time.monotonic() - began) / STEPS)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(
            f"{name:15s} median {medians[name]:.2f} s per step "
            f"({min(values):.2f} to {max(values):.2f}, {args.rounds} rounds)"
        )
    a, b = medians.values()
    seconds = step_of_ours.compile_seconds
    print(f"ratio {a / b:.2f}; compiled in {seconds:.0f} s; {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
