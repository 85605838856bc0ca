r"""Statistics of attention compared with a plain forward pass: rate and memory.

    python -m benchmarks.diagnose --figures=distance,similarity,maps --batch=16 --rounds=7

A ViT-B/16 at 224 pixels with random weights in float32. The forward pass returns the feature map;
the statistics are those of all blocks together, which need the weights of the last block but not
its output, so that a rate above 1 is possible. Each has a process of its own, so that their peak
memory can be compared: that of the whole process, with weights, compiler and Python, and what the
compiled function allocates beside its arguments. In every round each runs once, so that other load
on the machine affects both. The command prints medians, and the median of the rounds' ratios.
"""

import argparse
from collections.abc import Callable, Sequence
import multiprocessing
import statistics
import time
from typing import Any

MB = 2**20


def network(image_size: int) -> Any:
    """The model, as if it were read from a folder."""
    from flax import nnx

    from configs import base
    from fd_jax import inference
    from fd_jax.models import spec as specs

    arch = base.student(base.VIT_B16, image_size=image_size, position="ape")
    spec = specs.ModelSpec("vit", arch, source="random")
    _, encoder = specs.split(spec.build(rngs=nnx.Rngs(0)))
    return inference.Model(spec, {"encoder": encoder})


def forward(model: Any, figures: Sequence[str]) -> tuple[Callable[..., Any], Any]:
    """What is compared with: normalisation and the network, as a function of (params, batch)."""
    from flax import nnx

    del figures
    definition, _ = model.spec.abstract()

    def run(params, batch):
        return nnx.merge(definition, params)(model.spec.normalize(batch["image"])).tokens

    return run, model.params["encoder"]


def diagnose(model: Any, figures: Sequence[str]) -> tuple[Callable[..., Any], Any]:
    """The statistics, as a function of (params, batch)."""
    from fd_jax.diagnose.attention import AttentionStatistics

    measured = AttentionStatistics("random", model, figures)
    return measured.sums, measured.params


def serve(make: Callable[..., Any], arguments: argparse.Namespace, pipe: Any) -> None:
    """The process of one side: compiles, then runs when asked to and returns the seconds."""
    import jax
    import numpy as np

    jax.config.update("jax_platforms", "cpu")
    run, params = make(network(arguments.image_size), arguments.figures)
    rng = np.random.default_rng(0)
    shape = (arguments.batch, arguments.image_size, arguments.image_size, 3)
    batch = {
        "image": rng.integers(0, 256, shape, dtype=np.uint8),
        "weight": np.ones(arguments.batch, np.float32),
    }
    began = time.perf_counter()
    compiled = jax.jit(run).lower(params, batch).compile()
    pipe.send((time.perf_counter() - began, compiled.memory_analysis().temp_size_in_bytes))
    while pipe.recv():
        began = time.perf_counter()
        jax.block_until_ready(compiled(params, batch))
        pipe.send((time.perf_counter() - began, peak_bytes()))


def peak_bytes() -> int:
    """The most memory that this process has had (Linux); getrusage counts its parent's, too."""
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--figures", type=lambda text: text.split(","), default="distance,similarity,maps"
    )
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes, processes, temporary = [], [], []
    for make in (forward, diagnose):
        pipe, other = context.Pipe()
        given = (make, arguments, other)
        processes.append(context.Process(target=serve, args=given, daemon=True))
        processes[-1].start()
        seconds, size = pipe.recv()
        print(f"{make.__name__}: compiled in {seconds:.1f} s", flush=True)
        pipes.append(pipe)
        temporary.append(size)

    def round_of_both() -> list[tuple[float, int]]:
        answers = []
        for pipe in pipes:
            pipe.send(True)
            answers.append(pipe.recv())
        return answers

    round_of_both()  # warm-up
    rounds = [round_of_both() for _ in range(arguments.rounds)]
    seconds = [[answer[0] for answer in answers] for answers in rounds]
    peaks = [size for _, size in rounds[-1]]
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(False)
        process.join()
    plain, ours = (arguments.batch / statistics.median(side) for side in zip(*seconds, strict=True))
    rate = statistics.median(forward / diagnose for forward, diagnose in seconds)
    print(f"forward {plain:.2f} images/s, {', '.join(arguments.figures)} {ours:.2f} images/s")
    print(f"rate: {rate:.2f} of the forward pass's")
    for name, (base, size) in {"process": peaks, "temporary arrays": temporary}.items():
        print(
            f"peak memory, {name}: forward {base / MB:.0f} MB, diagnose {size / MB:.0f} MB, "
            f"{size / base:.2f} of it"
        )


if __name__ == "__main__":
    main()
