"""Model folders: the format in which weights are stored and passed between commands.

`params/` is an Orbax tree with `encoder` and optionally `projector`, `head` and `fc_norm`, or
`segmenter` and the running statistics of its BatchNorms, `segmenter_statistics`, `pool`, which
makes one vector of a picture as the network's authors do, and `target_statistics`, the means and
variances by which a distillation standardized its targets.
`model.json` holds the `ModelSpec`. It is written last, so a folder without it is incomplete.
`digests.json` holds the digests of both, by which damage is noticed when they are read; folders of
earlier versions have none.
"""

from collections.abc import Iterator, Sequence
import contextlib
import functools
import json
import math
from typing import Any

from etils import epath
from flax import nnx
import jax
import numpy as np

from fd_jax import checkpoint, digests, files, sharding
from fd_jax.errors import ConfigError, DataError, ModelFolderError, first_few
from fd_jax.models import cropping, sizes
from fd_jax.models.attention_map import AttentionMap
from fd_jax.models.features import FeatureMap
from fd_jax.models.segmenter import maps_of, sliding
from fd_jax.models.sizes import ImageSize
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
WINDOWS = 4  # windows of a picture that `Model.segment` computes together


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


class Model:
    """A loaded network, called on normalised images; `preprocess` makes these from pictures.

        model = fd_jax.load_model("runs/quickstart/model")
        images = model.preprocess(pictures, resize=True)  # uint8 [h, w, 3] each, of any sizes
        features = model(images)  # features.patches [B, H*W, D], features.cls_token [B, D]
        colours = fd_jax.pca_picture(features)  # [B, H, W, 3]
        last = model.attention_maps(images, blocks=[-1])[0].weights()  # [B, heads, N, N]
        vectors = model.pooled(images)  # [B, E] of a network with a pool, such as CLIP's
        labels = model.segment(pictures)  # of a network with a segmenter

    Args:
      spec: description of the encoder.
      params: parts of the model folder, float32.

    Attributes:
      class_names: name of each output of the classifier head; None where they are not known.
    """

    def __init__(self, spec: ModelSpec, params: dict[str, Any]):
        self.spec = spec
        self.params = params
        self.class_names = spec.class_names
        self._definition, _ = spec.abstract()
        self._forward = jax.jit(self._apply)
        self._pooled = jax.jit(functools.partial(pooled_vectors, spec))
        self._logits = jax.jit(functools.partial(segmenter_logits, spec))

    def __repr__(self) -> str:
        size, arch = sizes.describe(self.spec.arch["image_size"]), self.spec.arch
        encoder = self.params["encoder"]
        network: Any = nnx.merge(self._definition, encoder)
        values = sum(leaf.size for leaf in jax.tree.leaves(encoder))
        parts = ", ".join(name for name in PARTS if name in self.params)
        extra = f", {self.spec.classes} classes" if self.spec.classes else ""
        if self.spec.pool is not None:
            extra += f", pooled by {self.spec.pool['kind']}"
        return (
            f"<Model {self.spec.source!r}: {self.spec.family}, {values / 1e6:.3g} M parameters, "
            f"{size} px, {network.grid[0]} x {network.grid[1]} patches of width {network.width}, "
            f"{'class token' if arch.get('cls_token') else 'no class token'}{extra}; "
            f"parts: {parts}>"
        )

    def __call__(self, images: jax.Array) -> FeatureMap:
        """Returns the features after the final norm, class token first.

        Args:
          images: normalised images [B, H, W, 3], float32.
        """
        return self._forward(self.params["encoder"], images)

    def pooled(self, images: jax.Array) -> jax.Array:
        """One vector for each image, as the authors of the network make it of the features.

            model = fd_jax.load_model("models/siglip2")
            vectors = model.pooled(model.preprocess(pictures, resize=True))  # [B, E]
            vectors /= jnp.linalg.norm(vectors, axis=-1, keepdims=True)
            similarities = vectors @ vectors.T  # [B, B] cosines

        That of CLIP and SigLIP is what their text towers are compared with.

        Args:
          images: normalised images [B, H, W, 3], float32.

        Returns:
          [B, E] float32, not normalised.

        Raises:
          ModelFolderError: the folder has no pool.
        """
        if self.spec.pool is None:
            raise ModelFolderError(
                f"{self.spec.source!r} has no pool: its folder holds no way to one vector of a "
                "picture. Take features = model(images) and then features.cls_token, where there "
                "is one, or features.patches.mean(axis=1)"
            )
        return self._pooled(self.params, images)

    def preprocess(
        self, images: np.ndarray | Sequence[np.ndarray], *, resize: bool = False
    ) -> jax.Array:
        """Normalises images with the mean and std of the network.

        Args:
          images: uint8 [B, H, W, 3] RGB. With `resize`, a list of pictures uint8 [h, w, 3] of any
            sizes also serves.
          resize: whether to bring the images to the network's size as evaluation does: the short
            side is resized to 256 / 224 of it, and the centre is cropped.

        Returns:
          float32 [B, H, W, 3].

        Raises:
          DataError: the images have another dtype or shape, which would give other features
            without a sign of it.
        """
        batch: Any = images
        if resize:
            batch = self._resized([np.asarray(image) for image in images])
        check_images(batch)
        return self.spec.normalize(batch)

    def attention_maps(
        self, images: jax.Array, blocks: Sequence[int] | None = None
    ) -> list[AttentionMap]:
        """The attention of blocks, from which weights and logits are derived on request.

        Args:
          images: normalised images [B, H, W, 3], float32.
          blocks: numbers of the blocks; negative ones count from the last. None for all.

        Raises:
          ConfigError: there is no such block, or no attention: a ConvNeXt has none.
        """
        network: Any = nnx.merge(self._definition, self.params["encoder"])
        numbers = range(network.depth) if blocks is None else blocks
        if wrong := [n for n in numbers if not -network.depth <= n < network.depth]:
            raise ConfigError(
                f"blocks={list(numbers)}: the network has {network.depth} blocks, so there is no "
                f"block {wrong[0]}"
            )
        return network.attention_maps(images, [n % network.depth for n in numbers])

    def segment(
        self, pictures: Sequence[np.ndarray] | np.ndarray, *, logits: bool = False
    ) -> list[np.ndarray] | np.ndarray:
        """The class of every pixel, or the logits from which it follows.

        The short side of a picture is scaled to the network's input size, and the picture is cut
        into windows of this size, whose logits are put together as `models.segmenter.sliding` says.
        Windows are two thirds of their side apart, as in the published tests.

        Args:
          pictures: uint8 [h, w, 3] RGB each, of any sizes. For logits, one array [B, S, S, 3] at
            the network's input size.
          logits: whether to return the logits.

        Returns:
          Labels int32 [h, w] for each picture. With `logits`, float32 [B, h, w, K] at the finest
          level of the segmenter.

        Raises:
          ModelFolderError: the folder has no segmenter, or windows that are not square.
          DataError: a picture has another dtype or shape.
        """
        if self.spec.segmenter is None:
            raise ModelFolderError(
                f"{self.spec.source!r} has no segmenter: only features can be had from it. "
                "finetune.py with a config such as configs/segment_clip_vit_b16.py trains one on "
                "it, and `convert_checkpoints.py import` reads those of published networks"
            )
        if logits:
            return self._window_logits(self._check_windows(np.asarray(pictures)))
        return [self._labels(np.asarray(picture)) for picture in pictures]

    def _resized(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        for picture in pictures:
            check_images(picture[None])
        size = self.spec.arch["image_size"]
        return np.stack([cropping.for_evaluation(picture, size) for picture in pictures])

    def _labels(self, picture: np.ndarray) -> np.ndarray:
        check_images(picture[None])
        height, width = sizes.sides(self.spec.arch["image_size"])
        if height != width:
            raise ModelFolderError(
                f"pictures are cut into squares, but this network reads {height} x {width} pixels; "
                "load it with image_size=N"
            )
        cut = sliding.Sliding(side=height, stride=2 * height // 3, scale=(4 * height, height))
        views = cut.views(picture)
        return cut.labels(views, [self._in_parts(views[0].windows)], picture.shape[:2])

    def _in_parts(self, windows: np.ndarray) -> np.ndarray:
        """Logits of any number of windows, WINDOWS at a time, so that one program serves all."""
        padding = -len(windows) % WINDOWS
        padded = np.pad(windows, ((0, padding), (0, 0), (0, 0), (0, 0)))
        parts = [self._window_logits(part) for part in np.split(padded, len(padded) // WINDOWS)]
        return np.concatenate(parts)[: len(windows)]

    def _window_logits(self, windows: np.ndarray) -> np.ndarray:
        return np.asarray(self._logits(self.params, self.preprocess(windows)))

    def _check_windows(self, windows: np.ndarray) -> np.ndarray:
        check_images(windows)
        size = sizes.sides(self.spec.arch["image_size"])
        if windows.shape[1:3] != size:
            raise DataError(
                f"images are {windows.shape[1]} x {windows.shape[2]} pixels, and the network reads "
                f"{size[0]} x {size[1]}; resize them, load the model with another image_size, or "
                "ask for labels, which are made for pictures of any size"
            )
        return windows

    def _apply(self, params, images):
        return nnx.merge(self._definition, params)(images)


def pooled_vectors(spec: ModelSpec, params: dict[str, Any], images: jax.Array) -> jax.Array:
    """The vectors of a model folder's pool, as a function for jit.

    Args:
      spec: of the folder; it has a pool.
      params: the parts of the folder.
      images: normalised images [B, H, W, 3], of the size of the network.

    Returns:
      [B, E] float32.
    """
    encoder: Any = nnx.merge(spec.abstract()[0], params["encoder"])
    pool: Any = nnx.merge(spec.abstract_pool()[0], params["pool"])
    return pool(encoder(images))


def segmenter_logits(spec: ModelSpec, params: dict[str, Any], images: jax.Array) -> jax.Array:
    """The logits of a model folder's segmenter, as a function for jit.

    Args:
      spec: of the folder; it has a segmenter.
      params: the parts of the folder.
      images: normalised images [B, H, W, 3], of any size that the network can have.

    Returns:
      [B, h, w, K] float32 at the finest level of the segmenter.
    """
    assert spec.segmenter is not None
    sized, weights = spec.resized(params["encoder"], images.shape[1:3])
    encoder: Any = nnx.merge(sized.abstract()[0], weights)
    segment: Any = nnx.merge(spec.abstract_segmenter()[0], params["segmenter"])
    maps = maps_of(encoder, images, spec.segmenter["blocks"])
    return segment(maps, params["segmenter_statistics"]).logits


def check_images(images: np.ndarray) -> None:
    """Refuses everything but uint8 [B, H, W, 3].

    Raises:
      DataError: the images have another dtype or shape; the message says how to convert them.
    """
    found = f"{getattr(images, 'dtype', type(images).__name__)} {list(np.shape(images))}"
    if getattr(images, "dtype", None) != np.uint8:
        raise DataError(
            f"images are {found}; expected uint8 [B, H, W, 3] with RGB values from 0 to 255. "
            "Convert floats from 0 to 1 by np.round(255 * images).astype(np.uint8), and 16-bit "
            "images by (images >> 8).astype(np.uint8)"
        )
    if np.ndim(images) != 4 or np.shape(images)[-1] != 3:
        raise DataError(
            f"images are {found}; expected uint8 [B, H, W, 3], channels last. Use image[None] for "
            "a single image, and np.moveaxis(images, 1, -1) if channels come first"
        )


def load_model(folder: epath.PathLike, *, image_size: ImageSize | None = None) -> Model:
    """Opens a model folder for use in Python.

    Args:
      folder: the model folder.
      image_size: side of square images in pixels, or (height, width), to which position tables are
        resized; None to keep the stored size.

    Raises:
      ModelFolderError: the folder does not exist or is damaged.
    """
    spec, params = load(folder)
    if image_size is not None:
        spec, encoder = spec.resized(params["encoder"], image_size)
        params = {**params, "encoder": encoder}
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, jax.numpy.float32), params)
    return Model(spec, params)


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
    parts = {"encoder": spec.abstract()[1]}
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
