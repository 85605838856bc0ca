r"""A Swin-B against transformers' on the same CPU: forward, forward and backward, and compile time.

    python -m benchmarks.swin_vs_transformers --family=swin --batch=8 --rounds=5

Both networks have the same weights (written by transformers, read by our converter) and the same
images; their features are compared first. In every round each side runs once, in turn, so that
other load on the machine falls on both; medians and the median of the rounds' ratios are printed.
The loss is the mean square of the features; the backward pass gives gradients of all parameters.
"""

import argparse
from pathlib import Path
import statistics
import tempfile
import time

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from fd_jax.convert import importing, sources, verifying
from fd_jax.models.spec import ModelSpec

# family -> the source whose file transformers writes
SOURCES = {
    "swin": "swin_base_patch4_window7_224_hf",
    "swin_v2": "swinv2_base_patch4_window8_256_hf",
}


def networks(family: str, folder: Path) -> tuple[torch.nn.Module, ModelSpec, dict]:
    """The network of transformers with its own initialisation, and ours with the same weights."""
    name = SOURCES[family]
    arch = sources.get(name).parts["classifier"].spec.arch
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
        made = transformers.SwinForImageClassification(transformers.SwinConfig(**common))
        theirs = made.swin
    else:
        made = transformers.Swinv2ForImageClassification(transformers.Swinv2Config(**common))
        theirs = made.swinv2
    made.save_pretrained(folder)
    read = importing.read(name, folder)
    return theirs.eval(), read.spec, jax.tree.map(jnp.asarray, read.params["encoder"])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--family", choices=sorted(SOURCES), default="swin")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        theirs, spec, params = networks(arguments.family, Path(folder))
    size = spec.arch["image_size"]
    shape = (arguments.batch, size, size, 3)
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
    ours = {name: compiled(run, params, images) for name, run in functions(spec).items()}

    def their_forward():
        with torch.no_grad():
            return theirs(pixels).last_hidden_state

    def their_backward():
        theirs.zero_grad(set_to_none=True)
        theirs(pixels).last_hidden_state.square().mean().backward()

    found = np.asarray(ours["forward"](params, images))
    expected = their_forward().numpy()
    off = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"features differ by {off:.1e} of the largest value")
    assert off < verifying.TOLERANCE
    for name, reference in (("forward", their_forward), ("backward", their_backward)):
        compare(
            "forward and backward" if name == "backward" else name,
            lambda name=name: jax.block_until_ready(ours[name](params, images)),
            reference,
            arguments.rounds,
        )


def functions(spec: ModelSpec):
    """Ours, to be compiled: features, and gradients of their mean square."""
    definition, _ = spec.abstract()

    def forward(params, images):
        return nnx.merge(definition, params)(images).tokens

    def loss(params, images):
        return jnp.mean(jnp.square(forward(params, images)))

    return {"forward": forward, "backward": jax.value_and_grad(loss)}


def compiled(run, params, images):
    """The compiled function; prints what tracing and compiling took."""
    start = time.perf_counter()
    lowered = jax.jit(run).lower(params, images)
    traced = time.perf_counter()
    made = lowered.compile()
    print(
        f"{run.__name__}: traced in {traced - start:.1f} s, "
        f"compiled in {time.perf_counter() - traced:.1f} s"
    )
    return made


def compare(name: str, ours, theirs, rounds: int) -> None:
    """Runs both in turn, after one round that does not count."""
    rows = []
    for number in range(rounds + 1):
        row = []
        for run in (ours, theirs):
            start = time.perf_counter()
            run()
            row.append(time.perf_counter() - start)
        if number:
            rows.append(row)
    us, them = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(us / them for us, them in rows)
    print(f"{name}: ours {us:.2f} s, transformers {them:.2f} s, ours / theirs {ratio:.2f}")


if __name__ == "__main__":
    main()
