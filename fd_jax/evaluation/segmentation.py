"""Semantic segmentation of a held-out set: predictions for whole pictures, and their mean IoU."""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np

from fd_jax import sharding
from fd_jax.data.base import IGNORED, Picture
from fd_jax.data.global_batch import Placement
from fd_jax.errors import ConfigError, DataError, check_choice
from fd_jax.evaluation.evaluators import Averaged, Compiled, Evaluator, Weights
from fd_jax.models.segmenter import sliding
from fd_jax.models.spec import ModelSpec
from fd_jax.typing import Config


def confusion(mask: np.ndarray, predicted: np.ndarray, *, classes: int) -> np.ndarray:
    """Counts pixels by label and prediction.

    Args:
      mask: labels below `classes`, and IGNORED where there is none; any shape.
      predicted: predicted classes in the same shape.
      classes: number of classes K.

    Returns:
      int64 [K, K], a row for each label.
    """
    counted = mask != IGNORED
    pairs = mask[counted].astype(np.int64) * classes + predicted[counted]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


class Scores(NamedTuple):
    """How well predictions agree with labels.

    Attributes:
      iou: per class, pixels that are in both label and prediction among those in either; NaN for a
        class that is in neither. float64 [K]
      accuracy: per class, share of the label's pixels that are predicted; NaN for a class without
        pixels. float64 [K]
      miou, macc: means over the classes that have a value.
      aacc: share of all labelled pixels.
    """

    iou: np.ndarray
    accuracy: np.ndarray
    miou: float
    macc: float
    aacc: float


def scores(matrix: np.ndarray) -> Scores:
    """The scores of a confusion matrix [K, K], summed over a whole set of pictures.

    Raises:
      DataError: the matrix is empty.
    """
    if not matrix.sum():
        raise DataError("no held-out picture has a labelled pixel; check data.ignore")
    right, labelled, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    with np.errstate(invalid="ignore"):
        iou = right / (labelled + predicted - right)
        accuracy = right / labelled
    aacc = right.sum() / matrix.sum()
    return Scores(iou, accuracy, float(np.nanmean(iou)), float(np.nanmean(accuracy)), float(aacc))


