"""Image sources: random access to encoded images and their labels."""

from collections.abc import Sequence
import re
from typing import Any, NamedTuple, Protocol

from etils import epath
import numpy as np

from fd_jax.data import decoding, folders, shards
from fd_jax.data.class_names import Classes, Match, numbering
from fd_jax.data.decoding import BrokenImageError
from fd_jax.errors import DataError, first_few

IMAGE_SUFFIXES = decoding.SUFFIXES
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


class SkippedError(Exception):
    """An example is one of those that the user asked to skip."""


class Example(NamedTuple):
    """One labelled image.

    Attributes:
      image: encoded bytes, or decoded pixels as `decoding.decode` takes them.
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
    """A source of labelled images.

    Attributes:
      num_classes: number of classes; None without labels.
      class_names: their names; None if they have numbers only, or without labels.
    """

    num_classes: int | None
    class_names: tuple[str, ...] | None

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


def doubt_about(dataset: Dataset) -> str:
    """What to say of a dataset whose pictures may be others than users think; "" of most."""
    source = original(dataset)
    return source.contents.doubt if isinstance(source, FolderDataset) else ""


def is_one_folder(name: str) -> bool:
    """Returns whether every split of a dataset would read the same folder of images."""
    return name.startswith(FOLDER_PREFIX) and _SPLIT not in name


class FolderDataset:
    """The image files under a folder, indexed once as (path, label) and read in place.

    The label of an image is the position of its sub-folder among the sorted sub-folders that hold
    pictures. A folder without such sub-folders has no labels.

    Attributes:
      contents: what was found in the folder, and what is not read.
    """

    def __init__(self, folder: epath.PathLike, *, skip: Sequence[str] = ()):
        self.contents = folders.index(folder, skip=skip)
        self.name = f"{FOLDER_PREFIX}{self.contents.folder}"
        self.class_names = self.contents.class_names
        self.num_classes = len(self.class_names) if self.class_names else None
        self._files = self.contents.files

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
        remedy = f"move {builder.data_dir} away and run\n  {prepare_command(name, data_dir)}"
        parts = builder.info.splits[split].file_instructions
        shards.check(self.name, parts, remedy=remedy)
        decoders = {feature: tfds.decode.SkipDecoding() for feature in encoded}
        self._records: Any = builder.as_data_source(split, decoders=decoders)
        self._shards = [(_examples_of(part), part.filename) for part in parts]

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
    """The labelled images of a prepared TFDS dataset; the images are returned encoded.

    A feature `label` that is not one number for each image is not read.
    """

    def __init__(self, name: str, split: str, *, data_dir: str | None, skip: Sequence[str] = ()):
        super().__init__(name, split, data_dir=data_dir, encoded=("image",))
        _check_images(name, self.features["image"])
        label = self.features["label"] if "label" in self.features else None
        self._has_label = label is not None and _is_number(label)
        self.num_classes = getattr(label, "num_classes", None) if self._has_label else None
        self.class_names = _class_names(label) if self.num_classes else None
        self._skip = tuple(skip)

    def __getitem__(self, index: int) -> Example:
        record = self.record(index)
        if self._skip and _file_name(record).endswith(self._skip):
            raise SkippedError(_file_name(record))
        return Example(record["image"], int(record["label"]) if self._has_label else -1)


class View:
    """A dataset that shows another one in a different way.

    Attributes:
      dataset: the other one.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.name = dataset.name
        self.num_classes: int | None = dataset.num_classes
        self.class_names: tuple[str, ...] | None = dataset.class_names

    def __len__(self) -> int:
        return len(self.dataset)

    def describe(self, index: int) -> str:
        """Returns the description of the example in the dataset itself."""
        return self.dataset.describe(index)

    def files(self) -> list[tuple[str, str]]:
        """The files of the whole dataset."""
        return self.dataset.files()


