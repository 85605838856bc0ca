"""Model folders: the format in which weights are stored and passed between commands.

`params/` is an Orbax tree with `encoder` and optionally `projector`, `head` and `fc_norm`, or
`segmenter` and the running statistics of its BatchNorms, `segmenter_statistics`, `pool`, which
makes one vector of a picture as the network's authors do, and `target_statistics`, the means and
variances by which a distillation standardized its targets.
`model.json` holds the `ModelSpec`. It is written last, so a folder without it is incomplete.
`digests.json` holds the digests of both, by which damage is noticed when they are read; folders of
earlier versions have none.
"""

from collections.abc import Iterator
import contextlib
import json
import math
from typing import Any

from etils import epath
from flax import nnx
import jax

from fd_jax import checkpoint, digests, files, sharding
from fd_jax.errors import ConfigError, ModelFolderError, first_few
from fd_jax.models.spec import ModelSpec

DIGESTS = "digests.json"
PARTS = (
    "encoder",
    "projector",
    "head",
    "fc_norm",
    "segmenter",
    "segmenter_statistics",
    "pool",
    "target_statistics",
)
MOST_VALUES = 2**31  # in all arrays beside those that the description gives the shapes of


def save(
    folder: epath.PathLike, spec: ModelSpec, params: dict[str, Any], *, overwrite: bool = False
) -> None:
    """Writes a model folder. An existing folder stays untouched until the new one is complete.

    With several processes, all of them call this function.

    Args:
      folder: destination, local or in a bucket.
      spec: description of the encoder.
      params: {"encoder": ...} and optionally other PARTS, as numpy or (sharded) jax arrays.
      overwrite: whether to replace an existing folder.

    Raises:
      ModelFolderError: the folder exists and `overwrite` is not set, a part is unknown, or the
        parts have a pool and the description has none, or the reverse.
    """
    folder = epath.Path(folder)
    check_free(folder, overwrite=overwrite)
    _check_parts(spec, params)
    staging = folder.parent / f".{folder.name}.incomplete"
    is_writer = jax.process_index() == 0
    if is_writer:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if staging.exists():
            staging.rmtree()
        staging.mkdir()
    sharding.barrier("model_folder_staged")
    try:
        arrays = checkpoint.save_tree(staging / "params", params)
        if is_writer:
            _describe(staging, spec, arrays)
            _replace(folder, staging)
    except BaseException:
        # Remove the incomplete folder after an interrupt or a full disk. If writes in progress
        # create files in it again, it is hidden, and the next save removes it.
        if is_writer:
            with contextlib.suppress(OSError):
                staging.rmtree()
        raise
    sharding.barrier("model_folder_done")


def _check_parts(spec: ModelSpec, params: dict[str, Any]) -> None:
    if unknown := sorted(set(params) - set(PARTS)):
        raise ModelFolderError(f"a model folder has no part {unknown}; its parts are {PARTS}")
    if ("pool" in params) != (spec.pool is not None):
        raise ModelFolderError(
            f"the description has pool={spec.pool}, and the parts are {', '.join(sorted(params))}; "
            "a pool has to be in both, or in neither"
        )


def _describe(folder: epath.Path, spec: ModelSpec, arrays: dict[str, int]) -> None:
    description = spec.to_json()
    found = {"description": digests.of_text(description), "arrays": arrays}
    (folder / DIGESTS).write_text(json.dumps(found, indent=1) + "\n")
    (folder / "model.json").write_text(description)


def _replace(folder: epath.Path, staging: epath.Path) -> None:
    """Renames the old folder before deleting it, so a kill never leaves a half-deleted model."""
    backup = _backup(folder)
    if folder.exists():
        if backup.exists():
            backup.rmtree()
        folder.rename(backup)
    staging.rename(folder)
    if backup.exists():
        backup.rmtree()


def _backup(folder: epath.Path) -> epath.Path:
    return folder.parent / f".{folder.name}.replaced"


