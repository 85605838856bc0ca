"""Command line of `python -m fd_jax.diagnose`: measures models side by side and draws figures.

    python -m fd_jax.diagnose --model=teachers/clip_vit_b16 --model=student=runs/fd/model \
        --data=imagenet2012:validation --output=figures/clip
    python -m fd_jax.diagnose --model=runs/ft/model --data=folder/of/images --output=figures/ft \
        --figures=landscape --num_images=1000

The output folder receives every figure as PNG and SVG, all numbers as figures.json, and a
report.html that shows everything without the network. A command that was killed goes on where it
was when it is given again. What the figures mean is in docs/figures.md.
"""

import argparse
from collections.abc import Sequence
import itertools
import json
import os
import sys
from typing import Any

from etils import epath
import jax
import numpy as np

from fd_jax import sharding
from fd_jax.cli import processes
from fd_jax.console import say
from fd_jax.data import datasets, transforms
from fd_jax.data.datasets import Dataset, Subset
from fd_jax.diagnose import catalogue, output, picture, record, stream, subjects
from fd_jax.diagnose.attention import AttentionStatistics
from fd_jax.diagnose.landscape import Landscape
from fd_jax.diagnose.measurement import Figures, Measurement
from fd_jax.diagnose.representations import Comparison, Rank
from fd_jax.errors import ConfigError, UserError
from fd_jax.model_folder import Model
from fd_jax.models import sizes
from fd_jax.precision import compute_dtype

