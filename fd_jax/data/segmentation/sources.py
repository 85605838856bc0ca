"""Sources of pictures with masks: ADE20K, pairs of folders, and TFDS datasets.

A pair of folders is described by two patterns below `data.root`, in which `{split}` stands for the
name of the split, and `{name}` for what a picture and its mask share. A pattern without `{name}` is
a folder; there, files match that differ in their suffix alone.

- Files in a folder for each split, the default:
  images="images/{split}", labels="annotations/{split}".
- Cityscapes, 19 classes, 255 ignored, data.reduce_zero_label=False:
  images="leftImg8bit/{split}/{name}_leftImg8bit.png",
  labels="gtFine/{split}/{name}_gtFine_labelTrainIds.png", split="train", eval_split="val".
- Names of the classes are read from the file data.class_names below data.root, one per line and
  from the stored 0 on.
- Pascal VOC, 21 classes with the background, 255 ignored, data.reduce_zero_label=False. Its masks
  are PNGs with a palette, whose indices are the classes. It lists its splits in text files, so link
  the listed files into a folder per split first:
  for n in $(cat ImageSets/Segmentation/train.txt); do ln -s ../../JPEGImages/$n.jpg images/train/;
  ln -s ../../SegmentationClass/$n.png annotations/train/; done
"""

import re
from typing import Any, Protocol

from etils import epath
import numpy as np

from fd_jax import files
from fd_jax.console import say
from fd_jax.data.datasets import IMAGE_SUFFIXES, BrokenImageError, Source, TfdsRecords
from fd_jax.data.segmentation.labels import Scene
from fd_jax.errors import DataError

ADE20K, FOLDERS = "ade20k", "folders"  # names that are not those of TFDS builders
ADE20K_STORED = 151  # labels in ADE20K's masks: 0 for everything else, and 150 classes
_ADE20K_SIZES = {"training": 20_210, "validation": 2_000}
_ADE20K_PATTERNS = "images/{split}", "annotations/{split}"
_DOWNLOAD = (
    "Semantic segmentation with 150 classes needs ADEChallengeData2016, with "
    "images/{training,validation}/*.jpg and annotations/{training,validation}/*.png: "
    "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
)
_MASK_SUFFIXES = (".png",)  # a lossy format would change labels
_LISTED = 3  # number of files that a message names


class Scenes(Source, Protocol):
    """Random access to the pictures of a split with their masks."""

    stored: int | None  # number of values that masks can have without the ignored one, if known
    class_names: tuple[str, ...] | None  # of these values, if known

    def __getitem__(self, index: int) -> Scene:
        """Reads one picture and its mask, without decoding them."""
        ...


def open_scenes(
    name: str,
    split: str,
    *,
    root: str,
    images: str,
    labels: str,
    data_dir: str | None,
    class_names: str = "",
) -> Scenes:
    """Opens a split of pictures with masks.

    Args:
      name: "ade20k", "folders", or a TFDS name.
      split: name of the split; of a TFDS dataset, in TFDS syntax.
      root: folder of ADEChallengeData2016, or of the patterns of "folders".
      images: pattern of the pictures of "folders".
      labels: pattern of the masks of "folders".
      data_dir: folder in which TFDS keeps prepared data; None for the default of TFDS.
      class_names: file below `root` with a name per line, for each value of the masks of "folders";
        "" for none.

    Raises:
      DataError: the data is missing, is of another kind, or its pictures and masks do not match.
    """
    if name == ADE20K:
        return open_ade20k(_folder(root, name), split)
    if name == FOLDERS:
        folder = _folder(root, name)
        names = _listed_names(folder / class_names) if class_names else None
        return FolderScenes(folder, split, images=images, labels=labels, class_names=names)
    return TfdsScenes(name, split, data_dir=data_dir)


def is_one_split(name: str, images: str) -> bool:
    """Returns whether every split would read the same pictures."""
    return name == FOLDERS and "{split}" not in images


def open_ade20k(root: epath.Path, split: str) -> "FolderScenes":
    """Opens a split of ADEChallengeData2016, "training" or "validation".

    Raises:
      DataError: the folder is incomplete, or is another release of ADE20K.
    """
    _check_release(root)
    images, labels = _ADE20K_PATTERNS
    scenes = FolderScenes(
        root,
        split,
        images=images,
        labels=labels,
        stored=ADE20K_STORED,
        class_names=_ade20k_names(root / "objectInfo150.txt"),
    )
    wanted = _ADE20K_SIZES.get(split, len(scenes))
    if len(scenes) != wanted:
        say(f"{scenes.name} holds {len(scenes):,} pictures of the {wanted:,} of ADE20K")
    return scenes


