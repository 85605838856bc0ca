"""What a run reads: its datasets, transforms and batches, from the fields of `config.data`."""

from collections.abc import Callable, Iterator
import functools

import numpy as np

from fd_jax.data import datasets, elements, pipeline, transforms
from fd_jax.data.elements import Elements
from fd_jax.errors import DataError
from fd_jax.typing import Batch

HostBatch = pipeline.HostBatch


class Feed:
    """Training and held-out data of one run.

    Args:
      name: TFDS name or folder:/path.
      split: for training.
      eval_split: held out; "" for none.
      data_dir: of TFDS; "" for its default.
      image_size: side of what comes out, in pixels.
      min_area: of the random crop, as a share of the picture.
      interpolation: "bilinear" or "bicubic", antialiased.
      crop: "retried" or "single", see `transforms.TrainTransform`.
      flip: whether half of the training images are mirrored.
      rand_augment: policy in timm's notation; "" for none.
      eval_resize: short side of a held-out picture to the side of the centre crop.
      eval_crop: False squashes held-out pictures to the square instead.
      skip_official: leaves out the files that the original skips (docs/reference.md#skipped-files).
      threads: decoding threads per process.
      workers: worker processes; 0 decodes in this one.
      max_broken: unreadable images replaced before the run stops, in each process and start.

    Raises:
      DataError: a split cannot be opened, or the held-out one is the training one by mistake.
    """

    def __init__(
        self,
        *,
        name: str,
        split: str,
        eval_split: str,
        data_dir: str,
        image_size: int,
        min_area: float,
        interpolation: transforms.Interpolation,
        crop: transforms.Crop,
        flip: bool,
        rand_augment: str,
        eval_resize: float,
        eval_crop: bool,
        skip_official: bool,
        threads: int,
        workers: int,
        max_broken: int,
    ):
        if eval_split not in ("", split) and datasets.is_one_folder(name):
            raise DataError(
                f"{name} is one folder for every split, so that data.eval_split={eval_split!r} "
                "would hold nothing out; let its path say where the split's name goes, as in "
                "folder:/data/imagenet/{split}, or set data.eval_split=''"
            )
        open_dataset = functools.partial(
            datasets.open_dataset,
            name,
            data_dir=data_dir or None,
            skip=datasets.OFFICIAL_SKIPPED if skip_official else (),
        )
        self.train_dataset = open_dataset(split=split)
        self.eval_dataset = open_dataset(split=eval_split) if eval_split else None
        self.image_size = image_size
        self.train_transform = transforms.LabelledImage(
            transforms.TrainTransform(
                image_size,
                min_area=min_area,
                interpolation=interpolation,
                flip=flip,
                crop=crop,
                rand_augment=rand_augment,
            )
        )
        self.eval_transform = transforms.LabelledImage(
            transforms.EvalTransform(image_size, ratio=eval_resize, crop=eval_crop)
        )
        self.threads, self.workers, self.max_broken = threads, workers, max_broken

    def steps_per_epoch(self, batch_size: int) -> int:
        """Full batches in an epoch; the rest of the examples waits for another epoch's order."""
        return pipeline.steps_per_epoch(self.train_dataset, batch_size)

    def train(
        self,
        *,
        batch_size: int,
        seed: int,
        rows: np.ndarray,
        start_step: int,
        put_on_devices: Callable[[HostBatch], Batch] | None = None,
    ) -> pipeline.TrainLoader:
        """Endless training batches from step `start_step` on; `rows` of each global batch.

        `put_on_devices` is applied to each in the thread that reads ahead.
        """
        return pipeline.TrainLoader(
            self.train_dataset,
            self.train_transform,
            batch_size=batch_size,
            seed=seed,
            rows=rows,
            start_step=start_step,
            threads=self.threads,
            workers=self.workers,
            max_broken=self.max_broken,
            put_on_devices=put_on_devices,
        )

    def sequential(
        self, which: str, *, batch_size: int, rows: np.ndarray | None = None, limit: int = 0
    ) -> Iterator[HostBatch]:
        """Every image once, in order, without augmentation, the last batch padded.

        Args:
          which: "train" or "eval".
          batch_size: of the global batch.
          rows: of each global batch; None for all.
          limit: number of batches; 0 for all.
        """
        return pipeline.eval_batches(
            self._dataset(which),
            self.eval_transform,
            batch_size=batch_size,
            rows=rows,
            limit=limit or None,
            threads=self.threads,
            max_broken=self.max_broken,
        )

    @property
    def name(self) -> str:
        """Of the training split, as a message names it."""
        return self.train_dataset.name

    @property
    def elements(self) -> Elements:
        """What every batch holds, those for training and those of `sequential` alike."""
        return elements.of_batch(self.train_transform.elements)

    @property
    def classes(self) -> int:
        """Number of labels.

        Raises:
          DataError: the data has none.
        """
        if self.train_dataset.num_classes is None:
            raise DataError(f"{self.train_dataset.name} has no class labels")
        return self.train_dataset.num_classes

    def check_labels(self) -> None:
        """Reads the first label of each split.

        Raises:
          DataError: there are no labels, a split hides them, or the splits differ in classes.
        """
        numbers = {}
        for dataset in filter(None, (self.train_dataset, self.eval_dataset)):
            if dataset.num_classes is None:
                raise DataError(f"{dataset.name} has no class labels")
            index, label = _first_label(dataset)
            if label is not None and label < 0:
                raise DataError(
                    f"{dataset.name} hides its class labels: that of {dataset.describe(index)} is "
                    f"{label}; use another split"
                )
            numbers[dataset.name] = dataset.num_classes
        if len(set(numbers.values())) > 1:
            listed = " and ".join(f"{name} has {number}" for name, number in numbers.items())
            raise DataError(f"the same classes are expected in both splits, but {listed}")

    def examples(self, which: str) -> int:
        """Number of images in a split, "train" or "eval"."""
        return len(self._dataset(which))

    def label(self, which: str, index: int) -> int:
        """Label of one image; -1 where there is none."""
        return self._dataset(which)[index].label

    def picture(self, which: str, index: int, size: int) -> np.ndarray:
        """One image, resized and centre-cropped to any size. -> [size, size, 3] uint8"""
        transform = transforms.EvalTransform(size)
        return transform(self._dataset(which)[index].image, np.random.default_rng(0))

    def _dataset(self, which: str) -> datasets.Dataset:
        dataset = {"train": self.train_dataset, "eval": self.eval_dataset}[which]
        if dataset is None:
            raise DataError("this run has no held-out split; set data.eval_split")
        return dataset


def _first_label(dataset: datasets.Dataset) -> tuple[int, int | None]:
    """Position and label of the first example that can be read; the label is None if none can."""
    for index in range(len(dataset)):
        try:
            return index, dataset[index].label
        except (datasets.BrokenImageError, datasets.SkippedError):
            continue
    return 0, None
