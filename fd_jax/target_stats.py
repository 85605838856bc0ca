"""Measures a teacher's tokens, for targets whose normalisation is fitted to them.

    python -m fd_jax.target_stats --teacher=teachers/clip_vit_b16 --data=imagenet2012 \
        --output=teachers/clip_vit_b16_stats.npz
    python -m fd_jax.target_stats --teacher=teachers/dinov2 --image_size=196 --data=my/pictures \
        --output=dinov2_stats.npz

The file holds mean, principal directions and variances of class tokens, of patches and of mean
patches, for target.statistics of a run with target.normalize=phi_s, pca, zca or hadamard
(docs/several_teachers.md). It is written at the end, completely or not at all. All devices of all
processes share the work.
"""

import argparse
from collections.abc import Iterator, Sequence
import sys
import time
from typing import Any

from etils import epath
import jax
import numpy as np

from fd_jax import console, sharding
from fd_jax.cli import processes, teacher_flags
from fd_jax.console import at_least, say
from fd_jax.errors import ConfigError, DataError
from fd_jax.models.features import FeatureMap
from fd_jax.normalization import statistics
from fd_jax.normalization.spectrum import Moments, Spectrum, Sums, sums_about
from fd_jax.tasks.teacher import Teacher
from fd_jax.typing import Batch, PyTree

IMAGES = 10_000  # ten class tokens for each channel of a ViT-L
BATCH_PER_DEVICE = 32
REPORT_EVERY = 10.0  # seconds


def measure(
    teacher: Teacher,
    dataset: Any,
    *,
    after_norm: bool,
    image_size: int,
    batch_size: int,
    threads: int = 16,
    max_broken: int = 0,
    exif: bool = False,
) -> dict[str, Spectrum]:
    """The distribution of a teacher's tokens over the pictures of a dataset.

    Pictures are resized and cropped as for evaluation. All processes call this.

    Args:
      teacher: the teacher.
      dataset: dataset from `fd_jax.data.datasets.open_dataset`.
      after_norm: whether its final norm is applied.
      image_size: side of the pictures in pixels, which it resizes to its own input size.
      batch_size: batch size over all devices.
      threads: number of decoding threads in each process.
      max_broken: number of unreadable pictures that each process may leave out.
      exif: whether pictures are turned as their EXIF orientation says.

    Returns:
      Spectra of "patch" and "gap" tokens, and of "cls" tokens if it has a class token.

    Raises:
      ConfigError: the devices cannot divide the batch.
      DataError: more than `max_broken` pictures are unreadable, or none is readable.
    """
    from fd_jax.data import pipeline, transforms
    from fd_jax.data.global_batch import Placement

    mesh = sharding.make_mesh()
    sharding.check_batch(batch_size, 1, mesh)
    placement = Placement(mesh, batch_size)
    weights = place(teacher.load(), mesh)

    def sums(near: PyTree, weights: PyTree, batch: Batch) -> dict[str, Sums]:
        features = teacher.features(weights, batch["image"], final_norm=after_norm, drops=None)
        return {
            group: sums_about(near[group], tokens, batch["weight"])
            for group, tokens in groups(features).items()
        }

    step = jax.jit(sums, out_shardings=sharding.replicated(mesh))

    def batches() -> Iterator[Batch]:
        for batch in pipeline.eval_batches(
            dataset,
            transforms.LabelledImage(transforms.EvalTransform(image_size, exif=exif)),
            batch_size=batch_size,
            rows=placement.rows,
            threads=threads,
            max_broken=max_broken,
        ):
            yield placement.put({name: batch[name] for name in ("image", "weight")})

    names = ("cls", "patch", "gap") if teacher.cls else ("patch", "gap")
    return _sum_up(step, names, np.zeros(teacher.width, np.float32), weights, batches(), batch_size)


