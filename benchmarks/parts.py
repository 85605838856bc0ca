r"""Training a whole network, all but its first blocks, or low-rank updates: values, memory, time.

    python -m benchmarks.parts --init_from=teachers/dinov2_vits14_onnx

Each is the distillation step of the quickstart (32 photographs of 98 pixels on the first device,
DINOv2 ViT-S/14 as the teacher), with the network in `init_from` as the student. Steps of the three
take turns, so that other work on the machine slows all of them alike; the ratios are of medians.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import numpy as np

from benchmarks import jax_step
from configs import base, quickstart
from fd_jax import settings
from fd_jax.console import say
from fd_jax.data.feed import Feed
from fd_jax.tasks.distill import DistillTask
from fd_jax.training.account import count

BLOCKS, RANK = 6, 8
PARTS: dict[str, dict[str, Any]] = {
    "the whole network": {},
    f"all but the first {BLOCKS} blocks": {"student.freeze_blocks": BLOCKS},
    f"updates of rank {RANK}": {"lora.rank": RANK},
}


def main() -> None:
    """Prints one line for each part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--init_from", required=True, help="model folder of the student")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each")
    given = parser.parse_args()
    images = photographs()
    steps = {name: step(given.init_from, images, fields) for name, fields in PARTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(given.rounds + 1):
        for name, one in steps.items():
            began = time.monotonic()
            jax.block_until_ready(one())
            if number:  # the first steps warm up
                seconds[name].append(time.monotonic() - began)
    report(steps, {name: statistics.median(each) for name, each in seconds.items()})


def photographs() -> np.ndarray:
    """A batch of the quickstart. -> uint8 [32, 98, 98, 3]"""
    config = quickstart.get_config()
    batches = Feed(**config.data).sequential("train", batch_size=config.batch_size, limit=1)
    return next(iter(batches))["image"]


def step(init_from: str, images: np.ndarray, fields: dict[str, Any]) -> jax_step.JaxStep:
    """The compiled step of a part."""
    config = quickstart.get_config()
    start = base.distillation(teacher="", drop_path=0.0, init_from=init_from)
    config.student = start.student
    config.update_from_flattened_dict(fields)
    settings.check(config)
    return jax_step.distillation(DistillTask(config), config, images)


def report(steps: dict[str, jax_step.JaxStep], seconds: dict[str, float]) -> None:
    """Prints values that train, bytes of the state, FLOPs and time, relative to the first."""
    whole = next(iter(steps))
    for name, one in steps.items():
        params, _ = jax.eval_shape(one.task.init, jax.random.key(0))
        tx, _ = one.task.optimizer(params, steps_per_epoch=100, total_steps=1000)
        state = nbytes(params) + nbytes(jax.eval_shape(tx.init, params))
        held = nbytes(one.task.abstract_frozen().get("student", {}))
        memory = one.compiled.memory_analysis()
        work = one.task.flops().executed / steps[whole].task.flops().executed
        say(
            f"{name}: {count(params):,} values train; {state / 2**20:.1f} MiB of parameters and "
            f"moments, {held / 2**20:.1f} MiB held, {memory.temp_size_in_bytes / 2**20:.0f} MiB "
            f"temporaries; {work:.2f} of the FLOPs, {seconds[name] / seconds[whole]:.2f} of the "
            f"time ({seconds[name]:.2f} s a step)"
        )


def nbytes(tree: Any) -> int:
    """Bytes of the arrays of a tree of shapes."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
