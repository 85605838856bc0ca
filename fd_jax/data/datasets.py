"""Image sources: random access to encoded images and their labels."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from etils import epath
import numpy as np

from fd_jax.errors import DataError

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
FOLDER_PREFIX = "folder:"
_SPLIT = "{split}"  # placeholder in the path of a folder

# Files that users have to download themselves, for licence reasons, by dataset.
MANUAL_FILES = {"imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")}

# File names that the original skips in distillation and in ImageNet-22K fine-tuning
# (docs/reference.md#skipped-files). One of them belongs to ImageNet-1K.
OFFICIAL_SKIPPED = tuple(
    f"{name}.JPEG"
    for name in (
        "n01678043_6448 n01896844_997 n02368116_318 n02428089_710 n02487347_1956 n02597972_5463 "
        "n03957420_30695 n03957420_33553 n03957420_8296 n04135315_8814 n04135315_9318 "
        "n04257684_9033 n04427559_2974 n06470073_47249 n07930062_4147 n09224725_3995 "
        "n09359803_8155 n09620794_5529 n09789566_3522 n09894445_7463 n10175248_583 "
        "n10316360_4246 n10368624_12550 n10585217_8484 n10721819_1131 n12353203_3849 "
        "n12630763_8018"
    ).split()
)


class BrokenImageError(Exception):
    """An example cannot be read or decoded; training continues with another one."""


class SkippedError(Exception):
    """An example is one of those that the user asked to skip."""


class Example(NamedTuple):
    """One labelled image.

    Attributes:
      image: encoded bytes, or decoded pixels as uint8 [h, w, 3].
      label: class index; -1 if there is none.
    """

    image: bytes | np.ndarray
    label: int


class Source(Protocol):
    """Random access to the examples of a split, of whatever kind; the loader reads these."""

    name: str

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int) -> Any:
        """Reads one example.

        Raises:
          BrokenImageError: the example cannot be read.
          SkippedError: the example is to be skipped, which is only known once it is read.
        """
        ...

    def describe(self, index: int) -> str:
        """Returns a description of one example, for messages."""
        ...

    def files(self) -> list[tuple[str, str]]:
        """Name within the split and path of each file that is read, in any order."""
        ...


class Dataset(Source, Protocol):
    """A source of labelled images."""

    num_classes: int | None

    def __getitem__(self, index: int) -> Example:
        """Reads one image and its label."""
        ...


def open_dataset(
    name: str, split: str, *, data_dir: str | None = None, skip: Sequence[str] = ()
) -> Dataset:
    """Opens a split of a dataset.

    Args:
      name: TFDS name (imagenet2012, photos, digits, your own builder) or folder:/path. The
        sub-folders of a folder, if it has any, are its classes, and `{split}` in its path is
        replaced by the split.
      split: split in TFDS syntax ("train", "train[:90%]"); a folder uses it only to replace
        `{split}` in its path.
      data_dir: folder in which TFDS keeps prepared data; None for the default of TFDS.
      skip: endings of the file names to leave out. A folder drops these files when it is indexed.
        A TFDS dataset keeps its length and its batches take the next example instead, because
        finding these files beforehand would mean reading the whole dataset.

    Raises:
      DataError: the dataset does not exist, is not prepared, or has no random access.
    """
    if name.startswith(FOLDER_PREFIX):
        folder = name.removeprefix(FOLDER_PREFIX).replace(_SPLIT, split)
        return FolderDataset(folder, skip=skip)
    return TfdsDataset(name, split, data_dir=data_dir, skip=skip)


def name_of(text: str) -> str:
    """Returns the name for `open_dataset`; the path of a folder gets the prefix that it needs."""
    is_path = text.startswith(("/", ".", "~", "gs://")) or _SPLIT in text
    if text.startswith(FOLDER_PREFIX) or not (is_path or epath.Path(text).is_dir()):
        return text
    return f"{FOLDER_PREFIX}{epath.Path(text).expanduser()}"


def is_one_folder(name: str) -> bool:
    """Returns whether every split of a dataset would read the same folder of images."""
    return name.startswith(FOLDER_PREFIX) and _SPLIT not in name


class FolderDataset:
    """The image files under a folder, indexed once as (path, label) and read in place.

    The label of an image is the position of its sub-folder among the sorted sub-folders. A folder
    without sub-folders has no labels.
    """

    def __init__(self, folder: epath.PathLike, *, skip: Sequence[str] = ()):
        root = epath.Path(folder)
        if not root.is_dir():
            raise DataError(f"no folder of images at {folder}")
        self.name = f"{FOLDER_PREFIX}{root}"
        children = [path for path in root.iterdir() if not path.name.startswith(".")]
        classes = sorted(path.name for path in children if path.is_dir())
        loose = [path.name for path in children if path.name.lower().endswith(IMAGE_SUFFIXES)]
        if classes and loose:
            raise DataError(
                f"{folder} has {len(loose)} images ({loose[0]}...) next to its {len(classes)} "
                "class folders; move each image into a class folder, or name a folder without "
                "sub-folders"
            )
        self.num_classes = len(classes) or None
        groups = [(root / name, label) for label, name in enumerate(classes)] or [(root, -1)]
        self._files = [
            (path, label) for group, label in groups for path in _image_files(group, skip)
        ]
        if not self._files:
            raise DataError(f"no images ({', '.join(IMAGE_SUFFIXES)}) under {folder}")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        path, label = self._files[index]
        try:
            return Example(epath.Path(path).read_bytes(), label)
        except OSError as error:
            raise BrokenImageError(str(error)) from error

    def describe(self, index: int) -> str:
        """Returns the path of the file."""
        return self._files[index][0]

    def files(self) -> list[tuple[str, str]]:
        """Paths below the folder, and whole paths, of the images."""
        root = self.name.removeprefix(FOLDER_PREFIX).rstrip("/")
        return [(path[len(root) + 1 :], path) for path, _ in self._files]


class TfdsRecords:
    """A split of a prepared TFDS dataset in ArrayRecord files, read record by record.

    Args:
      name: TFDS name.
      split: split in TFDS syntax.
      data_dir: folder in which TFDS keeps prepared data; None for the default of TFDS.
      encoded: features that the dataset has to have, and that are returned encoded.
    """

    def __init__(self, name: str, split: str, *, data_dir: str | None, encoded: Sequence[str]):
        import tensorflow_datasets as tfds

        builder = find_builder(name, data_dir)
        if not builder.is_prepared():
            raise DataError(not_prepared_message(name, str(builder.data_dir), data_dir))
        if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise DataError(
                f"{name} in {builder.data_dir} is prepared as {builder.info.file_format.value}, "
                "which has no random access. Prepare it again as ArrayRecord in another data_dir or"
                f" after you have moved that folder away:\n  {prepare_command(name, data_dir)}"
            )
        self.name = f"{name}/{split}"
        self.features: Any = builder.info.features or {}
        for feature in encoded:
            if feature not in self.features:
                raise DataError(
                    f"{name} has no feature {feature!r}; its features are {sorted(self.features)}"
                )
        _check_split(name, split, builder.info.splits or {})
        decoders = {feature: tfds.decode.SkipDecoding() for feature in encoded}
        self._records: Any = builder.as_data_source(split, decoders=decoders)
        parts = builder.info.splits[split].file_instructions
        self._shards = [
            (
                f"{epath.Path(part.filename).name}[{part.skip}:{part.skip + part.take}]",
                part.filename,
            )
            for part in parts
        ]

    def __len__(self) -> int:
        return len(self._records)

    def describe(self, index: int) -> str:
        """Returns the position of an example and, if the dataset stores it, its file name."""
        try:
            file_name = _file_name(self.record(index))
        except BrokenImageError:
            file_name = ""
        return f"{self.name}[{index}]" + (f" ({file_name})" if file_name else "")

    def files(self) -> list[tuple[str, str]]:
        """Names of the shards with the range of their examples, and their paths."""
        return self._shards

    def record(self, index: int) -> dict[str, Any]:
        """Reads all features of one example.

        Raises:
          BrokenImageError: the checksum of the record does not match.
        """
        try:
            return self._records[int(index)]
        except RuntimeError as error:  # how ArrayRecord reports such a checksum
            raise BrokenImageError(str(error)) from error


class TfdsDataset(TfdsRecords):
    """The labelled images of a prepared TFDS dataset; the images are returned encoded."""

    def __init__(self, name: str, split: str, *, data_dir: str | None, skip: Sequence[str] = ()):
        super().__init__(name, split, data_dir=data_dir, encoded=("image",))
        label = self.features["label"] if "label" in self.features else None
        self.num_classes = getattr(label, "num_classes", None)
        self._skip = tuple(skip)

    def __getitem__(self, index: int) -> Example:
        record = self.record(index)
        if self._skip and _file_name(record).endswith(self._skip):
            raise SkippedError(_file_name(record))
        return Example(record["image"], int(record.get("label", -1)))


class Subset:
    """Some examples of a dataset, in a given order."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]):
        self._dataset, self._indices = dataset, indices
        self.name, self.num_classes = dataset.name, dataset.num_classes

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._dataset[self._indices[index]]

    def describe(self, index: int) -> str:
        """Returns the description of the example in the whole dataset."""
        return self._dataset.describe(self._indices[index])

    def files(self) -> list[tuple[str, str]]:
        """The files of the whole dataset."""
        return self._dataset.files()