@dataclasses.dataclass(frozen=True)
class Segmented:
    """Mean IoU over the held-out pictures at their own sizes; see `models.segmenter.sliding`.

    With sliding windows, each process takes some of the pictures. Windows of consecutive pictures
    fill global batches of one shape, so that nothing is compiled for the size of a picture.

    Whole pictures are computed as many at a time as the mesh splits a batch into, if they have one
    size. Every process reads all of them, so that all start the same programs, one for each size.
    A picture that one of them cannot read is left out by all.

    Attributes:
      batch_size: number of windows in a global batch.
      classes: number of classes.
      window: side of a window.
      scale: bounds of the long and the short side to which pictures are scaled.
      mode: "slide", or "whole" for one pass over a scaled picture.
      stride: pixels between windows.
      scales: factors on `scale`, whose probabilities are averaged.
      flip: whether mirror images are averaged in as well.
      limit: 0 for all pictures, otherwise the first limit * batch_size of them.
      patch: side of a patch, to a multiple of which whole pictures are filled.
      fill: grey levels of the pixels that are added, RGB.

    Raises:
      ConfigError: another mode, or windows that leave pixels out.
    """

    batch_size: int
    classes: int
    window: int
    scale: tuple[int, int]
    mode: str = "slide"
    stride: int = 341
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    limit: int = 0
    patch: int = 1
    fill: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self):
        check_choice("eval.mode", self.mode, ("slide", "whole"))
        _ = self._views  # refuses windows that leave pixels out

    @classmethod
    def of(cls, config: Config, spec: ModelSpec, *, fill: tuple[int, int, int]) -> "Segmented":
        """The evaluation that a segmentation config describes.

        Args:
          config: the config.
          spec: of the network.
          fill: grey levels of pixels outside of a picture, RGB.

        Raises:
          ConfigError: see `Segmented`; or a network that cannot take whole pictures.
        """
        if config.eval.mode == "whole" and spec.family.startswith("swin"):
            raise ConfigError(
                f"eval.mode='whole' runs the network at the size of every picture, but a network "
                f"of the family {spec.family!r} takes only sizes that its windows of attention "
                "divide; set eval.mode='slide'"
            )
        return cls(
            config.batch_size,
            config.segment.classes,
            window=config.data.image_size,
            scale=tuple(config.data.scale),
            mode=config.eval.mode,
            stride=config.eval.stride,
            scales=tuple(config.eval.scales),
            flip=config.eval.flip,
            limit=config.eval.batches,
            patch=spec.stride,
            fill=fill,
        )

    @property
    def _views(self) -> sliding.Views:
        if self.mode == "whole":
            return self._whole
        return sliding.Sliding(side=self.window, stride=self.stride, **self._common)

    @property
    def _whole(self) -> sliding.Whole:
        return sliding.Whole(patch=self.patch, fill=self.fill, **self._common)

    @property
    def _common(self) -> dict[str, Any]:
        return {"scale": self.scale, "scales": self.scales, "flip": self.flip}

    def __call__(self, compiled: Compiled, weights: Weights, data: Any) -> dict[str, float]:
        """The scores of the whole set.

        Args:
          compiled: `predict`, jitted (params, extra, frozen, {"image": uint8 [B, S, S, 3]}) ->
            float32 [B, h, w, K] split over the batch, and its `mesh`; for whole pictures, it takes
            images of any whole number of patches.
          weights: the weights to evaluate.
          data: `examples("eval")`, the number of pictures, and `pictures("eval", indices)`.

        Returns:
          {"miou", "macc", "aacc"}.
        """
        result = scores(self.confusion_matrix(compiled, weights, data))
        return {"miou": result.miou, "macc": result.macc, "aacc": result.aacc}

    def names(self, compiled: Compiled, weights: Weights, data: Any) -> list[str]:
        """The names of the scores."""
        del compiled, weights, data
        return ["miou", "macc", "aacc"]

    def confusion_matrix(self, compiled: Any, weights: Weights, data: Any) -> np.ndarray:
        """The confusion matrix of the whole set, int64 [K, K]. See `__call__`."""
        whole = self.mode == "whole"
        batch_size = sharding.batch_parts(compiled.mesh) if whole else self.batch_size
        placement = Placement(compiled.mesh, batch_size)
        share = _share(placement.rows, batch_size)
        count = data.examples("eval")
        if self.limit:
            count = min(count, self.limit * self.batch_size)

        def predict(windows: np.ndarray) -> jax.Array:
            batch = placement.put({"image": windows})
            return compiled.predict(weights.params, weights.extra, weights.frozen, batch)

        if whole:
            pictures = _readable_everywhere(data.pictures("eval", range(count)), count)
            predicted = self._predicted_whole(pictures, predict, placement.rows, batch_size)
        else:
            pictures = data.pictures("eval", range(share.first, count, share.step))
            predicted = self._predicted(pictures, predict, len(placement.rows))
        matrix = np.zeros((self.classes, self.classes), np.int64)
        for picture, labels in predicted:
            _check_mask(picture, self.classes)
            matrix += confusion(picture.mask, labels, classes=self.classes)
        return _sum_over_processes(matrix if share.counts else np.zeros_like(matrix))

    def _predicted_whole(
        self, pictures: Iterable[Picture], predict: Any, rows: np.ndarray, batch_size: int
    ) -> Iterator[tuple[Picture, np.ndarray]]:
        """The pictures in this process's rows of each batch, with their labels."""
        for shapes, batch in _by_size(pictures, self._whole.shapes, batch_size):
            own = [self._work(batch[row]) for row in rows if row < len(batch)]
            for view, shape in enumerate(shapes):
                windows = np.zeros((len(rows), *shape, 3), np.uint8)
                for row, work in enumerate(own):
                    windows[row] = work.views[view].windows[0]
                logits = _local_rows(predict(windows))
                for work, each in zip(own, logits, strict=False):
                    work.logits.append(each)
            for work in own:
                yield work.picture, self._labels(work)

    def _predicted(
        self, pictures: Iterable[Picture], predict: Any, rows: int
    ) -> Iterator[tuple[Picture, np.ndarray]]:
        """Each picture with its labels. `predict` is called equally often in all processes."""
        for batch in _computed(self._windows(pictures), predict, rows, self.window):
            for work, logits in batch:
                work.logits.append(logits)
                if len(work.logits) == work.count:
                    yield work.picture, self._labels(work)

    def _windows(self, pictures: Iterable[Picture]) -> Iterator[tuple["_Work", np.ndarray]]:
        for work in map(self._work, pictures):
            for view in work.views:
                for window in view.windows:
                    yield work, window

    def _work(self, picture: Picture) -> "_Work":
        return _Work(picture, self._views.views(picture.image))

    def _labels(self, work: "_Work") -> np.ndarray:
        found = iter(work.logits)
        logits = [np.stack([next(found) for _ in view.windows]) for view in work.views]
        return self._views.labels(work.views, logits, work.picture.mask.shape)


def from_config(config: Config, spec: ModelSpec, *, fill: tuple[int, int, int]) -> list[Evaluator]:
    """The evaluators of a segmentation run, repeated on the average if there is one.

    Arguments and errors as in `Segmented.of`.
    """
    evaluator = Segmented.of(config, spec, fill=fill)
    return [evaluator, Averaged(evaluator)] if config.ema_decay else [evaluator]