class FolderScenes:
    """Pictures and masks in two folders, indexed once and read in place.

    Args:
      root: folder that the patterns are below.
      split: replaces `{split}` in the patterns.
      images: pattern of the pictures; see the docstring of this module.
      labels: pattern of the masks.
      stored: number of values that masks can have, if it is known.
      class_names: names of these values, if they are known.

    Raises:
      DataError: a folder is missing or empty, or pictures and masks do not match.
    """

    def __init__(
        self,
        root: epath.Path,
        split: str,
        *,
        images: str,
        labels: str,
        stored: int | None = None,
        class_names: tuple[str, ...] | None = None,
    ):
        pictures = _find(root, images, split, IMAGE_SUFFIXES, "data.images")
        masks = _find(root, labels, split, _MASK_SUFFIXES, "data.labels")
        _check_pairs(pictures, masks)
        self.name = f"{root}/{split}"
        self.stored = stored
        self.class_names = class_names
        self._files = [(name, pictures[name], masks[name]) for name in sorted(pictures)]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Scene:
        name, picture, mask = self._files[index]
        try:
            image, labels = epath.Path(picture).read_bytes(), epath.Path(mask).read_bytes()
        except OSError as error:
            raise BrokenImageError(str(error)) from error
        return Scene(image, labels, name, mask)

    def describe(self, index: int) -> str:
        """Returns the path of the picture."""
        return self._files[index][1]

    def files(self) -> list[tuple[str, str]]:
        """Names and paths of the pictures and of their masks."""
        pictures = [(f"picture {name}", picture) for name, picture, _ in self._files]
        return pictures + [(f"mask {name}", mask) for name, _, mask in self._files]


class TfdsScenes(TfdsRecords):
    """A prepared TFDS dataset with an image and a mask, an image of one 8-bit channel.

    Raises:
      DataError: the dataset is not prepared, has no such features, or is `scene_parse150`.
    """

    def __init__(self, name: str, split: str, *, data_dir: str | None):
        _refuse_instances(name)
        super().__init__(name, split, data_dir=data_dir, encoded=("image", "mask"))
        mask = self.features["mask"]
        _check_mask_feature(name, mask)
        self.stored: int | None = getattr(mask, "num_classes", None)
        self.class_names = tuple(mask.names) if self.stored else None

    def __getitem__(self, index: int) -> Scene:
        record = self.record(index)
        position = f"{self.name}[{index}]"
        return Scene(record["image"], record["mask"], str(index), position)


def _refuse_instances(name: str) -> None:
    if re.split("[:/]", name)[0] == "scene_parse150":
        raise DataError(
            "data.name=scene_parse150: this TFDS dataset pairs the pictures of ADE20K with masks "
            "of instances of 100 classes, not with the 150 classes of each pixel. Use "
            f"data.name=ade20k with data.root. {_DOWNLOAD}"
        )


def _check_mask_feature(name: str, mask: Any) -> None:
    if tuple(mask.shape[-1:]) != (1,) or len(mask.shape) != 3 or mask.np_dtype != np.uint8:
        raise DataError(
            f"{name}: its feature 'mask' is {mask}; expected an image of one 8-bit channel, "
            "Image(shape=(None, None, 1)) or LabeledImage"
        )


def _ade20k_names(path: epath.Path) -> tuple[str, ...] | None:
    """Returns the names in objectInfo150.txt, after one for 0; None if the file is missing.

    Its columns, separated by tabs, are Idx, Ratio, Train, Val, Stuff and Name.
    """
    if not path.exists():
        return None
    lines = [line.split("\t") for line in _text(path).strip().splitlines()[1:]]
    numbers = [line[0].strip() for line in lines]
    if numbers != [str(k) for k in range(1, ADE20K_STORED)] or any(len(x) < 6 for x in lines):
        raise DataError(
            f"{path}: expected a line of titles and one for each class from 1 to 150, of 6 columns "
            "separated by tabs that end with the name; unpack it again, or remove it to go without "
            "names"
        )
    return ("other", *(line[5].partition(",")[0].strip() for line in lines))


def _listed_names(path: epath.Path) -> tuple[str, ...]:
    """Returns the lines of data.class_names, which may be blank for a value without a name."""
    if not path.is_file():
        raise DataError(f"data.class_names: no file {path}; expected a name per line, or ''")
    return tuple(line.strip() for line in _text(path).splitlines())


