r"""UPerNet on a ViT-B compared with transformers on the same CPU: forward and backward.

    python -m benchmarks.segment_vs_transformers --rounds=7 --output=segment_vs_transformers.json

The network is BeitForSemanticSegmentation with ADE20K's 150 classes at 512 pixels, one picture:
encoder, pyramid, UPerNet, auxiliary head, and both losses at the size of the label. BatchNorm uses
its running statistics on all sides, since a single picture has no statistics of its own. The sides
are ours, and transformers with torch's eager and its fused attention.

Each side has its own process, because in a shared process the allocator of one slows the other
down, and computes with the same number of threads. All use the same picture and the same weights
(initialised and written by transformers, read by our converter); logits and losses are compared
first. In every round each side runs once, so other load on the machine affects all of them.
"""

import argparse
import json
import os
from pathlib import Path
import platform
import statistics
import tempfile
from typing import Any

from etils import epath
import numpy as np

from benchmarks.swin_vs_transformers import WORKS, Functions, Sides
from fd_jax import files
from fd_jax.convert import importing, verifying

CLASSES, AUXILIARY_WEIGHT = 150, 0.4
OURS, EAGER, FUSED = "ours", "transformers, eager", "transformers, sdpa"
BASE: dict[str, Any] = {"image_size": 512}  # the rest of BEiT-B is transformers' default
TOY: dict[str, Any] = {
    "image_size": 64,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "auxiliary_channels": 16,
}


def example(side: int) -> tuple[np.ndarray, np.ndarray]:
    """A random normalised picture and its labels, of which some are ignored.

    Returns:
      float32 [1, side, side, 3], int64 [1, side, side].
    """
    rng = np.random.default_rng(0)
    mask = rng.integers(0, CLASSES, (1, side, side))
    mask[rng.random(mask.shape) < 0.1] = 255
    return rng.standard_normal((1, side, side, 3)).astype(np.float32), mask


def write_weights(fields: dict[str, Any], folder: Path) -> None:
    """Writes the network of transformers as it initialises it."""
    import torch
    import transformers

    config = transformers.BeitConfig(
        **fields,
        num_labels=CLASSES,
        use_relative_position_bias=True,
        out_indices=[3, 5, 7, 11],
        auxiliary_loss_weight=AUXILIARY_WEIGHT,
        drop_path_rate=0.0,
    )
    torch.manual_seed(0)
    transformers.BeitForSemanticSegmentation(config).save_pretrained(folder)


