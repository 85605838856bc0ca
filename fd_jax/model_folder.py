"""The model folder: the one currency for weights.

`params/` is an Orbax tree with `encoder` and, where there are any, `projector`, `head` and
`fc_norm`; `model.json` is the `ModelSpec`, written last, so that a folder without it is no model.
"""

from collections.abc import Iterator
import contextlib
from typing import Any

from etils import epath
from flax import nnx
import jax
import numpy as np

from fd_jax import checkpoint, sharding
from fd_jax.errors import ModelFolderError
from fd_jax.models.features import FeatureMap
from fd_jax.models.sizes import ImageSize
from fd_jax.models.spec import ModelSpec

PARTS = ("encoder", "projector", "head", "fc_norm")


def save(
    folder: epath.PathLike, spec: ModelSpec, params: dict[str, Any], *, overwrite: bool = False
) -> None:
    """Writes a model folder; what is there stays untouched until the new one is complete.

    Args:
      folder: where to; local or a bucket.
      spec: of the encoder.
      params: {"encoder": ...} and optional parts named in PARTS; numpy or (sharded) jax arrays.
        With several processes all of them call this.
      overwrite: whether a folder that exists is replaced.

    Raises:
      ModelFolderError: the folder exists and `overwrite` is not set, or a part is unknown.
    """
    folder = epath.Path(folder)
    check_free(folder, overwrite=overwrite)
    if unknown := sorted(set(params) - set(PARTS)):
        raise ModelFolderError(f"a model folder has no part {unknown}; expected some of {PARTS}")
    staging = folder.parent / f".{folder.name}.incomplete"
    first = jax.process_index() == 0
    if first:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if staging.exists():
            staging.rmtree()
        staging.mkdir()
    sharding.barrier("model_folder_staged")
    try:
        checkpoint.save_tree(staging / "params", params)
        if first:
            (staging / "model.json").write_text(spec.to_json())
            _replace(folder, staging)
    except BaseException:
        # An interrupt or a full disk leaves no litter; what writes under way still add to it is
        # hidden and goes with the next save.
        if first:
            with contextlib.suppress(OSError):
                staging.rmtree()
        raise
    sharding.barrier("model_folder_done")


def _replace(folder: epath.Path, staging: epath.Path) -> None:
    """The old one steps aside whole: a kill here never leaves a half-deleted model."""
    replaced = _replaced(folder)
    if folder.exists():
        if replaced.exists():
            replaced.rmtree()
        folder.rename(replaced)
    staging.rename(folder)
    if replaced.exists():
        replaced.rmtree()


def _replaced(folder: epath.Path) -> epath.Path:
    return folder.parent / f".{folder.name}.replaced"


def check_free(folder: epath.PathLike, *, overwrite: bool) -> None:
    """Refuses a destination that exists, before any work is done for it.

    Overwriting replaces model folders and empty ones: a slip of the pen deletes nothing else.
    """
    folder = epath.Path(folder)
    if not folder.exists():
        return
    if not overwrite:
        raise ModelFolderError(
            f"{folder} exists and is not overwritten; name another folder or ask for overwriting"
        )
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "model.json").exists()):
        raise ModelFolderError(f"{folder} is no model folder, so it is not overwritten")


def load_spec(folder: epath.PathLike) -> ModelSpec:
    """Reads `model.json` only."""
    folder = epath.Path(folder)
    if not folder.exists():
        if (_replaced(folder) / "model.json").exists():
            raise ModelFolderError(
                f"no model folder at {folder}: a command that replaced it was killed between two "
                f"renames. The old one is {_replaced(folder)}: rename it, or run the command again"
            )
        raise ModelFolderError(
            f"no model folder at {folder}; `convert_checkpoints.py import` makes one from a "
            "weights file, `train.py` leaves one in <workdir>/model"
        )
    description = folder / "model.json"
    if (folder / "model" / "model.json").exists():
        raise ModelFolderError(f"{folder} is a run; its model folder is {folder / 'model'}")
    if not description.exists():
        raise ModelFolderError(
            f"{folder} holds no model.json: it is not a model folder, or its writing was cut off"
        )
    return ModelSpec.from_json(description.read_text(), where=str(description))


def load(folder: epath.PathLike) -> tuple[ModelSpec, dict[str, Any]]:
    """Reads a model folder.

    Returns:
      The spec, and the parts as nested dicts of numpy arrays in their stored dtype.

    Raises:
      ModelFolderError: there is none, it is damaged, or weights and description disagree.
    """
    folder = epath.Path(folder)
    spec = load_spec(folder)
    with _readable(folder):
        params = checkpoint.load_tree(folder / "params")
    _check_against_spec(folder, spec, params)
    return spec, params


def describe(
    folder: epath.PathLike,
) -> tuple[ModelSpec, dict[str, tuple[tuple[int, ...], str]]]:
    """The spec, and shape and dtype of every array by "a/b" path; reads no values."""
    folder = epath.Path(folder)
    spec = load_spec(folder)
    with _readable(folder):
        return spec, checkpoint.describe_tree(folder / "params")


@contextlib.contextmanager
def _readable(folder: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax and its storage raise many kinds for damaged files
        raise ModelFolderError(f"the weights in {folder} cannot be read: {error}") from error


class Model:
    """A loaded network: call it on normalised images, or `preprocess` uint8 ones first."""

    def __init__(self, spec: ModelSpec, params: dict[str, Any]):
        self.spec = spec
        self.params = params
        self._definition, _ = spec.abstract()
        self._forward = jax.jit(self._apply)

    def __call__(self, images: jax.Array) -> FeatureMap:
        """Feature map after the final norm, class token first. images: [B, H, W, 3] float32."""
        return self._forward(self.params["encoder"], images)

    def preprocess(self, images: np.ndarray) -> jax.Array:
        """Normalises with the network's own statistics. uint8 [B, H, W, 3] -> float32."""
        return self.spec.normalize(images)

    def _apply(self, params, images):
        return nnx.merge(self._definition, params)(images)


def load_model(folder: epath.PathLike, *, image_size: ImageSize | None = None) -> Model:
    """Opens a model folder for use in Python.

    Args:
      folder: with `model.json`.
      image_size: side of a square in pixels, or (height, width), to resize the network for; None
        keeps its own size.
    """
    spec, params = load(folder)
    if image_size is not None:
        spec, encoder = spec.resized(params["encoder"], image_size)
        params = {**params, "encoder": encoder}
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, jax.numpy.float32), params)
    return Model(spec, params)


def _check_against_spec(folder: epath.Path, spec: ModelSpec, params: dict[str, Any]) -> None:
    expected = flat_shapes(spec.abstract()[1])
    found = flat_shapes(params.get("encoder", {}))
    if expected == found:
        return
    problems = [f"missing {path}" for path in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {path}" for path in sorted(found.keys() - expected.keys())]
    problems += [
        f"{path} has shape {found[path]}, expected {expected[path]}"
        for path in sorted(expected.keys() & found.keys())
        if expected[path] != found[path]
    ]
    listing = "\n  ".join(problems)
    raise ModelFolderError(f"the weights in {folder} do not fit its model.json:\n  {listing}")


def flat_shapes(tree: dict[str, Any], prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Shape of every array by its path, as "blocks/0/norm1/scale"."""
    shapes = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            shapes.update(flat_shapes(value, f"{path}/"))
        else:
            shapes[path] = tuple(value.shape)
    return shapes