def _text(path: epath.Path) -> str:
    try:
        return files.read_text(path)
    except ValueError as error:
        raise DataError(f"{path} {error}; expected a text file with names of classes") from error


def _folder(root: str, name: str) -> epath.Path:
    if not root:
        raise DataError(f"data.name={name} needs data.root, the folder of the pictures and masks")
    folder = epath.Path(root).expanduser()
    if not folder.is_dir():
        hint = f". {_DOWNLOAD}" if name == ADE20K else ""
        raise DataError(f"data.root={root}: no such folder{hint}")
    return folder


def _check_release(root: epath.Path) -> None:
    """Refuses a folder that is not ADEChallengeData2016, and says what it is."""
    inner = root / "ADEChallengeData2016"
    if inner.is_dir():
        raise DataError(f"data.root={root} holds ADEChallengeData2016; set data.root={inner}")
    releases = {
        "ADE20K_2021_17_01": (root / "images" / "ADE", root / "index_ade20k.pkl"),
        "the full ADE20K of 2016": (root / "index_ade20k.mat", root / "images" / "training" / "a"),
    }
    for release, marks in releases.items():
        if root.name == release or any(mark.exists() for mark in marks):
            raise DataError(
                f"data.root={root} is {release}, whose *_seg.png masks hold thousands of object "
                f"names and their parts in another encoding. {_DOWNLOAD}"
            )
    missing = [name for name in ("images", "annotations") if not (root / name).is_dir()]
    if missing:
        raise DataError(f"data.root={root} has no folder {' and '.join(missing)}. {_DOWNLOAD}")


def _find(
    root: epath.Path, pattern: str, split: str, suffixes: tuple[str, ...], field: str
) -> dict[str, str]:
    """Returns the files of a pattern, by the names that they share with their partners."""
    pattern = pattern.replace("{split}", split)
    before, _, ending = pattern.partition("{name}")
    is_folder = before == pattern
    parent, _, prefix = (pattern, "", "") if is_folder else before.rpartition("/")
    folder = root / parent
    if not folder.is_dir():
        raise DataError(f"{field}: no folder {folder}; {_siblings(folder)}")
    found: dict[str, str] = {}
    for path in _files(folder):
        name = _shared_name(path[len(str(folder)) + 1 :], prefix, ending, suffixes)
        if name is not None and found.setdefault(name, path) != path:
            raise DataError(f"{field}: {found[name]} and {path} have the same name; keep one")
    if not found:
        wanted = f"files that match {pattern}" if ending else f"files ({', '.join(suffixes)})"
        raise DataError(f"{field}: no {wanted} under {folder}")
    return found


def _shared_name(file: str, prefix: str, ending: str, suffixes: tuple[str, ...]) -> str | None:
    """Returns what lies between prefix and ending of a file name; None for other files."""
    if not file.startswith(prefix):
        return None
    if ending:
        return file[len(prefix) : -len(ending)] if file.endswith(ending) else None
    return file[len(prefix) :].rpartition(".")[0] if file.lower().endswith(suffixes) else None


def _files(folder: epath.Path) -> list[str]:
    """Returns the paths of all files below a folder; hidden ones are not data."""
    return [
        str(parent / name)
        for parent, _, names in folder.walk()
        for name in names
        if not name.startswith(".")
    ]


def _siblings(folder: epath.Path) -> str:
    """Says what there is beside a folder that is missing, usually that of a split."""
    parent = folder.parent
    if not parent.is_dir():
        return "set data.root, data.images and data.labels to what there is"
    names = sorted(path.name for path in parent.iterdir() if path.is_dir())
    return f"the folders in {parent} are {names}; set data.split, data.eval_split or the pattern"


def _check_pairs(pictures: dict[str, str], masks: dict[str, str]) -> None:
    problems = [
        f"{len(alone)} {kind} (of {total}) without a {partner}: {', '.join(alone[:_LISTED])}"
        + (", ..." if len(alone) > _LISTED else "")
        for kind, partner, total, alone in (
            ("pictures", "mask", len(pictures), sorted(pictures.keys() - masks.keys())),
            ("masks", "picture", len(masks), sorted(masks.keys() - pictures.keys())),
        )
        if alone
    ]
    if problems:
        raise DataError(
            f"{_example(pictures)} and {_example(masks)}: pictures and masks have to match by "
            f"name, but there are {' and '.join(problems)}. Add what is missing, or move away what "
            "is left over"
        )


def _example(files: dict[str, str]) -> str:
    """Returns the folder of one of the files."""
    return str(epath.Path(next(iter(files.values()))).parent)