def check_free(folder: epath.PathLike, *, overwrite: bool) -> None:
    """Refuses a destination that exists; callers check this before they start any work.

    With `overwrite`, model folders and empty folders are accepted. Any other path is still
    refused, so that a typo cannot delete it.

    Raises:
      ModelFolderError: the destination cannot be used.
    """
    folder = epath.Path(folder)
    if not folder.exists():
        return
    if not overwrite:
        raise ModelFolderError(
            f"{folder} exists and is not overwritten; name another folder or allow overwriting"
        )
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "model.json").exists()):
        raise ModelFolderError(f"{folder} is not a model folder, so it is not overwritten")


def load_spec(folder: epath.PathLike) -> ModelSpec:
    """Reads only `model.json`.

    Raises:
      ModelFolderError: the folder is not a model folder, or model.json is damaged.
    """
    return _load_description(epath.Path(folder))[0]


def _load_description(folder: epath.Path) -> tuple[ModelSpec, dict[str, Any]]:
    """The spec, and the content of digests.json."""
    if not folder.exists():
        if (_backup(folder) / "model.json").exists():
            raise ModelFolderError(
                f"no model folder at {folder}: a command that replaced it was killed between two "
                f"renames. The old one is {_backup(folder)}: rename it, or run the command again"
            )
        raise ModelFolderError(
            f"no model folder at {folder}; `convert_checkpoints.py import` makes one from a "
            "weights file, and `train.py` writes one to <workdir>/model"
        )
    description = folder / "model.json"
    if (folder / "model" / "model.json").exists():
        raise ModelFolderError(f"{folder} is a workdir; its model folder is {folder / 'model'}")
    if not description.exists():
        raise ModelFolderError(
            f"{folder} holds no model.json: it is not a model folder, or it is incomplete because "
            "writing it was interrupted"
        )
    text = _text(description)
    expected = _digests(folder)
    if expected.get("description") not in (None, digests.of_text(text)):
        raise ModelFolderError(
            f"{description} is not what was written: it is damaged, or somebody has edited it. If "
            f"the change is meant, delete {folder / DIGESTS}, which also ends the check of weights"
        )
    return ModelSpec.from_json(text, where=str(description)), expected


def load(folder: epath.PathLike) -> tuple[ModelSpec, dict[str, Any]]:
    """Reads a model folder.

    Returns:
      The spec, and the parts as nested dicts of numpy arrays in their stored dtype.

    Raises:
      ModelFolderError: the folder does not exist or is damaged, or its weights do not match its
        description.
    """
    folder = epath.Path(folder)
    spec, expected = _load_description(folder)
    _check_against_spec(folder, spec)
    with _readable(folder):
        params = checkpoint.load_tree(folder / "params")
    damaged = digests.damaged(digests.of_own(params), expected.get("arrays", {}))
    if damaged:
        raise ModelFolderError(
            f"the weights in {folder} are damaged: {len(damaged)} arrays are not what was written "
            f"({first_few(damaged)}). Convert, copy or train the model again"
        )
    return spec, params


def digest_of_weights(folder: epath.PathLike) -> int:
    """A number by which the weights of one folder are told from those of another.

    The weights are only read if the folder is of an earlier version, which stored no digests.

    Raises:
      ModelFolderError: the folder does not exist or is damaged.
    """
    _, known = _load_description(epath.Path(folder))
    arrays = known.get("arrays") or digests.of_own(load(folder)[1])
    return digests.of_text(json.dumps(arrays, sort_keys=True))


def _digests(folder: epath.Path) -> dict[str, Any]:
    """The content of digests.json; {} for folders of earlier versions, which have none."""
    path = folder / DIGESTS
    if not path.exists():
        return {}
    text = _text(path)
    try:
        found = files.parse_object(text)
    except ValueError:
        found = {}
    arrays = found.get("arrays")
    if not isinstance(arrays, dict) or not all(type(value) is int for value in arrays.values()):
        raise ModelFolderError(
            f"{path} is damaged; delete it to read the model without a check of its weights"
        )
    return found