@dataclasses.dataclass(frozen=True)
class _Work:
    """A picture whose windows are being computed; `logits` are those of the first ones."""

    picture: Picture
    views: list[sliding.View]
    logits: list[np.ndarray] = dataclasses.field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(len(view.windows) for view in self.views)


_TOGETHER = 32  # pictures about which the processes exchange whether they can read them
_WAITING = 256  # pictures that wait for others of their size, at their original size


def _readable_everywhere(pictures: Iterable[Picture], count: int) -> Iterator[Picture]:
    """Those of the first `count` pictures of a split that no process leaves out."""
    coming = iter(pictures)
    following = next(coming, None)
    for first in range(0, count, _TOGETHER):
        indices, read = range(first, min(first + _TOGETHER, count)), {}
        while following is not None and following.index in indices:
            read[following.index] = following
            following = next(coming, None)
        here = np.array([index in read for index in indices], np.int32)
        everywhere = sharding.gathered(here).min(axis=0).tolist()
        yield from (read[index] for index, whole in zip(indices, everywhere, strict=True) if whole)


_Shapes = tuple[tuple[int, int], ...]


def _by_size(
    pictures: Iterable[Picture], shapes_of: Callable[[int, int], _Shapes], count: int
) -> Iterator[tuple[_Shapes, list[Picture]]]:
    """Groups of at most `count` pictures whose views have the same shapes.

    A group is full, or has waited the longest when more than `_WAITING` pictures wait.
    """
    waiting: dict[_Shapes, list[Picture]] = {}
    for picture in pictures:
        shapes = shapes_of(*picture.image.shape[:2])
        waiting.setdefault(shapes, []).append(picture)
        if len(waiting[shapes]) == count:
            yield shapes, waiting.pop(shapes)
        elif sum(map(len, waiting.values())) > max(_WAITING, count):
            oldest = next(iter(waiting))
            yield oldest, waiting.pop(oldest)
    yield from waiting.items()


def _computed(
    windows: Iterator[tuple[_Work, np.ndarray]], predict: Any, rows: int, side: int
) -> Iterator[list[tuple[_Work, np.ndarray]]]:
    """The logits of each window, in batches of `rows` windows of this process.

    A batch is read after the next one was started, to keep the devices busy. The processes go on
    until none of them has a window left.
    """
    pending: tuple[list[_Work], jax.Array] | None = None
    while True:
        taken = list(itertools.islice(windows, rows))
        more = sharding.anywhere(bool(taken))
        started = None
        if more:
            images = np.zeros((rows, side, side, 3), np.uint8)
            if taken:
                images[: len(taken)] = [window for _, window in taken]
            started = [work for work, _ in taken], predict(images)
        if pending is not None:
            yield list(zip(pending[0], _local_rows(pending[1]), strict=False))
        if not more:
            return
        pending = started


class _Share(NamedTuple):
    """Which pictures a process takes: each `step`-th from the `first` on.

    `counts` is False if another process takes the same ones and counts them.
    """

    first: int
    step: int
    counts: bool


def _share(rows: np.ndarray, batch_size: int) -> _Share:
    """Divides pictures among processes as the mesh divides the rows of a batch.

    Raises:
      ConfigError: the rows of two processes overlap without being the same.
    """
    own = np.array([rows[0], len(rows)], np.int32)
    gathered = sharding.gathered(own)
    shares = np.unique(gathered, axis=0)
    if shares[:, 1].sum() != batch_size:
        raise ConfigError(
            "this mesh gives two processes overlapping rows of a batch; choose mesh.tensor so that "
            "it divides the devices of a process, or is a multiple of them"
        )
    same = (gathered == own).all(axis=1).nonzero()[0]
    first = int((shares == own).all(axis=1).nonzero()[0][0])
    return _Share(first, len(shares), counts=int(same[0]) == jax.process_index())


def _local_rows(array: jax.Array) -> np.ndarray:
    """The rows of a global array that this process holds, in their order and each one once."""
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def _sum_over_processes(matrix: np.ndarray) -> np.ndarray:
    """The sum of int64 counts. JAX exchanges 32 bits, so each half of a count is sent by itself."""
    low = matrix & 0x7FFFFFFF
    halves = np.stack([matrix >> 31, low]).astype(np.int32)
    high, low = sharding.gathered(halves).astype(np.int64).sum(axis=0)
    return (high << 31) + low


def _check_mask(picture: Picture, classes: int) -> None:
    """Refuses labels for which the network has no output.

    Raises:
      DataError: a label is not below `classes`.
    """
    labels = picture.mask[picture.mask != IGNORED]
    if labels.size and labels.max() >= classes:
        raise DataError(
            f"{picture.name} has a pixel of class {labels.max()}, but segment.classes={classes}; "
            "set it to the number of classes, or data.ignore to the value that does not count"
        )
