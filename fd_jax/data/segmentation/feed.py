"""The data of a run of semantic segmentation, set up from `config.data`."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
import functools
from typing import TypeVar

from absl import logging

from fd_jax.data.base import Picture
from fd_jax.data.datasets import BrokenImageError
from fd_jax.data.segmentation import sources, transforms
from fd_jax.data.segmentation.labels import Labels
from fd_jax.data.splits import Splits
from fd_jax.errors import DataError

_Read = TypeVar("_Read")
_AHEAD = 8  # held-out pictures that are decoded ahead, at most; they have their original size


class SegmentationFeed(Splits[sources.Scenes]):
    """Training and held-out pictures of one run, with a class for each pixel.

    Args:
      name: "ade20k", "folders" (see `sources`), or the TFDS name of a dataset with the features
        `image` and `mask`.
      root: folder of ADEChallengeData2016 or of "folders"; "" for TFDS.
      images: pattern of the pictures of "folders" below `root`.
      labels: pattern of the masks of "folders" below `root`.
      class_names: file of "folders" below `root` with the names of the classes, one per line and
        from the stored 0 on; "" for none.
      ignore: stored label of pixels that are neither trained on nor counted.
      reduce_zero_label: whether a stored 0 is ignored as well, and a stored k is class k - 1.
      split: training split.
      eval_split: held-out split; "" for none.
      data_dir: data folder of TFDS; "" for the default of TFDS.
      image_size: side of the training crop, in pixels.
      scale: long and short side in pixels within which pictures are resized.
      ratio: limits of the factor on `scale` in training.
      max_share: largest share of a crop that one class may have; 1 for any.
      flip: whether half of the training pictures are mirrored.
      distort: whether the colours of training pictures are distorted.
      threads: number of decoding threads per process.
      workers: number of worker processes; 0 to decode in this process.
      max_broken: number of unreadable pictures that each process may replace before the run stops,
        or leave out of one pass over the held-out ones.
      fill: grey levels outside the picture, RGB; see `transforms.TrainTransform`.
      classes: number of classes.

    Raises:
      ConfigError: a setting is out of its range.
      DataError: a split cannot be opened, both splits would read the same pictures, the data has
        another number of classes, or the first mask of a split does not fit the settings.
    """

    def __init__(
        self,
        *,
        name: str,
        root: str,
        images: str,
        labels: str,
        class_names: str = "",
        ignore: int,
        reduce_zero_label: bool,
        split: str,
        eval_split: str,
        data_dir: str,
        image_size: int,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        max_share: float,
        flip: bool,
        distort: bool,
        threads: int,
        workers: int,
        max_broken: int,
        fill: tuple[int, int, int],
        classes: int,
    ):
        if eval_split not in ("", split) and sources.is_one_split(name, images):
            raise DataError(
                f"data.images={images!r} is the same for every split, so data.eval_split="
                f"{eval_split!r} would hold nothing out; put {{split}} where the name of the split "
                "belongs in data.images and data.labels, or set data.eval_split=''"
            )
        self.labels = Labels(classes, ignore, reduce_zero_label)
        self.train_transform = transforms.TrainTransform(
            image_size,
            labels=self.labels,
            fill=fill,
            scale=scale,
            ratio=ratio,
            max_share=max_share,
            flip=flip,
            distort=distort,
        )
        open_scenes = functools.partial(
            sources.open_scenes,
            name,
            root=root,
            images=images,
            labels=labels,
            class_names=class_names,
            data_dir=data_dir or None,
        )
        self.train_dataset = open_scenes(split=split)
        self.eval_dataset = open_scenes(split=eval_split) if eval_split else None
        self.threads, self.workers, self.max_broken = threads, workers, max_broken
        self._check()
        _check_names(self)

    def pictures(self, split: str, indices: Sequence[int] | None = None) -> Iterator[Picture]:
        """Yields pictures at their original size, in order, decoded ahead by a few threads.

        A broken picture is left out, and is named in the log.

        Args:
          split: "train" or "eval".
          indices: positions in the split; None for all of it.

        Raises:
          DataError: a mask is not one of its picture or has a label that is not a class, or more
            than `max_broken` pictures are broken.
        """
        dataset = self._dataset(split)
        read = functools.partial(_read, dataset, self.labels)
        positions = range(len(dataset)) if indices is None else indices
        broken: list[str] = []
        for picture in _ahead(read, positions, min(self.threads, _AHEAD)):
            if isinstance(picture, Picture):
                yield picture
                continue
            logging.warning("evaluation leaves out %s", picture)
            broken.append(picture)
            if len(broken) > self.max_broken:
                raise DataError(
                    f"{len(broken)} broken pictures in {dataset.name}, more than max_broken="
                    f"{self.max_broken}; repair or remove them, or raise that limit:\n  "
                    + "\n  ".join(broken)
                )

    @property
    def classes(self) -> int | None:
        """Number of classes that the data says it has; None if it does not say."""
        return self._classes_of(self.train_dataset)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes; None if the data does not say."""
        names = self.train_dataset.class_names
        return names and names[int(self.labels.reduce_zero) :]

    def _classes_of(self, dataset: sources.Scenes) -> int | None:
        return dataset.stored and dataset.stored - self.labels.reduce_zero

    def _check(self) -> None:
        """Checks the number of classes and the first readable picture of each split."""
        for dataset in filter(None, (self.train_dataset, self.eval_dataset)):
            found = self._classes_of(dataset)
            if found not in (None, self.labels.classes):
                raise DataError(
                    f"{dataset.name} has {found} classes with data.reduce_zero_label="
                    f"{self.labels.reduce_zero}, but segment.classes={self.labels.classes}"
                )
            for index in range(min(len(dataset), self.max_broken + 1)):
                if isinstance(_read(dataset, self.labels, index), Picture):
                    break


def _check_names(data: "SegmentationFeed") -> None:
    names, labels = data.class_names, data.labels
    if names is not None and len(names) != labels.classes:
        raise DataError(
            f"{data.name} has names for {len(names)} classes with data.reduce_zero_label="
            f"{labels.reduce_zero}, but segment.classes={labels.classes}; data.class_names has a "
            "line for each stored value from 0 on"
        )


def _read(dataset: sources.Scenes, labels: Labels, index: int) -> Picture | str:
    """Reads and decodes one picture, or says why that is not possible."""
    try:
        scene = dataset[index]
        return Picture(int(index), scene.name, *labels.read(scene))
    except BrokenImageError as error:
        return f"{dataset.describe(index)}: {error}"


def _ahead(read: Callable[[int], _Read], positions: Sequence[int], threads: int) -> Iterator[_Read]:
    """Applies a function in threads, in order, and at most `threads` positions ahead."""
    pool, waiting = ThreadPoolExecutor(threads), deque[Future[_Read]]()
    try:
        for position in positions:
            waiting.append(pool.submit(read, position))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
