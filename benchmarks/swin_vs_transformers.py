r"""Swin-B compared with transformers on the same CPU: forward, backward and compile time.

    python -m benchmarks.swin_vs_transformers --family=swin --batch=4 --rounds=7

Each side has its own process, because in a shared process the allocator of one slows the other
down. Both use the same images and the same weights (initialised and written by transformers, read
by our converter), and their features are compared first. In every round each side runs once, so
other load on the machine affects both. The command prints medians, and the median of the rounds'
ratios. The loss is the mean square of the features; the backward pass gives gradients of all
parameters.
"""

import argparse
from collections.abc import Callable, Mapping
import multiprocessing
from pathlib import Path
import statistics
import tempfile
import time
from typing import Any

import numpy as np

from fd_jax.convert import families, importing, verifying

# family: the source whose file format transformers writes
SOURCES = {
    "swin": "swin_base_patch4_window7_224_hf",
    "swin_v2": "swinv2_base_patch4_window8_256_hf",
}
WORKS = ("forward", "forward and backward")
Functions = dict[str, Callable[[], Any]]


def pictures(family: str, batch: int) -> np.ndarray:
    """Random normalised images. [B, H, W, 3]"""
    size = families.get(SOURCES[family]).parts["classifier"].spec.arch["image_size"]
    shape = (batch, size, size, 3)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def theirs(family: str, folder: Path, batch: int) -> Functions:
    """The network of transformers, initialised by itself; writes its weights to `folder`."""
    import torch
    import transformers

    arch = families.get(SOURCES[family]).parts["classifier"].spec.arch
    common = {
        "image_size": arch["image_size"],
        "embed_dim": arch["embed_width"],
        "depths": arch["depths"],
        "num_heads": arch["heads"],
        "window_size": arch["window"],
        "drop_path_rate": 0.0,
    }
    torch.manual_seed(0)
    if family == "swin":
        model = transformers.SwinModel(transformers.SwinConfig(**common), add_pooling_layer=False)
    else:
        config = transformers.Swinv2Config(**common)
        model = transformers.Swinv2Model(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    model.eval()
    pixels = torch.from_numpy(np.moveaxis(pictures(family, batch), -1, 1).copy())

    def forward():
        with torch.no_grad():
            return model(pixels).last_hidden_state.numpy()

    def backward():
        model.zero_grad(set_to_none=True)
        model(pixels).last_hidden_state.square().mean().backward()

    return dict(zip(WORKS, (forward, backward), strict=True))


def ours(family: str, folder: Path, batch: int) -> Functions:
    """Our network with the same weights, compiled; prints the compile time."""
    from flax import nnx
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_platforms", "cpu")
    read = importing.read(SOURCES[family], folder)
    definition, _ = read.spec.abstract()
    arguments = (jax.tree.map(jnp.asarray, read.params["encoder"]), pictures(family, batch))

    def forward(params, images):
        return nnx.merge(definition, params)(images).tokens

    def loss(params, images):
        return jnp.mean(jnp.square(forward(params, images)))

    made: Functions = {}
    for name, run in zip(WORKS, (forward, jax.value_and_grad(loss)), strict=True):
        start = time.perf_counter()
        lowered = jax.jit(run).lower(*arguments)
        traced = time.perf_counter()
        compiled = lowered.compile()
        seconds = traced - start, time.perf_counter() - traced
        print(f"{name}: traced in {seconds[0]:.1f} s, compiled in {seconds[1]:.1f} s", flush=True)
        made[name] = lambda compiled=compiled: jax.block_until_ready(compiled(*arguments))
    return made


def serve(make: Callable[..., Functions], arguments: tuple, pipe: Any) -> None:
    """The process of one side: runs what it is asked to, and returns seconds and any array."""
    runs = make(*arguments)
    pipe.send("ready")
    while (name := pipe.recv()) is not None:
        start = time.perf_counter()
        result = runs[name]()
        seconds = time.perf_counter() - start
        pipe.send((seconds, np.asarray(result) if hasattr(result, "shape") else None))


class Sides:
    """A process for each side, which runs what it is asked to.

    Args:
      makers: by name, what makes the functions of a side in its process, and its arguments. The
        sides start one after the other, so that one may read what another writes.
    """

    def __init__(self, makers: Mapping[str, tuple[Callable[..., Functions], tuple]]):
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = {}, []
        for name, (make, arguments) in makers.items():
            self._pipes[name], other = context.Pipe()
            given = (make, arguments, other)
            self._processes.append(context.Process(target=serve, args=given, daemon=True))
            self._processes[-1].start()
            other.close()  # so that a side that fails is the end of the pipe
            self._pipes[name].recv()

    def run(self, work: str) -> dict[str, tuple[float, Any]]:
        """Seconds and any array of each side, one side after the other."""
        answers = {}
        for name, pipe in self._pipes.items():
            pipe.send(work)
            answers[name] = pipe.recv()
        return answers

    def close(self) -> None:
        """Ends the processes."""
        for pipe, process in zip(self._pipes.values(), self._processes, strict=True):
            pipe.send(None)
            process.join()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--family", choices=sorted(SOURCES), default="swin")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        common = (arguments.family, Path(folder), arguments.batch)
        # In this order, since ours reads what theirs writes.
        sides = Sides({"theirs": (theirs, common), "ours": (ours, common)})
    (_, expected), (_, found) = sides.run("forward").values()
    off = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"features differ by {off:.1e} of the largest value")
    if off > verifying.TOLERANCE:
        raise SystemExit("the two networks differ, so their times are not compared")
    for name in WORKS:
        sides.run(name)  # warm-up
        turns = [sides.run(name).values() for _ in range(arguments.rounds)]
        rows = [[seconds for seconds, _ in turn] for turn in turns]
        them, us = (statistics.median(column) for column in zip(*rows, strict=True))
        ratio = statistics.median(us / them for them, us in rows)
        print(f"{name}: ours {us:.2f} s, transformers {them:.2f} s, ours / theirs {ratio:.2f}")
    sides.close()


if __name__ == "__main__":
    main()
