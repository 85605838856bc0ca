"""Extracts the features of a dataset or a folder of images.

    python -m fd_jax.features --model=runs/fd/model --input=digits --split=test --output=digits.npz
    python -m fd_jax.features --model=teachers/clip_vit_b16 --input=my/pictures --output=mine.npz

The file holds "cls" [N, D] and "mean" [N, D] (the class token and the mean of the patch tokens,
after the final norm where the network has one), "labels" [N] int32 (-1 where there are none) and
"names" [N], in the order of the data, and "class_names" [K] where the classes have names. All
devices of this process share the work. Reading data needs the packages of the extra "train".
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import sys
import time
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from fd_jax import console, sharding, storage
from fd_jax.console import say
from fd_jax.errors import ConfigError, DataError, UserError
from fd_jax.inference import Model, load_model
from fd_jax.models import sizes
from fd_jax.models.features import FeatureMap

# The features that can be extracted from a feature map, by name.
TOKEN_KINDS: dict[str, Callable[[FeatureMap], jax.Array]] = {
    "cls": lambda features: features.cls_token,  # [B, D]
    "mean": lambda features: jnp.mean(features.patches, axis=1),  # [B, D]
    "full": lambda features: features.full,  # [B, cls + H*W, D], without registers
}

BATCH_PER_DEVICE = 32
REPORT_EVERY = 10.0  # seconds


def extract(
    model: Model,
    dataset: Any,
    *,
    tokens: Sequence[str] = (),
    batch_size: int | None = None,
    threads: int = 16,
    max_broken: int = 0,
    exif: bool = False,
) -> dict[str, np.ndarray]:
    """Runs every image of a dataset through a network, resized and cropped as for evaluation.

    Args:
      model: model from `fd_jax.load_model`.
      dataset: dataset from `fd_jax.data.datasets.open_dataset`.
      tokens: names in TOKEN_KINDS; if empty, "mean" and, if the network has a class token, "cls".
      batch_size: batch size over all devices; None for 32 per device.
      threads: number of threads that decode images.
      max_broken: number of unreadable images that may be left out.
      exif: whether pictures are turned as their EXIF orientation says.

    Returns:
      float32 [N, ...] for each of `tokens`, "labels" int32 [N], "names" str [N], with "full" the
      "grid" (H, W) of the patches, and "class_names" str [K] where the dataset has them. N is the
      number of images that could be read.

    Raises:
      ConfigError: unknown or unavailable tokens, or a batch that the devices cannot divide.
      DataError: more than `max_broken` images are unreadable, or none is readable.
    """
    from fd_jax.data import pipeline, transforms

    image_size = model.spec.arch["image_size"]
    shape = (1, *sizes.sides(image_size), 3)
    layout = jax.eval_shape(model, jax.ShapeDtypeStruct(shape, jnp.float32))
    tokens = _check_tokens(tokens, layout)
    mesh = sharding.make_mesh(devices=jax.local_devices())
    if batch_size is None:
        batch_size = BATCH_PER_DEVICE * mesh.size
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size}; expected 1 or more")
    sharding.check_batch(batch_size, 1, mesh)

    encoder = jax.device_put(model.params["encoder"], sharding.replicated(mesh))
    model = Model(model.spec, {"encoder": encoder})
    keep = jax.jit(lambda features: {kind: TOKEN_KINDS[kind](features) for kind in tokens})
    batches = pipeline.eval_batches(
        dataset,
        transforms.LabelledImage(transforms.EvalTransform(image_size, exif=exif)),
        batch_size=batch_size,
        threads=threads,
        max_broken=max_broken,
    )

    def computed() -> Iterator[tuple[dict[str, np.ndarray], dict[str, jax.Array]]]:
        for batch in batches:
            images = jax.device_put(batch["image"], sharding.batch_sharding(mesh))
            yield batch, keep(model(model.preprocess(images)))

    stored = _collect(computed(), len(dataset))
    index = stored.pop("index")
    if not len(index):
        raise DataError(f"{dataset.name} has no readable image")
    stored["names"] = np.array([dataset.describe(int(i)) for i in index], np.str_)
    if dataset.class_names is not None:
        stored["class_names"] = np.array(dataset.class_names, np.str_)
    if "full" in tokens:
        stored["grid"] = np.array(layout.grid)
    return stored


def _check_tokens(tokens: Sequence[str], layout: FeatureMap) -> Sequence[str]:
    """The tokens, or the default ones if there are none; refuses those that do not exist."""
    if not tokens:
        return ("cls", "mean") if layout.cls else ("mean",)
    if unknown := sorted(set(tokens) - set(TOKEN_KINDS)):
        raise ConfigError(f"tokens {unknown} are unknown; expected some of {sorted(TOKEN_KINDS)}")
    if "cls" in tokens and not layout.cls:
        raise ConfigError("tokens include 'cls', but the network has no class token; use 'mean'")
    return tokens


def _collect(computed: Iterator[tuple[Any, Any]], total: int) -> dict[str, np.ndarray]:
    """Collects the rows of weight 1. It reads results one batch late, to keep the devices busy."""
    stored: dict[str, np.ndarray] = {}
    count, reported = 0, time.monotonic()
    pending = next(computed)
    while pending is not None:
        (batch, features), pending = pending, next(computed, None)
        valid = batch["weight"] > 0
        rows = {**features, "labels": batch["label"], "index": batch["index"]}
        for name, value in rows.items():
            value = np.asarray(value)[valid]
            if name not in stored:
                stored[name] = np.empty((total, *value.shape[1:]), value.dtype)
            stored[name][count : count + len(value)] = value
        count += int(valid.sum())
        if time.monotonic() - reported > REPORT_EVERY:
            reported = time.monotonic()
            say(f"{count} of {total} images")
    return {name: rows[:count] for name, rows in stored.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; a mistake of the user gives one message and exit status 2."""
    parser = console.parser("python -m fd_jax.features", __doc__)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--input", required=True, help="TFDS name, or folder of images")
    parser.add_argument("--output", required=True, help="file to write; its name ends in .npz")
    parser.add_argument(
        "--split", default="train", help="split of the dataset, such as test or train[:10%%]"
    )
    parser.add_argument("--data_dir", help="folder of prepared TFDS data")
    parser.add_argument(
        "--tokens", default="", help="comma-separated list of cls, mean, full; default: cls,mean"
    )
    parser.add_argument(
        "--image_size", help="input size in pixels to resize the network to: 224, or 224x336"
    )
    parser.add_argument(
        "--batch_size", type=int, help="batch size over all devices; default: 32 per device"
    )
    parser.add_argument(
        "--max_broken", type=int, default=0, help="number of unreadable images that may be left out"
    )
    parser.add_argument(
        "--exif", action="store_true", help="turn pictures as their EXIF orientation says"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args(argv)
    try:
        with storage.one_message(args.output):
            _run(args)
    except ModuleNotFoundError as error:
        print(f"error: {error}; install it with pip install 'fd_jax[train]'", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    from fd_jax.data import datasets

    console.open_devices()
    output = epath.Path(args.output)
    temporary = _create_temporary(output, overwrite=args.overwrite)
    try:
        image_size = sizes.parse(args.image_size) if args.image_size else None
        model = load_model(args.model, image_size=image_size)
        name = datasets.name_of(args.input)
        dataset = datasets.open_dataset(name, args.split, data_dir=args.data_dir)
        if doubt := datasets.doubt_about(dataset):
            say(doubt)
        arrays = extract(
            model,
            dataset,
            tokens=tuple(filter(None, args.tokens.split(","))),
            batch_size=args.batch_size,
            max_broken=args.max_broken,
            exif=args.exif,
        )
        _save(arrays, temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in arrays.items())
    say(f"{dataset.name} through {args.model} ({model.spec.source}): {shapes} in {output}")


def _create_temporary(output: epath.Path, *, overwrite: bool) -> epath.Path:
    """Creates the temporary output file before any work, so that a wrong path fails early."""
    if output.suffix != ".npz":
        raise ConfigError(f"--output={output}: expected a file name that ends in .npz")
    if output.exists() and not (overwrite and output.is_file()):
        raise ConfigError(
            f"{output} exists; use another name, or add --overwrite to replace a file"
        )
    temporary = output.parent / f".{output.name}.incomplete"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(b"")
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error}") from error
    return temporary


def _save(arrays: dict[str, np.ndarray], temporary: epath.Path, output: epath.Path) -> None:
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        temporary.replace(output)
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
