"""Command line of `python -m fd_jax.diagnose`: measures models side by side and draws figures.

    python -m fd_jax.diagnose --model=teachers/clip_vit_b16 --model=student=runs/fd/model \
        --data=imagenet2012:validation --output=figures/clip
    python -m fd_jax.diagnose --model=runs/ft/model --data=folder/of/images --output=figures/ft \
        --figures=landscape --num_images=1000

The output folder receives every figure as PNG and SVG, all numbers as figures.json, and a
report.html that needs no internet connection. A command that was killed goes on where it was when
it is given again. What the figures mean is in docs/figures.md.
"""

import argparse
from collections.abc import Sequence
import sys

from fd_jax import console
from fd_jax.cli import processes
from fd_jax.diagnose import catalogue


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; a mistake of the user gives one message and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)

    def work() -> None:
        from fd_jax.diagnose import run  # needs the packages of the extra "train"

        run.run(args, ["python", "-m", "fd_jax.diagnose", *argv])

    return processes.run(args, work)


def _list_of_figures() -> str:
    lines = [f"  {name:<12}{figure.shows}" for name, figure in catalogue.FIGURES.items()]
    return "\n" + "\n".join(["figures:", *lines]) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = console.parser("python -m fd_jax.diagnose", f"{__doc__}{_list_of_figures()}")
    add = parser.add_argument
    add(
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]DIR",
        help="model folder; repeat it to compare models; the name is the last part of the path",
    )
    add("--data", required=True, help="TFDS name and split, as in digits:test, or folder of images")
    add("--data_dir", help="folder of prepared TFDS data")
    add("--output", required=True, help="folder of the results")
    add(
        "--figures",
        default="",
        help=f"comma-separated list of the figures above; default: {','.join(catalogue.DEFAULT)}",
    )
    add(
        "--num_images", type=int, help="number of images, spread evenly over the data; default: all"
    )
    add("--image_size", help="input size in pixels to resize all networks to: 224, or 224x336")
    add(
        "--normalize",
        default="patches",
        choices=["patches", "none"],
        help="whether attention on patches is divided by its sum before distances are taken",
    )
    add(
        "--compare",
        default="rows",
        choices=["rows", "columns"],
        help="what head similarity compares: rows (queries), or columns (keys) as DeepViT does",
    )
    add("--picture", help="image file for pca, rollout and heads; default: the first of the data")
    add(
        "--tables",
        default="zeroed",
        choices=["zeroed", "literal"],
        help="landscape: whether class token, positions and bias tables stay as they are",
    )
    add(
        "--match_classes",
        default="name",
        choices=["name", "number"],
        help="landscape: whether classes of the data are found in the head by name, or in order",
    )
    add("--points", type=int, default=51, help="landscape: number of points along a direction")
    add("--directions", type=int, default=5, help="landscape: number of random directions")
    add("--radius", type=float, default=1.0, help="landscape: points go from -radius to radius")
    add("--seed", type=int, default=0, help="landscape: seed of the directions")
    add(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="dtype of the networks for attention and landscapes; the rest is in float32",
    )
    add("--batch_size", type=int, help="batch size over all devices; default: 32 per device")
    add(
        "--save_every",
        type=float,
        default=30.0,
        help="seconds between two versions of the partial sums, from which a killed pass goes on",
    )
    add("--threads", type=int, default=16, help="number of decoding threads per process")
    add(
        "--max_broken",
        type=int,
        default=0,
        help="number of unreadable images that each process may leave out",
    )
    add("--overwrite", action="store_true", help="replace the results of another command")
    processes.add_flags(parser)
    return parser  # fmt: skip
