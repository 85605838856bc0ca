"""What a folder of stored targets holds: the content of its `targets.json`.

The file is written before the first map, and again with the error of all maps when the last shard
is there. A folder without that error is not complete.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

from etils import epath

from fd_jax import files
from fd_jax.data.base import Crop, Interpolation
from fd_jax.data.elements import Element
from fd_jax.data.stored.codecs import SCALE, VALUES, Codec
from fd_jax.errors import DataError
from fd_jax.models.cropping import EVAL_RATIO
from fd_jax.models.spec import ModelSpec

FILE = "targets.json"
VERSION = 1
NORMALIZED = "none"  # maps are stored as the teacher returns them; a run normalises them


@dataclasses.dataclass(frozen=True)
class Views:
    """Which views of each picture are stored: a rule, since the boxes are in the records.

    View v of a picture is what a run with the same settings and this seed sees in epoch v; that of
    a held-out picture is what an evaluation sees.

    Attributes:
      number: number of views of each picture.
      seed: seed of the crops and flips.
      image_size: side of the views in pixels, before the teacher resizes them to its input.
      min_area, interpolation, crop, flip: as in `transforms.TrainTransform`.
      exif: whether pictures are turned as their EXIF orientation says.
      skip_official: whether the files that the original skips are left out.
      held_out: whether the pictures are held out: then nothing is drawn.
      eval_resize, eval_crop: `ratio` and `crop` of `transforms.EvalTransform`, for those.
    """

    number: int
    seed: int
    image_size: int
    min_area: float
    interpolation: Interpolation
    crop: Crop
    flip: bool
    exif: bool
    skip_official: bool
    held_out: bool = False
    eval_resize: float = EVAL_RATIO
    eval_crop: bool = True


class Shard(NamedTuple):
    """One file of maps.

    Attributes:
      records: number of views in it.
      bytes: size of the file.
      digest: CRC-32 of the records.
      maps: number of views that have a map.
      unreadable: number of pictures that could not be read.
      error: sums over its maps, see `measuring.apart`; [2, 4]
    """

    records: int
    bytes: int
    digest: int
    maps: int
    unreadable: int
    error: tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class Description:
    """What a folder of stored targets holds.

    Attributes:
      teacher: of which teacher the maps are: source, weights (a digest), image_size, stages and
        after_norm as in `normalization.statistics.Origin`, the dtype in which it ran, and matmuls
        if its linear layers multiplied narrow numbers, see `Teacher`.
      network: description of that teacher, as in its model.json.
      codec: how maps are stored.
      decoder: digests of the constants with which they are decoded, by group of tokens.
      data: name and split, and number, files and digest of the pictures, see `contents.of_files`.
      views: which views of each picture are stored.
      shard_size: number of pictures in each shard but the last.
      arguments: of the command that began the folder; for information.
      shards: of a complete folder; None before.
      error: of a complete folder: how far stored maps are from those of the teacher.
    """

    teacher: Mapping[str, Any]
    network: Mapping[str, Any]
    codec: Codec
    decoder: Mapping[str, int]
    data: Mapping[str, Any]
    views: Views
    shard_size: int
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shards: Sequence[Shard] | None = None
    error: Mapping[str, Any] | None = None

    @property
    def number_of_shards(self) -> int:
        """Number of files of maps in a complete folder."""
        return -(-self.data["examples"] // self.shard_size)

    def shard_name(self, number: int) -> str:
        """Name of one file of maps."""
        return f"maps-{number:05d}-of-{self.number_of_shards:05d}.array_record"

    def pictures(self, number: int) -> range:
        """Positions in the split of the pictures of one shard."""
        first = number * self.shard_size
        return range(first, min(first + self.shard_size, self.data["examples"]))

    def spec(self) -> ModelSpec:
        """The teacher's network as it ran, with its stages and input size."""
        return ModelSpec.from_json(json.dumps(self.network), where=f"the network in {FILE}")

    def identity(self) -> dict[str, Any]:
        """What two commands have to share to go on with each other's folder, by dotted names."""
        parts = {
            "teacher": self.teacher,
            "maps": dataclasses.asdict(self.codec),
            "decoder": self.decoder,
            "data": self.data,
            "views": dataclasses.asdict(self.views),
            "shard_size": {"pictures": self.shard_size},
        }
        return {f"{part}.{name}": v for part, fields in parts.items() for name, v in fields.items()}

    def digest(self) -> str:
        """A text that is another one for other maps."""
        shards = [shard.digest for shard in self.shards or ()]
        content = json.dumps([self.identity(), shards], sort_keys=True, default=list)
        return hashlib.sha256(content.encode()).hexdigest()

    def to_json(self) -> str:
        """The text of the file."""
        fields: dict[str, Any] = dataclasses.asdict(self)
        shards = None if self.shards is None else [each._asdict() for each in self.shards]
        content = {"version": VERSION, "normalize": NORMALIZED, **fields, "shards": shards}
        return json.dumps(content, indent=1) + "\n"


