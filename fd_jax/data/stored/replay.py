"""A run's rows from stored targets: the stored view of a picture, and the map of that view.

The boxes and flips are those of the records. A map is never cropped or mirrored: that of a mirrored
picture is another one.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from etils import epath
import numpy as np

from fd_jax.data import contents, shards
from fd_jax.data.datasets import BrokenImageError, Dataset, SkippedError
from fd_jax.data.decoding import decode
from fd_jax.data.elements import Elements, Row, labelled_image
from fd_jax.data.stored import description, records
from fd_jax.data.stored.drawing import Numbered, Viewer
from fd_jax.data.stored.records import View
from fd_jax.errors import ConfigError, DataError

# What is said about settings of crops and flips that differ from those of stored views.
_OTHER_VIEWS = (
    "A run sees exactly the stored views: a cropped or mirrored map is not the map of the cropped "
    "or mirrored picture, so it is not made from a stored one. Use the stored settings, or make "
    "targets with these ones by python -m fd_jax.targets"
)


class Store:
    """Random access to the records of a complete folder of targets.

    Args:
      folder: folder of targets.

    Attributes:
      folder: the same.
      description: what it holds.

    Raises:
      DataError: the folder is not complete, or a file of it is missing, cut off or damaged.
    """

    def __init__(self, folder: epath.PathLike):
        # A package with a compiled module; only data that is read needs it.
        from array_record.python import array_record_data_source

        self.folder = epath.Path(folder)
        self.description = description.read(self.folder, complete=True)
        files = [
            _File(str(self.folder / self.description.shard_name(number)), shard.records)
            for number, shard in enumerate(self.description.shards or ())
        ]
        remedy = (
            "give the command that made them again (its flags are in targets.json): it makes what "
            "is not whole"
        )
        shards.check(f"the targets in {folder}", files, remedy=remedy)
        self._records: Any = array_record_data_source.ArrayRecordDataSource(files)

    @property
    def views(self) -> description.Views:
        """Which views of each picture are stored."""
        return self.description.views

    def contents(self) -> dict[str, Any]:
        """By which a run that resumes notices other targets, as `contents.of_files`."""
        return {
            "examples": self.description.data["examples"],
            "files": self.description.number_of_shards,
            "digest": self.description.digest(),
            "sizes": None,
        }

    def read(self, index: int, number: int) -> tuple[View, dict[str, np.ndarray]]:
        """One view of a picture, and the arrays of its map.

        Raises:
          BrokenImageError: the picture could not be read when the targets were made, or the
            checksum of the record does not match.
          SkippedError: the picture is one of those that the original skips.
          DataError: the record is not that of this view.
        """
        try:
            view, content = records.unpack(self._records[index * self.views.number + number])
        except RuntimeError as error:  # how ArrayRecord reports a checksum
            raise BrokenImageError(f"its targets in {self.folder}: {error}") from error
        except ValueError as error:
            raise self._damaged(index, str(error)) from error
        if (view.index, view.number) != (index, number):
            raise self._damaged(index, f"is view {view.number} of picture {view.index}")
        if view.state == records.SKIPPED:
            raise SkippedError(f"picture {index}")
        if view.state == records.UNREADABLE:
            raise BrokenImageError("it could not be read when the targets were made")
        try:
            return view, self.description.codec.unpack(content)
        except ValueError as error:
            raise self._damaged(index, str(error)) from error

    def _damaged(self, index: int, problem: str) -> DataError:
        return DataError(
            f"the record of picture {index} in {self.folder} {problem}; the folder is damaged or "
            "was mixed with another one: make the targets again with python -m fd_jax.targets"
        )


class _File:
    """A whole file of records, as ArrayRecord and `shards.check` take it."""

    def __init__(self, filename: str, records: int):
        self.filename, self.skip = filename, 0
        self.take = self.examples_in_shard = records


@dataclasses.dataclass(frozen=True)
class Replay:
    """Makes the rows of one view number: picture, label and the stored maps.

    Attributes:
      viewer: crop, resize and flip of the student's picture, whose random numbers are not used.
      stores: targets by the name of the teacher, all of the same views; "" for the only one.
      number: which view of each picture.
    """

    viewer: Viewer
    stores: Mapping[str, Store]
    number: int

    @property
    def elements(self) -> Elements:
        """An image, its class, and the arrays of each map."""
        found = labelled_image(self.viewer.image_size)
        for name, store in self.stores.items():
            found |= description.elements(store.description.codec, name)
        return found

    def __call__(self, example: Numbered, rng: np.random.Generator) -> Row:
        """Returns the elements of the stored view.

        Raises:
          BrokenImageError: the picture or its targets cannot be read.
          DataError: the picture is not the one that the teacher saw.
        """
        del rng
        read = {name: store.read(example.index, self.number) for name, store in self.stores.items()}
        view = next(iter(read.values()))[0]
        pixels = decode(example.image, exif=self.viewer.exif)
        self._check(example.index, view, pixels, [other for other, _ in read.values()])
        row = {"image": self.viewer.view(pixels, view.box, view.flipped)}
        for name, (_, arrays) in read.items():
            names = description.element_names(name)
            row |= {names[array]: value for array, value in arrays.items()}
        return {**row, "label": example.label}

    def _check(self, index: int, view: View, pixels: np.ndarray, views: list[View]) -> None:
        where = " and ".join(str(store.folder) for store in self.stores.values())
        if view.size != pixels.shape[:2]:
            raise DataError(
                f"picture {index} has {pixels.shape[:2]} pixels, and when the targets in {where} "
                f"were made it had {view.size}: it is another picture. Bring the old data back, or "
                "make the targets again"
            )
        if any(other != view for other in views):
            raise DataError(f"{where} hold different views of picture {index}; make them again")


@dataclasses.dataclass(frozen=True)
class ByEpoch:
    """The transform of each step: epoch e has view e modulo the number of views.

    Attributes:
      by_view: a transform for each view number.
      steps_per_epoch: number of steps in an epoch.
    """

    by_view: tuple[Replay, ...]
    steps_per_epoch: int

    def __call__(self, step: int) -> Replay:
        """The transform of the batch of a step."""
        return self.by_view[step // self.steps_per_epoch % len(self.by_view)]


def replays(viewer: Viewer, stores: Mapping[str, Store]) -> tuple[Replay, ...]:
    """A transform for each view number of some targets; () without targets."""
    if not stores:
        return ()
    first = next(iter(stores.values()))
    return tuple(Replay(viewer, stores, number) for number in range(first.views.number))


def open_stores(
    folders: Mapping[str, str], dataset: Dataset | None, settings: Mapping[str, Any]
) -> dict[str, Store]:
    """Opens the targets of a run, and compares them with its data.

    Args:
      folders: folder of targets by the name of the teacher.
      dataset: split that the run reads.
      settings: those fields of `description.Views` that the run's data has as well.

    Raises:
      DataError: a folder cannot be used.
      ConfigError: the targets are of other pictures or other views, or two of them differ.
    """
    if not folders:
        return {}
    if dataset is None:
        raise ConfigError(
            "there are targets of held-out pictures, but no split: set data.eval_split"
        )
    stores = {name: Store(folder) for name, folder in folders.items()}
    found = known_contents(dataset)
    for store in stores.values():
        _check_pictures(store, dataset, found)
        _check_views(store, settings)
    _check_alike(list(stores.values()))
    return stores


def known_contents(dataset: Dataset) -> dict[str, Any]:
    """Number of pictures and of files, and digest, by which the data of targets are known."""
    found = contents.of_files(dataset.files(), len(dataset))
    return {name: found[name] for name in ("examples", "files", "digest")}


def _check_pictures(store: Store, dataset: Dataset, found: Mapping[str, Any]) -> None:
    made = store.description.data
    if lines := description.unlike(made, found):
        raise ConfigError(
            f"the targets in {store.folder} were made of {made['name']}, split {made['split']!r}, "
            f"and this run reads {dataset.name}, which differs:\n"
            + "\n".join(lines)
            + "\nset data.name and the split to the pictures of the targets, or make targets of "
            "these pictures with python -m fd_jax.targets"
        )


def _check_views(store: Store, settings: Mapping[str, Any]) -> None:
    if lines := description.unlike(dataclasses.asdict(store.views), settings):
        raise ConfigError(
            f"the targets in {store.folder} are of other views than data.* of this run:\n"
            + "\n".join(lines)
            + f"\n{_OTHER_VIEWS}"
        )


def _check_alike(stores: list[Store]) -> None:
    for other in stores[1:]:
        stored, here = (dataclasses.asdict(each.views) for each in (stores[0], other))
        if lines := description.unlike(stored, here):
            raise ConfigError(
                f"{stores[0].folder} (stored) and {other.folder} (here) have different views of "
                "the pictures, and a student sees one at a time:\n"
                + "\n".join(lines)
                + "\nmake both with the same flags"
            )
