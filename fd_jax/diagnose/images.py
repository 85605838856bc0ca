"""The images of a command: those of --data, and the one picture that some figures show."""

import hashlib
from typing import Any

from etils import epath
import numpy as np

from fd_jax.data import datasets, transforms
from fd_jax.data.datasets import Dataset
from fd_jax.errors import ConfigError, DataError


def open_data(text: str, *, data_dir: str | None, num_images: int | None) -> Dataset:
    """The images of --data; those of --num_images are spread evenly over it.

    Args:
      text: TFDS name and split, or folder of images.
      data_dir: folder of prepared TFDS data; None for the default of TFDS.
      num_images: number of images; None for all.

    Raises:
      ConfigError: the split is missing, or there are fewer images than asked for.
      DataError: there is no such dataset.
    """
    name, split = datasets.name_of(text), ""
    if not name.startswith(datasets.FOLDER_PREFIX):
        name, _, split = text.partition(":")
        if not split:
            raise ConfigError(
                f"--data={text}: there is no such folder, and a TFDS dataset needs the name of "
                f"its split, as in --data={text}:test"
            )
    dataset = datasets.open_dataset(name, split, data_dir=data_dir)
    if num_images is None:
        return dataset
    if not 0 < num_images <= len(dataset):
        raise ConfigError(
            f"--num_images={num_images}, but {dataset.name} has {len(dataset)} images; expected a "
            "number from 1 to that"
        )
    return datasets.spread(dataset, num_images)


def fingerprint(dataset: Dataset) -> str:
    """Tells two datasets of the same name apart, by the paths of their files if they have some."""
    hashed = hashlib.blake2b(f"{dataset.name} {len(dataset)}".encode(), digest_size=16)
    if dataset.name.startswith(datasets.FOLDER_PREFIX):
        for index in range(len(dataset)):
            hashed.update(str(epath.Path(dataset.describe(index)).resolve()).encode())
    return hashed.hexdigest()


def open_picture(
    path: str | None, dataset: Dataset, transform: transforms.EvalTransform
) -> dict[str, Any]:
    """Name and pixels [H][W][3] of the picture that some figures show.

    Args:
      path: image file; None for the first readable image of the dataset.
      dataset: images of the command.
      transform: makes the input of the networks from an image.

    Raises:
      ConfigError: the file cannot be read or is no image.
      DataError: the dataset has no readable image.
    """
    if path is None:
        name, pixels = _first_readable(dataset, transform)
    else:
        name, pixels = epath.Path(path).name, _read(epath.Path(path), transform)
    return {"name": name, "pixels": pixels.tolist()}


def _first_readable(
    dataset: Dataset, transform: transforms.EvalTransform
) -> tuple[str, np.ndarray]:
    for index in range(len(dataset)):
        try:
            pixels = transform(dataset[index].image)
        except (datasets.BrokenImageError, datasets.SkippedError):
            continue
        # Cameras use the same names in every folder, and folders are classes.
        return "/".join(epath.Path(dataset.describe(index)).parts[-2:]), pixels
    raise DataError(f"{dataset.name} has no readable image")


def _read(path: epath.Path, transform: transforms.EvalTransform) -> np.ndarray:
    try:
        return transform(path.read_bytes())
    except (OSError, datasets.BrokenImageError) as error:
        raise ConfigError(f"--picture={path} cannot be read: {error}") from error
