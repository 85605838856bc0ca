"""What the command does: it checks, measures in one pass over the images, and writes."""

import argparse
from collections.abc import Sequence
import hashlib
import importlib
import itertools
import json
from typing import Any

from etils import epath
import jax
import numpy as np

from fd_jax import __about__, sharding
from fd_jax.console import say
from fd_jax.data import datasets, transforms
from fd_jax.data.datasets import Dataset
from fd_jax.diagnose import catalogue, images, output, picture, record, stream, subjects
from fd_jax.diagnose.attention import AttentionStatistics
from fd_jax.diagnose.landscape import Landscape, symmetric_steps
from fd_jax.diagnose.measurement import Figures, Measurement
from fd_jax.diagnose.representations import Comparison, Rank
from fd_jax.errors import ConfigError, check_positive
from fd_jax.inference import Model
from fd_jax.models import sizes
from fd_jax.precision import compute_dtype

BATCH_PER_DEVICE = 32
TRANSFORM = "evaluation: short side resized to 256/224 of the input, centre crop, no augmentation"


def run(args: argparse.Namespace, command: Sequence[str]) -> None:
    """Runs the command with parsed arguments; they are described in `cli`.

    Raises:
      UserError: an argument is wrong, or data or models cannot be read.
    """
    importlib.import_module("matplotlib")  # if it is missing, this is known before the pass
    figures = catalogue.parse(args.figures)
    folders = subjects.folders(args.model)
    catalogue.check_number(figures, len(folders))
    _check_numbers(args, figures)
    mesh = sharding.make_mesh()
    batch_size = BATCH_PER_DEVICE * mesh.size if args.batch_size is None else args.batch_size
    sharding.check_batch(batch_size, 1, mesh)
    folder = epath.Path(args.output)
    output.check(folder, overwrite=args.overwrite)

    dataset = images.open_data(args.data, data_dir=args.data_dir, num_images=args.num_images)
    if doubt := datasets.doubt_about(dataset):
        say(doubt)
    image_size = sizes.parse(args.image_size) if args.image_size else None
    models = subjects.load(folders, image_size=image_size)
    catalogue.check_networks(figures, models)
    transform = transforms.EvalTransform(next(iter(models.values())).spec.arch["image_size"])
    shown = None
    if catalogue.of_kind(figures, "picture"):
        shown = images.open_picture(args.picture, dataset, transform)
    settings = _settings(args, figures)
    identity = {
        "fd_jax": __about__.__version__,
        **{f"model {name}": subjects.digest(model) for name, model in models.items()},
        "data": dataset.name,
        "data_dir": args.data_dir,
        "images": len(dataset),
        "files": images.fingerprint(dataset),
        "image_size": transform.image_size,
        "batch_size": batch_size,
        "figures": ",".join(figures),
        "picture": _digest(shown["pixels"]) if shown else None,
        **settings,
    }
    if output.is_complete(folder, identity, overwrite=args.overwrite):
        say(f"{folder / record.FILE} holds the results of this command; drawing them again")
        result = record.read(folder)
    else:
        measurements = _measurements(args, figures, folders, models, dataset)
        of_picture = _of_picture(figures, models, shown)
        output.claim(folder, identity)
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


def _check_numbers(args: argparse.Namespace, figures: Sequence[str]) -> None:
    check_positive("--threads", args.threads)
    if args.max_broken < 0:
        raise ConfigError(f"--max_broken={args.max_broken}: expected 0 or more images")
    if not args.save_every >= 0:
        raise ConfigError(f"--save_every={args.save_every}: expected 0 or more seconds")
    if "landscape" in figures:
        check_positive("--directions", args.directions)
        symmetric_steps(args.points, args.radius)


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _measurements(
    args: argparse.Namespace,
    figures: Sequence[str],
    folders: dict[str, str],
    models: dict[str, Model],
    dataset: Dataset,
) -> list[Measurement]:
    attention = catalogue.of_kind(figures, "attention")
    pairs = catalogue.of_kind(figures, "pair")
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
                    dtype=compute_dtype(args.dtype),
                )
            )
        if "rank" in figures:
            made.append(Rank(name, model))
        if "landscape" in figures:
            made.append(_landscape(args, name, folders[name], model, dataset))
    if pairs:
        for a, b in itertools.combinations(models, 2):
            comparison = Comparison((a, b), models[a], models[b], pairs)
            made.append(comparison)
            if "cosine" in pairs and not comparison.has_cosine:
                say(f"{a} and {b} have no cosine: their widths or grids differ")
    return made


def _landscape(
    args: argparse.Namespace, name: str, folder: str, model: Model, dataset: Dataset
) -> Landscape:
    landscape = Landscape(
        name,
        folder,
        image_size=model.spec.arch["image_size"],
        seed=args.seed,
        directions=args.directions,
        points=args.points,
        radius=args.radius,
        tables=args.tables,
        dtype=compute_dtype(args.dtype),
    )
    landscape.check_dataset(dataset, match=args.match_classes)
    return landscape


def _settings(args: argparse.Namespace, figures: Sequence[str]) -> dict[str, Any]:
    """The settings on which the asked figures depend."""
    settings: dict[str, Any] = {"transform": TRANSFORM}
    if catalogue.of_kind(figures, "attention") or "landscape" in figures:
        settings["dtype"] = args.dtype
    if "distance" in figures:
        settings["normalize"] = args.normalize
    if "similarity" in figures:
        settings["compare"] = args.compare
    if "landscape" in figures:
        names = ("tables", "points", "directions", "radius", "seed", "match_classes")
        settings |= {name: getattr(args, name) for name in names}
    return settings


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
