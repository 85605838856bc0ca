"""What a run reads: its sources, transforms and batches, from the fields of `config.data`."""

from collections.abc import Callable, Iterator
import functools

import numpy as np

from fd_jax.data import pipeline, sources, transforms
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
        if eval_split not in ("", split) and sources.is_one_folder(name):
            raise DataError(
                f"{name} is one folder for every split, so that data.eval_split={eval_split!r} "
                "would hold nothing out; let its path say where the split's name goes, as in "
                "folder:/data/imagenet/{split}, or set data.eval_split=''"
            )
        open_source = functools.partial(
            sources.open_source,
            name,
            data_dir=data_dir or None,
            skip=sources.OFFICIAL_SKIPPED if skip_official else (),
        )
        self.train_source = open_source(split=split)
        self.eval_source = open_source(split=eval_split) if eval_split else None
        self.image_size = image_size
        self.train_transform = transforms.TrainTransform(
            image_size,
            min_area=min_area,
            interpolation=interpolation,
            flip=flip,
            crop=crop,
            rand_augment=rand_augment,
        )
        self.eval_transform = transforms.EvalTransform(
            image_size, ratio=eval_resize, crop=eval_crop
        )
        self.threads, self.workers, self.max_broken = threads, workers, max_broken

    def steps_per_epoch(self, batch_size: int) -> int:
        """Full batches in an epoch; the rest of the examples waits for another epoch's order."""
        return pipeline.steps_per_epoch(self.train_source, batch_size)

    def train(
        self,
        *,
        batch_size: int,
        seed: int,
        rows: np.ndarray,
        start_step: int,
        place: Callable[[HostBatch], Batch] | None = None,
    ) -> pipeline.TrainLoader:
        """Endless training batches from step `start_step` on; `rows` of each global batch.

        `place` is applied to each in the thread that reads ahead.
        """
        return pipeline.TrainLoader(
            self.train_source,
            self.train_transform,
            batch_size=batch_size,
            seed=seed,
            rows=rows,
            start_step=start_step,
            threads=self.threads,
            workers=self.workers,
            max_broken=self.max_broken,
            place=place,
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
            self._source(which),
            self.eval_transform,
            batch_size=batch_size,
            rows=rows,
            limit=limit or None,
            threads=self.threads,
            max_broken=self.max_broken,
        )

    @property
    def classes(self) -> int:
        """Number of labels.

        Raises:
          DataError: the data has none.
        """
        if self.train_source.num_classes is None:
            raise DataError(f"{self.train_source.name} has no class labels")
        return self.train_source.num_classes

    def check_labels(self) -> None:
        """Reads the first label of each split.

        Raises:
          DataError: there are no labels, a split hides them, or the splits differ in classes.
        """
        numbers = {}
        for source in filter(None, (self.train_source, self.eval_source)):
            if source.num_classes is None:
                raise DataError(f"{source.name} has no class labels")
            index, label = _first_label(source)
            if label is not None and label < 0:
                raise DataError(
                    f"{source.name} hides its class labels: that of {source.describe(index)} is "
                    f"{label}; use another split"
                )
            numbers[source.name] = source.num_classes
        if len(set(numbers.values())) > 1:
            told = " and ".join(f"{name} has {number}" for name, number in numbers.items())
            raise DataError(f"the same classes are expected in both splits, but {told}")

    def examples(self, which: str) -> int:
        """Number of images in a split, "train" or "eval"."""
        return len(self._source(which))

    def label(self, which: str, index: int) -> int:
        """Label of one image; -1 where there is none."""
        return self._source(which)[index].label

    def picture(self, which: str, index: int, size: int) -> np.ndarray:
        """One image, resized and centre-cropped to any size. -> [size, size, 3] uint8"""
        transform = transforms.EvalTransform(size)
        return transform(self._source(which)[index].image, np.random.default_rng(0))

    def _source(self, which: str) -> sources.Source:
        source = {"train": self.train_source, "eval": self.eval_source}[which]
        if source is None:
            raise DataError("this run has no held-out split; set data.eval_split")
        return source


def _first_label(source: sources.Source) -> tuple[int, int | None]:
    """Position and label of the first example that can be read; the label is None if none can."""
    for index in range(len(source)):
        try:
            return index, source[index].label
        except (sources.BrokenImageError, sources.SkippedError):
            continue
    return 0, None