def _sum_up(
    step: Any,
    names: Sequence[str],
    origin: np.ndarray,
    weights: PyTree,
    batches: Iterator[Batch],
    batch_size: int,
) -> dict[str, Spectrum]:
    """Adds up the batches about the mean of the first one."""
    moments: dict[str, Moments] = {}
    near: dict[str, np.ndarray] = {}
    reported = time.monotonic()
    for number, batch in enumerate(batches, start=1):
        if not near:
            first = step(dict.fromkeys(names, origin), weights, batch)
            near = {name: np.asarray(first[name].mean) for name in names}
            moments = {name: Moments(near[name]) for name in names}
        for name, found in step(near, weights, batch).items():
            moments[name].add(found)
        if time.monotonic() - reported > REPORT_EVERY:
            reported = time.monotonic()
            say(f"{number * batch_size} pictures")
    if not moments or not all(each.tokens for each in moments.values()):
        raise DataError("there is no readable picture to measure; use another --data or --split")
    return {name: each.spectrum() for name, each in moments.items()}


def groups(features: FeatureMap) -> dict[str, jax.Array]:
    """The tokens of each group, which have statistics of their own. -> [B, T, D] each"""
    found = {"patch": features.patches, "gap": features.patches.mean(axis=1, keepdims=True)}
    return {"cls": features.cls_token[:, None], **found} if features.cls else found


def place(host: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """Puts weights whole onto every device."""
    whole = sharding.replicated(mesh)
    return jax.tree.map(lambda leaf: sharding.place(np.asarray(leaf), whole), host)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; a mistake of the user gives one message and exit status 2."""
    args = _parser().parse_args(argv)
    return processes.run(args, lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from fd_jax.data import datasets

    output = _check_output(epath.Path(args.output), overwrite=args.overwrite)
    teacher = teacher_flags.teacher(args)
    name = datasets.name_of(args.data)
    whole = datasets.open_dataset(name, args.split, data_dir=args.data_dir)
    dataset = datasets.spread(whole, args.images) if args.images else whole
    after_norm = not args.before_norm
    spectra = measure(
        teacher,
        dataset,
        after_norm=after_norm,
        image_size=args.data_size or teacher.image_size,
        batch_size=args.batch_size or BATCH_PER_DEVICE * len(jax.devices()),
        threads=args.threads,
        max_broken=args.max_broken,
        exif=args.exif,
    )
    if jax.process_index() == 0:
        measured = {"name": name, "split": args.split, "pictures": spectra["gap"].tokens}
        origin = teacher.origin(after_norm=after_norm)
        statistics.save(output, origin, spectra, data=measured)
    counts = ", ".join(f"{each.tokens:,} {group}" for group, each in spectra.items())
    say(f"tokens of {args.teacher} ({teacher.spec.source}) on {dataset.name}: {counts}")
    say(f"written to {output}")


def _check_output(output: epath.Path, *, overwrite: bool) -> epath.Path:
    """The output file, whose folder exists; refused before any work if it cannot be written."""
    if output.suffix != ".npz":
        raise ConfigError(f"--output={output}: expected a file name that ends in .npz")
    if output.exists() and not (overwrite and not output.is_dir()):
        raise ConfigError(
            f"{output} exists; use another name, or add --overwrite to replace a file"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


def _parser() -> argparse.ArgumentParser:
    parser = console.parser("python -m fd_jax.target_stats", __doc__)
    add = parser.add_argument
    teacher_flags.add(parser)
    add("--data", required=True, help="TFDS name, or folder of images")
    add("--split", default="train", help="split of the dataset, such as train[:10%%]")
    add("--data_dir", help="folder of prepared TFDS data")
    add("--output", required=True, help="file to write; its name ends in .npz")
    add(
        "--data_size",
        type=at_least(0),
        default=0,
        help="data.image_size of the run, if the teacher resizes its pictures; default: the same",
    )
    add(
        "--images",
        type=at_least(0),
        default=IMAGES,
        help=f"number of pictures, spread evenly over the data; 0 for all; default: {IMAGES}",
    )
    add(
        "--batch_size",
        type=at_least(0),
        default=0,
        help="over all devices; default: 32 per device",
    )
    add("--threads", type=int, default=16, help="number of decoding threads per process")
    add(
        "--max_broken",
        type=at_least(0),
        default=0,
        help="number of unreadable pictures that each process may leave out",
    )
    add("--exif", action="store_true", help="turn pictures as their EXIF orientation says")
    add("--overwrite", action="store_true", help="replace an existing file")
    processes.add_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