def elements(codec: Codec, teacher: str) -> dict[str, Element]:
    """The elements of a batch that hold the stored maps of a teacher; "" for the only one."""
    names = element_names(teacher)
    return {names[name]: element for name, element in codec.elements.items()}


def element_names(teacher: str) -> dict[str, str]:
    """The name in a batch of each array of a stored map."""
    suffix = f"_{teacher}" if teacher else ""
    return {VALUES: f"stored{suffix}", SCALE: f"scales{suffix}"}


def write(folder: epath.Path, content: Description) -> None:
    """Writes the file, completely or not at all."""
    files.write_text(folder / FILE, content.to_json())


def read(folder: epath.PathLike, *, complete: bool = False) -> Description:
    """Reads the file of a folder.

    Args:
      folder: folder of targets.
      complete: whether all maps have to be there.

    Raises:
      DataError: there is no such folder, it is damaged, not complete, or of another version.
    """
    path = epath.Path(folder) / FILE
    if not path.exists():
        raise DataError(
            f"there are no stored targets at {folder}; python -m fd_jax.targets --teacher=DIR "
            f"--data=NAME --output={folder} makes them"
        )
    try:
        found = files.read_object(path)
        version = found.pop("version")
        _check_version(path, version, found.pop("normalize", None))
        result = _parsed(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is damaged ({error!s:.100}); copy it again, or make the targets again with "
            "python -m fd_jax.targets"
        ) from error
    if complete and result.error is None:
        raise DataError(
            f"the targets in {folder} are not complete: a command that makes them was stopped, or "
            "still runs. Give it again with the same flags; it goes on where it stopped"
        )
    return result


def _check_version(path: epath.Path, version: Any, normalized: Any) -> None:
    if version != VERSION:
        raise DataError(
            f"{path} has version {version!r}, and this fd_jax reads {VERSION}; make the targets "
            "again with python -m fd_jax.targets, or use the fd_jax that made them"
        )
    if normalized != NORMALIZED:
        raise DataError(
            f"{path} holds maps that were normalised by {normalized!r} before they were stored, "
            f"and this fd_jax reads maps of the normalisation {NORMALIZED!r}, which a run then "
            "normalises itself; make the targets again with python -m fd_jax.targets"
        )


def _parsed(found: dict[str, Any]) -> Description:
    codec, shards = found["codec"], found["shards"]
    made = {
        **found,
        "codec": Codec(**{**codec, "grid": tuple(codec["grid"])}),
        "views": Views(**found["views"]),
        "shards": None if shards is None else [Shard(**each) for each in shards],
    }
    result = Description(**made)
    if result.shards is not None and len(result.shards) != result.number_of_shards:
        raise ValueError(f"{len(result.shards)} shards of {result.number_of_shards}")
    return result


def unlike(stored: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """A line with both sides for each name of `here` whose stored value is another one."""
    return [
        f"  {name}: stored {stored.get(name)!r}, here {value!r}"
        for name, value in here.items()
        if stored.get(name) != value
    ]