def theirs(folder: Path, side: int, threads: int, attention: str) -> Functions:
    """The network of transformers with one of its attentions."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.BeitForSemanticSegmentation.from_pretrained(
        folder, attn_implementation=attention
    ).eval()
    images, mask = example(side)
    pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
    labels = torch.from_numpy(mask)

    def forward():
        with torch.no_grad():
            return np.moveaxis(model(pixels).logits.numpy(), 1, -1)

    def backward():
        model.zero_grad(set_to_none=True)
        # The mean over all pixels, as in mmsegmentation; transformers' own leaves ignored ones out.
        loss = model(pixels, labels=labels).loss * float((mask != 255).mean())
        loss.backward()
        return loss.detach().numpy()

    return dict(zip(WORKS, (forward, backward), strict=True))


def ours(folder: Path, side: int, threads: int) -> Functions:
    """Our network with the same weights, compiled."""
    os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}"
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    from flax import nnx
    import jax
    import jax.numpy as jnp

    from fd_jax import losses
    from fd_jax.models.batch_norm import Statistics
    from fd_jax.models.segmenter import maps_of
    from fd_jax.models.segmenter.network import AUXILIARY_LEVEL

    jax.config.update("jax_platforms", "cpu")
    read = importing.read("beit_segmentation_hf", folder)
    segmenter = read.spec.segmenter
    assert segmenter is not None
    encoder, head = read.spec.abstract()[0], read.spec.abstract_segmenter()[0]
    parts = jax.tree.map(jnp.asarray, read.params)
    running = parts.pop("segmenter_statistics")

    def logits(params, images):
        network: Any = nnx.merge(encoder, params["encoder"])
        decode: Any = nnx.merge(head, params["segmenter"])
        statistics = Statistics(running, training=False)
        maps = maps_of(network, images, segmenter["blocks"])
        grids = [each.on_grid().reshape(len(each.tokens), *each.grid, -1) for each in maps]
        levels = decode.neck(grids, statistics["neck"])
        main = decode.decoder(levels, statistics["decoder"], None)
        return main, decode.auxiliary(levels[AUXILIARY_LEVEL], statistics["auxiliary"], None)

    def loss(params, images, mask):
        main, auxiliary = (losses.pixel_cross_entropy(x, mask) for x in logits(params, images))
        return jnp.mean(main + AUXILIARY_WEIGHT * auxiliary)

    images, mask = example(side)
    forward = jax.jit(lambda params, images: logits(params, images)[0])
    backward = jax.jit(jax.value_and_grad(loss))

    def run_backward():
        value, _ = jax.block_until_ready(backward(parts, images, mask))
        return np.asarray(value)

    return dict(zip(WORKS, (lambda: np.asarray(forward(parts, images)), run_backward), strict=True))


def compare(sides: Sides) -> dict[str, dict[str, float]]:
    """How far the others' logits and losses are from ours, relative to the largest of ours.

    Raises:
      SystemExit: they differ, so that their times cannot be compared.
    """
    found: dict[str, dict[str, float]] = {}
    for work in WORKS:
        results = {name: result for name, (_, result) in sides.run(work).items()}
        largest = np.abs(results[OURS]).max()
        found[work] = {
            name: float(np.abs(result - results[OURS]).max() / largest)
            for name, result in results.items()
            if name != OURS
        }
    if max(max(each.values()) for each in found.values()) > verifying.TOLERANCE:
        raise SystemExit(f"the networks differ, so their times are not compared: {found}")
    return found


def measure(sides: Sides, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of every round, their medians, and the median ratio of ours to each of the others."""
    found = {}
    for work in WORKS:
        sides.run(work)  # warm-up
        turns = [sides.run(work) for _ in range(rounds)]
        seconds = {name: [turn[name][0] for turn in turns] for name in turns[0]}
        ratios = {
            name: statistics.median(us / them for us, them in zip(seconds[OURS], each, strict=True))
            for name, each in seconds.items()
            if name != OURS
        }
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        found[work] = {"seconds": seconds, "medians": medians, "ours_over_theirs": ratios}
    return found


def environment(threads: int) -> dict[str, Any]:
    """The processor and the versions of what computes."""
    import jax
    import torch
    import transformers

    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "threads": threads,
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    """Measures, prints and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--toy", action="store_true", help="a tiny network, to test this command")
    parser.add_argument("--output", type=Path, help="JSON file for the record")
    arguments = parser.parse_args()
    fields = TOY if arguments.toy else BASE
    with tempfile.TemporaryDirectory() as temporary:
        folder, side = Path(temporary), fields["image_size"]
        write_weights(fields, folder)
        common = (folder, side, arguments.threads)
        sides = Sides(
            {
                EAGER: (theirs, (*common, "eager")),
                FUSED: (theirs, (*common, "sdpa")),
                OURS: (ours, common),
            }
        )
    differences = compare(sides)
    figures = measure(sides, arguments.rounds)
    sides.close()
    for work, found in figures.items():
        for name, seconds in found["medians"].items():
            ratio = found["ours_over_theirs"].get(name)
            shown = "" if ratio is None else f", ours / theirs {ratio:.2f}"
            print(f"{work}: {name} {seconds:.2f} s{shown}", flush=True)
    record = {
        "environment": environment(arguments.threads),
        "network": {**fields, "classes": CLASSES, "batch": 1},
        "differences": differences,
        "figures": figures,
    }
    if arguments.output:
        files.write_text(epath.Path(arguments.output), json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
