"""The flags of `python -m fd_jax.targets`."""

import argparse
from typing import get_args

from fd_jax import console
from fd_jax.cli import processes, teacher_flags
from fd_jax.console import at_least
from fd_jax.data.base import Crop, Interpolation
from fd_jax.data.stored import codecs
from fd_jax.models.cropping import EVAL_RATIO
from fd_jax.models.narrow import KINDS

SHARD_SIZE = 2048  # pictures: 0.6 GB of a ViT-B's maps in bfloat16, and 626 files for ImageNet
COMPONENTS = 256


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of the command; `description` is what it does."""
    result = console.parser("python -m fd_jax.targets", description)
    add = result.add_argument
    add("--data", required=True, help="TFDS name, or folder of images")
    add("--split", default="train", help="split of the dataset: data.split of the run")
    add("--data_dir", help="folder of prepared TFDS data")
    add("--output", required=True, help="folder to write, or to go on with")
    teacher_flags.add(result)
    add("--matmuls", choices=("", *KINDS), default="", help="teacher.matmuls of the run")
    _add_views(result)
    _add_storage(result)
    add(
        "--batch_size",
        type=at_least(0),
        default=0,
        help="pictures at a time; default: 32 a device",
    )
    add("--threads", type=at_least(1), default=16, help="number of decoding threads per process")
    add(
        "--max_broken",
        type=at_least(0),
        default=0,
        help="number of unreadable pictures that each process may leave out",
    )
    processes.add_flags(result)
    return result


def _add_views(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--views", type=at_least(1), default=1, help="views of each picture; default: 1")
    add("--seed", type=at_least(0), default=0, help="seed of crops and flips; default: 0")
    add(
        "--data_size",
        type=at_least(0),
        default=0,
        help="data.image_size; default: the teacher's",
    )
    add("--min_area", type=_share, default=0.08, help="data.min_area; default: 0.08")
    add("--interpolation", choices=get_args(Interpolation), default="bilinear")
    add("--crop", choices=get_args(Crop), default="retried", help="data.crop")
    add("--no_flip", action="store_true", help="for data.flip=False")
    add("--held_out", action="store_true", help="for teacher.eval_targets, of data.eval_split")
    add("--eval_resize", type=_factor, default=EVAL_RATIO, help="data.eval_resize; with --held_out")
    add("--no_eval_crop", action="store_true", help="for data.eval_crop=False; with --held_out")
    add("--exif", action="store_true", help="for data.exif=True")
    add("--skip_official", action="store_true", help="for data.skip_official=True")


def _add_storage(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--quantization",
        choices=tuple(codecs.KINDS),
        default="bfloat16",
        help="how maps are stored; default: bfloat16",
    )
    add(
        "--components",
        type=at_least(1),
        default=COMPONENTS,
        help=f"principal directions that pca_int8 keeps; default: {COMPONENTS}",
    )
    add("--statistics", default="", help="file of python -m fd_jax.target_stats, for pca_int8")
    add(
        "--shard_size",
        type=at_least(1),
        default=SHARD_SIZE,
        help=f"pictures in a file; default: {SHARD_SIZE}",
    )


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value}: expected a share above 0 and up to 1")
    return value


def _factor(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 4:
        raise argparse.ArgumentTypeError(f"{value}: expected a factor from 1 to 4")
    return value