def find_builder(name: str, data_dir: str | None) -> Any:
    """Returns the TFDS builder with a name, which may be one of ours.

    Raises:
      DataError: no builder has that name.
    """
    import tensorflow_datasets as tfds

    from fd_jax.data import builders  # noqa: F401  (registers photos and digits)

    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        if "file_format" in str(error):
            return tfds.builder(name, data_dir=data_dir)
        raise DataError(
            f"TFDS has no dataset {name!r}. Use a TFDS name, the name of a builder that was "
            f"imported or prepared in data_dir={data_dir}, or {FOLDER_PREFIX}/path/to/images"
        ) from error


def prepare_command(name: str, data_dir: str | None) -> str:
    """Returns the command that prepares a dataset."""
    command = f"python -m fd_jax.data.prepare --name={name}"
    if data_dir:
        command += f" --data_dir={data_dir}"
    if name in MANUAL_FILES:
        command += " --manual_dir=FOLDER_WITH_THE_TAR_FILES"
    return command


def not_prepared_message(name: str, folder: str, data_dir: str | None) -> str:
    """Returns an error message that explains how to prepare a dataset."""
    text = (
        f"{name} is not prepared in {folder}. Prepare it with\n  {prepare_command(name, data_dir)}"
    )
    if name in MANUAL_FILES:
        text += (
            f"\nThat folder has to hold {' and '.join(MANUAL_FILES[name])} from image-net.org. "
            "The command calls builder.download_and_prepare(file_format='array_record')."
        )
    return text


def _check_split(name: str, split: str, splits: Any) -> None:
    """Refuses a split that does not exist or is empty."""
    sizes = {part: info.num_examples for part, info in splits.items()}
    try:
        examples = splits[split].num_examples
    except (ValueError, KeyError) as error:
        raise DataError(f"{name} has no split {split!r}; its splits are {sorted(sizes)}") from error
    if examples < 1:  # TFDS counts a slice that ends before it begins as negative
        raise DataError(f"{name} has no examples in {split!r}; the sizes of its splits are {sizes}")


def _file_name(record: dict[str, Any]) -> str:
    name = record.get("file_name", b"")
    return name.decode() if isinstance(name, bytes) else name


def _image_files(folder: epath.Path, skip: Sequence[str]) -> list[str]:
    """Returns the sorted paths of the images in a folder, at any depth."""
    return sorted(
        str(parent / name)
        for parent, _, names in folder.walk()
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.endswith(tuple(skip))
    )
