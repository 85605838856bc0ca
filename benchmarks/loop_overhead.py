r"""The loop's own cost: time per step outside the compiled call, without waiting for data.

    python -m benchmarks.loop_overhead

The loop of train.py and finetune.py runs unchanged on the digits at 224 pixels in batches of 32,
with a network so small that the rest of the loop dominates. Two clocks measure what is excluded:
the compiled step until its results are ready, and the loader. What remains is reading metrics,
writing them, and everything in between.

It is measured with pictures decoded in a separate process, and in a thread of this process. A
thread makes the loop wait for Python's lock; while a device computes, that wait costs nothing.
"""

import argparse
from collections.abc import Callable
import functools
import os
import statistics
import tempfile
import time
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import logging
import jax

from configs import base
from fd_jax.data import pipeline, prepare
from fd_jax.tasks import registry
from fd_jax.training import loop, program
from fd_jax.typing import Config

SHAPE = {"patch_size": 112, "width": 32, "depth": 1, "heads": 1, "mlp_width": 32}
UNCOUNTED = 11  # first steps, in which queues fill and the first line is logged


class Clock:
    """Sums the time spent in the functions that it wraps."""

    def __init__(self):
        self.inside = 0.0

    def around(self, function: Callable) -> Callable:
        """The same function, timed until its results are ready."""

        @functools.wraps(function)
        def timed(*args, **kwargs):
            began = time.perf_counter()
            result = jax.block_until_ready(function(*args, **kwargs))
            self.inside += time.perf_counter() - began
            return result

        return timed


def config(steps: int, data_dir: str, workers: int) -> Config:
    """Fine-tuning from random weights, without evaluation or checkpoints during the run."""
    made = base.fine_tuning(drop_path=0.0, layer_decay=1.0, peak_lr=1e-3, floor_lr=1e-5)
    arch = base.student(SHAPE, image_size=224)
    made.model.update(family="vit", arch=arch, classes=10)
    made.update(batch_size=32, steps=steps, log_every=10)
    made.mixing.update(mixup=0.0, cutmix=0.0, erasing=0.0)
    made.data.update(name="digits", eval_split="", data_dir=data_dir, rand_augment="")
    made.data.update(threads=1, workers=workers)
    made.eval.update(every=10**6, epochs=0.0)
    made.optim.warmup_epochs = 0.0
    made.checkpoint.every = 10**6
    return made


def measure(made: Config) -> list[float]:
    """Seconds outside both clocks for each step, without the first ones."""
    clock, outside = Clock(), []
    last = [0.0, 0.0]  # wall clock and the time inside, when the last step began

    def compile_timed(*args, **options):
        step = clock.around(compile_step(*args, **options))

        def counted(*args):
            now = time.perf_counter()
            outside.append((now - last[0]) - (clock.inside - last[1]))
            last[:] = now, clock.inside
            return step(*args)

        return counted

    compile_step = program.Program.compile_train_step
    with (
        mock.patch.object(program.Program, "compile_train_step", compile_timed),
        mock.patch.object(
            pipeline.TrainLoader, "__next__", clock.around(pipeline.TrainLoader.__next__)
        ),
        tempfile.TemporaryDirectory() as workdir,
    ):
        loop.fit(registry.make(made), made, workdir)
    return outside[UNCOUNTED:]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=210)
    parser.add_argument("--data_dir", default="data")
    args = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    print(prepare.prepare("digits", data_dir=args.data_dir))
    for workers, where in ((1, "in a separate process"), (0, "in a thread of this process")):
        outside = [1e3 * x for x in measure(config(args.steps, args.data_dir, workers))]
        print(
            f"decoding {where}: median {statistics.median(outside):.2f} ms per step outside the "
            f"compiled call, mean {statistics.fmean(outside):.2f} ms ({len(outside)} steps, "
            "metrics written every 10)"
        )


if __name__ == "__main__":
    main()
