"""The data of a run: its datasets, transforms and batches, set up from `config.data`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import numpy as np

from fd_jax.data import datasets, elements, pipeline, transforms
from fd_jax.data.class_names import Classes, Match
from fd_jax.data.elements import Elements
from fd_jax.data.resolutions import Resolutions
from fd_jax.data.splits import Splits
from fd_jax.data.stored import drawing, replay
from fd_jax.errors import DataError

HostBatch = pipeline.HostBatch


class Feed(Splits[datasets.Dataset]):
    """Training and held-out data of one run.

    Args:
      name: TFDS name or folder:/path.
      split: training split.
      eval_split: held-out split; "" for none.
      data_dir: data folder of TFDS; "" for the default of TFDS.
      image_size: side of the transformed images, in pixels.
      min_area: minimum area of the random crop, as a share of the image.
      interpolation: antialiased resize filter, "bilinear" or "bicubic".
      crop: "retried" or "single", see `transforms.TrainTransform`.
      flip: whether half of the training images are mirrored.
      rand_augment: RandAugment policy in timm's notation; "" for none.
      exif: whether pictures are turned as their EXIF orientation says.
      eval_resize: ratio of the short side of a held-out image to the side of its centre crop.
      eval_crop: whether held-out images are cropped; if False, they are squashed to the square.
      match_classes: "name" or "number", see `class_names.numbering`.
      skip_official: whether to skip the files that the original skips
        (docs/reference.md#skipped-files).
      threads: number of decoding threads per process.
      workers: number of worker processes; 0 to decode in this process.
      max_broken: number of unreadable images that each process may replace before the run stops;
        counted anew after a restart.
      sizes, phases: sides of training images that vary, see `resolutions.Resolutions`.
      targets: folders of stored targets by the name of the teacher; training batches then hold
        the stored views and their maps (docs/offline_targets.md).
      eval_targets: the same for held-out batches.

    Raises:
      DataError: a split or a folder of targets cannot be opened, or both splits would read the
        same folder.
      ConfigError: stored targets are of other pictures or views.
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
        exif: bool = False,  # configs of earlier versions have neither this one nor the next
        match_classes: Match = "name",
        sizes: Sequence[int] = (),
        phases: Sequence[tuple[int, int]] = (),
        targets: Mapping[str, str] | None = None,
        eval_targets: Mapping[str, str] | None = None,
    ):
        if eval_split not in ("", split) and datasets.is_one_folder(name):
            raise DataError(
                f"{name} is the same folder for every split, so data.eval_split={eval_split!r} "
                "would hold nothing out; put {split} where the name of the split belongs in the "
                "path, as in folder:/data/imagenet/{split}, or set data.eval_split=''"
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
        self._resolutions = Resolutions(image_size, tuple(sizes), tuple(phases))
        make_transform = functools.partial(
            transforms.TrainTransform,
            min_area=min_area,
            interpolation=interpolation,
            flip=flip,
            crop=crop,
            rand_augment=rand_augment,
            exif=exif,
        )
        self._train_transforms = {
            size: transforms.LabelledImage(make_transform(size)) for size in self._resolutions.every
        }
        shared = {"image_size": image_size, "exif": exif, "skip_official": skip_official}
        drawn = {"min_area": min_area, "interpolation": interpolation, "crop": crop, "flip": flip}
        self._stores = replay.open_stores(
            targets or {}, self.train_dataset, {"held_out": False, **shared, **drawn}
        )
        self._replays = replay.replays(make_transform(image_size), self._stores)
        centred = {"eval_resize": eval_resize, "eval_crop": eval_crop}
        self._eval_stores = replay.open_stores(
            eval_targets or {}, self.eval_dataset, {"held_out": True, **shared, **centred}
        )
        self._eval_replays = replay.replays(
            drawing.HeldOut(image_size, ratio=eval_resize, crop=eval_crop, exif=exif),
            self._eval_stores,
        )
        largest = self._train_transforms[self._resolutions.every[-1]]
        self.train_transform: pipeline.Transform = self._replays[0] if self._replays else largest
        self.eval_transform = transforms.LabelledImage(
            transforms.EvalTransform(image_size, ratio=eval_resize, crop=eval_crop, exif=exif)
        )
        self._match: Match = match_classes
        self.threads, self.workers, self.max_broken = threads, workers, max_broken

    def sequential(
        self,
        split: str,
        *,
        batch_size: int,
        rows: np.ndarray | None = None,
        limit: int = 0,
        examples: int = 0,
    ) -> Iterator[HostBatch]:
        """Yields every image once, in order, without augmentation; the last batch is padded.

        Args:
          split: "train" or "eval".
          batch_size: number of examples in the global batch.
          rows: rows of each global batch to produce; None for all of them.
          limit: maximum number of batches; 0 for no limit.
          examples: number of images, evenly spread over the split; 0 for all of them.
        """
        dataset: Any = self._dataset(split)
        transform: pipeline.Transform = self.eval_transform
        if split == "eval" and self._eval_replays:
            dataset, transform = drawing.WithIndex(dataset), self._eval_replays[0]
        return pipeline.eval_batches(
            datasets.spread(dataset, examples) if examples else dataset,
            transform,
            batch_size=batch_size,
            rows=rows,
            limit=limit or None,
            threads=self.threads,
            max_broken=self.max_broken,
        )

    @property
    def elements(self) -> Elements:
        """Specification of the arrays in every held-out batch; see `train_elements`."""
        transform = self._eval_replays[0] if self._eval_replays else self.eval_transform
        return elements.of_batch(transform.elements)

    @property
    def train_elements(self) -> dict[int, Elements]:
        """Specification of the arrays in training batches, by the side of their images."""
        if self._replays:
            return {self.image_size: elements.of_batch(self.train_transform.elements)}
        return {
            size: elements.of_batch(transform.elements)
            for size, transform in self._train_transforms.items()
        }

    def contents(self) -> dict[str, dict[str, Any]]:
        """What each split consists of, and each folder of stored targets."""
        named = {f"targets {name}": store for name, store in self._stores.items()}
        named |= {f"eval targets {name}": store for name, store in self._eval_stores.items()}
        stored = {name.rstrip(): store.contents() for name, store in named.items()}
        return {**super().contents(), **stored}

    def _train_source(self) -> Any:
        return drawing.WithIndex(self.train_dataset) if self._stores else self.train_dataset

    def _transform_at(
        self, seed: int, steps_per_epoch: int
    ) -> Callable[[int], pipeline.Transform] | None:
        if self._replays:
            return replay.ByEpoch(self._replays, steps_per_epoch)
        resolutions = dataclasses.replace(self._resolutions, seed=seed)
        return transforms.Scheduled(self._train_transforms, resolutions)

    @property
    def classes(self) -> int:
        """Number of classes.

        Raises:
          DataError: the data has no labels.
        """
        if self.train_dataset.num_classes is None:
            raise DataError(f"{self.train_dataset.name} has no class labels")
        return self.train_dataset.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes; None if they have numbers only, or without labels."""
        return self.train_dataset.class_names

    def number_labels(self, head: Classes | None = None) -> None:
        """Gives the classes of each split the numbers of a head, or of the training split, by name.

        The first label of each split is checked, too.

        Args:
          head: classes of a trained head; None for those of the training split.

        Raises:
          DataError: there are no labels, a split hides them, or a split has a class that is not
            among those of the head or the training split.
        """
        for dataset in filter(None, (self.train_dataset, self.eval_dataset)):
            check_labelled(dataset)
        wanted = head or datasets.classes_of(self.train_dataset)
        self.train_dataset = datasets.Renumbered(self.train_dataset, wanted, match=self._match)
        if self.eval_dataset is not None:
            self.eval_dataset = datasets.Renumbered(self.eval_dataset, wanted, match=self._match)

    def label(self, split: str, index: int) -> int:
        """Label of one image; -1 if it has none."""
        return self._dataset(split)[index].label

    def image(self, split: str, index: int, size: int) -> np.ndarray:
        """Reads one image, resized and centre-cropped to any size. -> uint8 [size, size, 3]"""
        transform = transforms.EvalTransform(size)
        return transform(self._dataset(split)[index].image, np.random.default_rng(0))


def check_labelled(dataset: datasets.Dataset) -> None:
    """Checks that a dataset has classes, and the label of its first readable example.

    Raises:
      DataError: there are no labels, or the split hides them.
    """
    if dataset.num_classes is None:
        raise DataError(
            f"{dataset.name} has no class labels{datasets.why_unlabelled(dataset)}; use a dataset "
            "that has them, or a folder with a sub-folder for each class"
        )
    index, label = _first_label(dataset)
    if label is not None and label < 0:
        raise DataError(
            f"{dataset.name} hides its class labels: the label of "
            f"{dataset.describe(index)} is {label}; use another split"
        )


def _first_label(dataset: datasets.Dataset) -> tuple[int, int | None]:
    """Returns index and label of the first readable example; the label is None if there is none."""
    for index in range(len(dataset)):
        try:
            return index, dataset[index].label
        except (datasets.BrokenImageError, datasets.SkippedError):
            continue
    return 0, None