def _text(path: epath.Path) -> str:
    """The text of a small file; bytes that are no text become signs that no JSON has."""
    try:
        return files.read_bytes(path).decode(errors="replace")
    except ValueError as error:
        raise ModelFolderError(f"{path} {error}; convert, copy or train the model again") from error


def describe(
    folder: epath.PathLike,
) -> tuple[ModelSpec, dict[str, tuple[tuple[int, ...], str]]]:
    """Returns the spec, and shape and dtype of every array by "a/b" path; reads no values.

    Raises:
      ModelFolderError: the folder does not exist or is damaged.
    """
    folder = epath.Path(folder)
    spec = load_spec(folder)
    with _readable(folder):
        return spec, checkpoint.describe_tree(folder / "params")


@contextlib.contextmanager
def _readable(folder: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax and its storage raise many types of errors for damage
        raise ModelFolderError(f"the weights in {folder} cannot be read: {error}") from error


def _check_against_spec(folder: epath.Path, spec: ModelSpec) -> None:
    """Compares the headers of the arrays with the description; reads no values."""
    _refuse_special_files(folder)
    with _readable(folder):
        described_arrays = checkpoint.describe_tree(folder / "params")
    found = {path: shape for path, (shape, _) in described_arrays.items()}
    try:
        parts = described(spec)
    except ConfigError as error:
        raise ModelFolderError(f"{folder / 'model.json'} describes no network: {error}") from error
    _refuse_more(folder, {path: s for path, s in found.items() if _part(path) not in parts})
    expected = flat_shapes(parts)
    stored = {path: shape for path, shape in found.items() if _part(path) in {*parts, "pool"}}
    if expected == stored:
        return
    problems = [f"missing {path}" for path in sorted(expected.keys() - stored.keys())]
    problems += [f"unexpected {path}" for path in sorted(stored.keys() - expected.keys())]
    problems += [
        f"{path} has shape {stored[path]}, expected {expected[path]}"
        for path in sorted(expected.keys() & stored.keys())
        if expected[path] != stored[path]
    ]
    listing = "\n  ".join(problems)
    raise ModelFolderError(f"the weights in {folder} do not match its model.json:\n  {listing}")


def _part(path: str) -> str:
    return path.partition("/")[0]


def _refuse_more(folder: epath.Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuses arrays that no model folder has beside those that its description names."""
    if unknown := sorted({_part(path) for path in shapes} - set(PARTS)):
        raise ModelFolderError(f"{folder} has the parts {unknown}; a model folder has {PARTS}")
    values = sum(map(math.prod, shapes.values()))
    if values > MOST_VALUES:
        raise ModelFolderError(
            f"{folder} announces {values:,} numbers beside its encoder "
            f"({first_few(sorted(shapes))}); expected at most {MOST_VALUES:,}"
        )


def _refuse_special_files(folder: epath.Path) -> None:
    for parent, _, names in (folder / "params").walk():
        for name in names:
            try:
                files.check_regular(epath.Path(parent) / name)
            except ValueError as error:
                raise ModelFolderError(f"{epath.Path(parent) / name} {error}") from error


def described(spec: ModelSpec) -> dict[str, Any]:
    """The parts whose shapes follow from the spec: by name, nested dicts of shapes."""
    definition, encoder = spec.abstract()
    parts = {"encoder": encoder}
    if spec.classes:
        network: Any = nnx.merge(definition, encoder)
        parts |= spec.abstract_head(network.width)[1]
    if spec.segmenter is not None:
        _, parts["segmenter"], parts["segmenter_statistics"] = spec.abstract_segmenter()
    if spec.pool is not None:
        parts["pool"] = spec.abstract_pool()[1]
    return parts


def flat_shapes(tree: dict[str, Any], prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all arrays by their paths, such as "blocks/0/norm1/scale"."""
    shapes = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            shapes.update(flat_shapes(value, f"{path}/"))
        else:
            shapes[path] = tuple(value.shape)
    return shapes