class Subset(View):
    """Some examples of a dataset, in a given order."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]):
        super().__init__(dataset)
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self.dataset[self._indices[index]]

    def describe(self, index: int) -> str:
        """Returns the description of the example in the whole dataset."""
        return self.dataset.describe(self._indices[index])


class Renumbered(View):
    """A dataset whose classes have the numbers of a head, or of another split.

    Args:
      dataset: labelled dataset.
      wanted: classes whose numbers the labels get; without names, they take those of the dataset if
        there are as many.
      match: see `class_names.numbering`, which also says what is refused.
    """

    def __init__(self, dataset: Dataset, wanted: Classes, *, match: Match = "name"):
        super().__init__(dataset)
        self._numbers = numbering(classes_of(dataset), wanted, match=match)
        self.num_classes: int | None = wanted.count
        if wanted.names is not None:
            self.class_names = tuple(wanted.names)
        elif self._numbers != tuple(range(wanted.count)):
            self.class_names = None

    def __getitem__(self, index: int) -> Example:
        image, label = self.dataset[index]
        return Example(image, self._numbers[label] if label >= 0 else label)


def original(dataset: Dataset) -> Dataset:
    """The dataset behind all views of it."""
    while isinstance(dataset, View):
        dataset = dataset.dataset
    return dataset


def why_unlabelled(dataset: Dataset) -> str:
    """What a TFDS dataset has in place of class labels, for messages; "" for other datasets."""
    source = original(dataset)
    if not isinstance(source, TfdsDataset):
        return ""
    if "label" in source.features:
        return f" (its feature 'label' is {source.features['label']}, and no class for each image)"
    return f" (it has no feature 'label'; its features are {sorted(source.features)})"


def classes_of(dataset: Dataset) -> Classes:
    """The classes of a dataset with labels."""
    return Classes(dataset.name, dataset.num_classes or 0, dataset.class_names)


def spread(dataset: Dataset, examples: int) -> Subset:
    """Some examples, evenly spread, since datasets tend to be sorted by class; all if it has less.

    Args:
      dataset: the whole split.
      examples: number of examples.
    """
    count = min(len(dataset), examples)
    return Subset(dataset, (np.arange(count) * len(dataset) // max(count, 1)).tolist())


def _examples_of(part: Any) -> str:
    """A shard of TFDS and the range of its examples."""
    return f"{epath.Path(part.filename).name}[{part.skip}:{part.skip + part.take}]"


def find_builder(name: str, data_dir: str | None) -> Any:
    """Returns the TFDS builder with a name, which may be one of ours.

    Raises:
      DataError: no builder has that name, or what describes the prepared data is damaged.
    """
    import tensorflow_datasets as tfds

    from fd_jax.data import builders  # noqa: F401  (registers photos and digits)

    try:
        return _builder(name, data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise DataError(
            f"TFDS has no dataset {name!r}. Use a TFDS name, the name of a builder that was "
            f"imported or prepared in data_dir={data_dir}, or {FOLDER_PREFIX}/path/to/images"
        ) from error
    except Exception as error:  # a builder reads its description, and each kind of damage differs
        described = _descriptions(name, data_dir)
        if not described:
            raise
        reason = str(error.__cause__ or error).splitlines()[0][:200]
        raise DataError(
            f"{name}: TFDS cannot read {first_few(described)} ({reason}). Bring the file back, or "
            f"move its folder away and run\n  {prepare_command(name, data_dir)}"
        ) from error


def _builder(name: str, data_dir: str | None) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except ValueError as error:
        if "file_format" not in str(error):
            raise
        return tfds.builder(name, data_dir=data_dir)


def _descriptions(name: str, data_dir: str | None) -> list[str]:
    """The files that describe the prepared versions of a dataset, and of its configs."""
    from tensorflow_datasets.core.constants import DATA_DIR

    folder = epath.Path(data_dir or DATA_DIR).expanduser() / re.split("[/:]", name)[0]
    depths = ("*/dataset_info.json", "*/*/dataset_info.json")
    return sorted(str(path) for depth in depths for path in folder.glob(depth))


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


def _check_images(name: str, feature: Any) -> None:
    """Refuses a feature `image` that is no picture of whole numbers with a known range."""
    if len(feature.shape or ()) != 3 or feature.np_dtype not in (np.uint8, np.uint16):
        raise DataError(
            f"{name}: its feature 'image' is {feature}; expected a picture of 8 or 16 bits per "
            "channel, such as Image()"
        )


def _is_number(label: Any) -> bool:
    """Whether a feature is one whole number for each example."""
    return label.shape == () and np.issubdtype(label.np_dtype, np.integer)


def _class_names(label: Any) -> tuple[str, ...] | None:
    """The names of a `ClassLabel`; TFDS makes up numbers where there are none."""
    names = tuple(label.names)
    return None if names == tuple(str(k) for k in range(len(names))) else names


def _file_name(record: dict[str, Any]) -> str:
    name = record.get("file_name", b"")
    return name.decode() if isinstance(name, bytes) else name