BATCH_PER_DEVICE = 32
TRANSFORM = "evaluation: short side resized to 256/224 of the input, centre crop, no augmentation"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; a mistake of the user gives one message and exit status 2."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # hides TensorFlow's start-up messages
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    try:
        _run(args, ["python", "-m", "fd_jax.diagnose", *argv])
    except ModuleNotFoundError as error:
        print(f"error: {error}; install it with pip install 'fd_jax[train]'", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fd_jax.diagnose",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
        help=f"comma-separated list of {', '.join(catalogue.FIGURES)}; "
        f"default: {','.join(catalogue.DEFAULT)}",
    )
    add(
        "--num_images", type=int, help="number of images, evenly spread over the data; default: all"
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
    add("--points", type=int, default=51, help="landscape: number of points along a direction")
    add("--directions", type=int, default=5, help="landscape: number of random directions")
    add("--radius", type=float, default=1.0, help="landscape: points go from -radius to radius")
    add("--seed", type=int, default=0, help="landscape: seed of the directions")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of the networks")
    add("--batch_size", type=int, help="batch size over all devices; default: 32 per device")
    add(
        "--save_every",
        type=float,
        default=30.0,
        help="seconds between two versions of the partial sums, from which a killed pass goes on",
    )
    add("--threads", type=int, default=16, help="number of decoding threads per process")
    add(
        "--max_broken", type=int, default=0, help="number of unreadable images that may be left out"
    )
    add("--overwrite", action="store_true", help="replace the results of another command")
    add(
        "--distributed",
        action="store_true",
        help="start jax.distributed, which detects Cloud TPU pods and Slurm",
    )
    add("--coordinator", help="host:port of process 0, if the launcher does not provide it")
    add("--num_processes", type=int, help="number of processes")
    add("--process_id", type=int, help="index of this process, from 0")
    return parser  # fmt: skip


def _run(args: argparse.Namespace, command: Sequence[str]) -> None:
    processes.start(
        distributed=args.distributed,
        coordinator=args.coordinator,
        num_processes=args.num_processes,
        process_id=args.process_id,
    )
    figures = catalogue.parse(args.figures)
    folders = subjects.folders(args.model)
    folder = epath.Path(args.output)
    output.check(folder, overwrite=args.overwrite)
    dataset = _open_data(args)
    image_size = sizes.parse(args.image_size) if args.image_size else None
    models = subjects.load(folders, image_size=image_size)
    catalogue.check(figures, models)
    measurements = _measurements(args, figures, folders, models)
    for measurement in measurements:
        if isinstance(measurement, Landscape):
            measurement.check_dataset(dataset)
    transform = transforms.EvalTransform(next(iter(models.values())).spec.arch["image_size"])
    shown = _picture(args, figures, dataset, transform)
    of_picture = _of_picture(figures, models, shown)

    mesh = sharding.make_mesh()
    batch_size = BATCH_PER_DEVICE * mesh.size if args.batch_size is None else args.batch_size
    sharding.check_batch(batch_size, 1, mesh)
    settings = _settings(args, figures)
    identity = {
        **{f"model {name}": subjects.digest(model.params) for name, model in models.items()},
        "data": dataset.name,
        "images": len(dataset),
        "image_size": transform.image_size,
        "batch_size": batch_size,
        "figures": ",".join(figures),
        **settings,
    }
    if shown:
        identity["picture"] = shown["name"]
    if output.claim(folder, identity, overwrite=args.overwrite):
        say(f"{folder / record.FILE} holds the results of this command; drawing them again")
        result = record.read(folder)
    else:
        totals = stream.accumulate(
            measurements,
            dataset,
            transform=transform,
            mesh=mesh,
            batch_size=batch_size,
            partial=folder / output.PARTIAL,
            identity=json.dumps(identity, sort_keys=True),
            save_every=args.save_every,
            threads=args.threads,
            max_broken=args.max_broken,
        )
        result = record.make(
            command=command,
            data=dataset.name,
            images=totals.images,
            image_size=transform.image_size,
            settings=settings,
            models=_of_models(models, of_picture, measurements, totals),
            pairs=_of_pairs(measurements, totals),
            picture=shown,
        )
    if jax.process_index() == 0:
        output.write(result, folder)


def _open_data(args: argparse.Namespace) -> Dataset:
    """The images of --data; those of --num_images are evenly spread over it.

    Raises:
      ConfigError: the split is missing, or there are fewer images than asked for.
    """
    name, split = datasets.name_of(args.data), ""
    if not name.startswith(datasets.FOLDER_PREFIX):
        name, _, split = args.data.partition(":")
        if not split:
            raise ConfigError(
                f"--data={args.data}: there is no such folder, and a TFDS dataset needs the name "
                f"of its split, as in --data={args.data}:test"
            )
    dataset = datasets.open_dataset(name, split, data_dir=args.data_dir)
    if args.num_images is None:
        return dataset
    if not 0 < args.num_images <= len(dataset):
        raise ConfigError(
            f"--num_images={args.num_images}, but {dataset.name} has {len(dataset)} images; "
            "expected a number from 1 to that"
        )
    # A folder is sorted by class, so that its first images would all be of one class.
    chosen = np.arange(args.num_images) * len(dataset) // args.num_images
    return Subset(dataset, chosen.tolist())


def _measurements(
    args: argparse.Namespace,
    figures: Sequence[str],
    folders: dict[str, str],
    models: dict[str, Model],
) -> list[Measurement]:
    attention = catalogue.of_kind(figures, "attention")
    pairs = catalogue.of_kind(figures, "pair")
    dtype = compute_dtype(args.dtype)
    made: list[Measurement] = []
    for name, model in models.items():
        if attention:
            made.append(
                AttentionStatistics(
                    name,
                    model,
                    attention,
                    normalize=args.normalize,
                    compare=args.compare,
                    dtype=dtype,
                )
            )
        if "rank" in figures:
            made.append(Rank(name, model))
        if "landscape" in figures:
            made.append(
                Landscape(
                    name,
                    folders[name],
                    image_size=model.spec.arch["image_size"],
                    seed=args.seed,
                    directions=args.directions,
                    points=args.points,
                    radius=args.radius,
                    tables=args.tables,
                    dtype=dtype,
                )
            )
    if pairs:
        for a, b in itertools.combinations(models, 2):
            made.append(Comparison((a, b), models[a], models[b], pairs))
    return made


def _settings(args: argparse.Namespace, figures: Sequence[str]) -> dict[str, Any]:
    """The settings on which the asked figures depend."""
    settings: dict[str, Any] = {"transform": TRANSFORM, "dtype": args.dtype}
    if "distance" in figures:
        settings["normalize"] = args.normalize
    if "similarity" in figures:
        settings["compare"] = args.compare
    if "landscape" in figures:
        names = ("tables", "points", "directions", "radius", "seed")
        settings |= {name: getattr(args, name) for name in names}
    return settings


def _picture(
    args: argparse.Namespace,
    figures: Sequence[str],
    dataset: Dataset,
    transform: transforms.EvalTransform,
) -> dict[str, Any] | None:
    """Name and pixels of the picture that some figures show; None if no figure does."""
    if not catalogue.of_kind(figures, "picture"):
        return None
    if args.picture is None:
        name, image = dataset.describe(0), dataset[0].image
    else:
        name, image = args.picture, _read_file(epath.Path(args.picture))
    try:
        pixels = transform(image)
    except datasets.BrokenImageError as error:
        raise ConfigError(f"the picture {name} cannot be read: {error}") from error
    return {"name": epath.Path(name).name, "pixels": pixels.tolist()}


def _read_file(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--picture={path} cannot be read: {error}") from error


def _of_picture(
    figures: Sequence[str], models: dict[str, Model], shown: dict[str, Any] | None
) -> dict[str, Figures]:
    """The figures of one picture for each model, computed before the pass over all images.

    Raises:
      ConfigError: a figure is not defined for a network.
    """
    if shown is None:
        return {name: {} for name in models}
    pixels = np.asarray(shown["pixels"], np.uint8)
    wanted = catalogue.of_kind(figures, "picture")
    results = {}
    for name, model in models.items():
        results[name] = picture.figures(model, pixels, wanted)
        results[name]["picture"]["name"] = shown["name"]
    return results


def _of_models(
    models: dict[str, Model],
    of_picture: dict[str, Figures],
    measurements: Sequence[Measurement],
    totals: stream.Totals,
) -> dict[str, Figures]:
    results: dict[str, Figures] = {
        name: {"about": subjects.about(model), **of_picture[name]} for name, model in models.items()
    }
    for measurement, sums in zip(measurements, totals.sums, strict=True):
        if isinstance(measurement.subject, str):
            results[measurement.subject] |= measurement.figures(sums, totals.images)
    return results


def _of_pairs(measurements: Sequence[Measurement], totals: stream.Totals) -> list[Figures]:
    return [
        {"models": list(measurement.subject), **measurement.figures(sums, totals.images)}
        for measurement, sums in zip(measurements, totals.sums, strict=True)
        if not isinstance(measurement.subject, str)
    ]
