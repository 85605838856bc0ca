"""Networks in use: a model folder as an object that takes pictures.

`Model` computes features, vectors, attention, classes and segmentations of pictures, on whatever
device jax has. Training does not use it: the tasks build their networks from the same descriptions.
"""

from collections.abc import Sequence
import functools
import os
from typing import Any

from etils import epath
from flax import nnx
import jax
import numpy as np

from fd_jax import model_folder
from fd_jax.errors import ConfigError, DataError, ModelFolderError
from fd_jax.models import cropping, sizes
from fd_jax.models.attention_map import AttentionMap
from fd_jax.models.features import FeatureMap
from fd_jax.models.segmenter import maps_of, sliding
from fd_jax.models.sizes import ImageSize
from fd_jax.models.spec import ModelSpec

WINDOWS = 4  # windows of a picture that `Model.segment` computes together


class Model:
    """A loaded network, called on normalised images; `preprocess` makes these from pictures.

        model = fd_jax.load_model("runs/quickstart/model")
        images = model.preprocess(pictures, resize=True)  # uint8 [h, w, 3] each, of any sizes
        features = model(images)  # features.patches [B, H*W, D], features.cls_token [B, D]
        colours = fd_jax.pca_picture(features)  # [B, H, W, 3]
        last = model.attention_maps(images, blocks=[-1])[0].weights()  # [B, heads, N, N]
        vectors = model.pooled(images)  # [B, E] of a network with a pool, such as CLIP's
        names = model.classify(pictures)  # of a network with a classifier head: see there
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
        self._classes = jax.jit(functools.partial(class_logits, spec))
        self._segments = jax.jit(functools.partial(segmenter_logits, spec))

    def __repr__(self) -> str:
        size, arch = sizes.describe(self.spec.arch["image_size"]), self.spec.arch
        encoder = self.params["encoder"]
        network: Any = nnx.merge(self._definition, encoder)
        values = sum(leaf.size for leaf in jax.tree.leaves(encoder))
        parts = ", ".join(name for name in model_folder.PARTS if name in self.params)
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
          resize: whether to bring the images to the network's size first, see `resize`.

        Returns:
          float32 [B, H, W, 3].

        Raises:
          DataError: the images have another dtype or shape, which would give other features
            without a sign of it.
        """
        batch: Any = self.resize(images) if resize else images
        check_images(batch)
        return self.spec.normalize(batch)

    def resize(self, pictures: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """Brings pictures to the network's size as evaluation does, for `preprocess` or a server.

        The short side is resized to 256 / 224 of the size, and the centre is cropped.

        Args:
          pictures: uint8 [h, w, 3] RGB each, of any sizes.

        Returns:
          uint8 [B, H, W, 3].

        Raises:
          DataError: a picture has another dtype or shape, or there is none.
        """
        check_pictures(pictures)
        size = self.spec.arch["image_size"]
        return np.stack([cropping.for_evaluation(np.asarray(each), size) for each in pictures])

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

    def classify(
        self, pictures: Sequence[np.ndarray] | np.ndarray, *, top: int = 5
    ) -> list[list[tuple[str, float]]]:
        """The likeliest classes of pictures, which evaluation's resizing brings to the network.

            model = fd_jax.load_model("runs/mine_finetuned/model")
            model.classify([picture])[0][0]  # ("cat", 0.915)

        Args:
          pictures: uint8 [h, w, 3] RGB each, of any sizes.
          top: how many classes of each picture; at most all of them.

        Returns:
          For each picture, pairs of a class's name (its number where names are not known) and its
          probability by the softmax, the likeliest first.

        Raises:
          ModelFolderError: the folder has no classifier head.
          DataError: a picture has another dtype or shape, or there is none.
        """
        self._check_head()
        logits = self.logits(self.preprocess(pictures, resize=True))
        probabilities = np.asarray(jax.nn.softmax(logits))
        names = self.class_names or list(map(str, range(self.spec.classes)))
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
        return [
            [(names[k], float(row[k])) for k in best]
            for best, row in zip(order, probabilities, strict=True)
        ]

    def logits(self, images: jax.Array) -> jax.Array:
        """The classifier's logits, in the order of `class_names`.

        Args:
          images: normalised images [B, H, W, 3], float32.

        Returns:
          [B, K] float32.

        Raises:
          ModelFolderError: the folder has no classifier head.
        """
        self._check_head()
        return self._classes(self.params, images)

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
        check_pictures(pictures)
        return [self._labels(np.asarray(picture)) for picture in pictures]

    def _check_head(self) -> None:
        if not self.spec.classes:
            raise ModelFolderError(
                f"{self.spec.source!r} has no classifier head: only features can be had from it. "
                "finetune.py with configs/own_finetune.py or configs/own_probe.py trains one on it"
            )

    def _labels(self, picture: np.ndarray) -> np.ndarray:
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
        return np.asarray(self._segments(self.params, self.preprocess(windows)))

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


def class_logits(spec: ModelSpec, params: dict[str, Any], images: jax.Array) -> jax.Array:
    """The logits of a model folder's classifier head, as a function for jit.

    Args:
      spec: of the folder; it has classes.
      params: the parts of the folder.
      images: normalised images [B, H, W, 3], of the size of the network.

    Returns:
      [B, K] float32.
    """
    encoder: Any = nnx.merge(spec.abstract()[0], params["encoder"])
    stored = {name: params[name] for name in ("head", "fc_norm") if name in params}
    head: Any = nnx.merge(spec.abstract_head(encoder.width)[0], stored)
    return head(encoder(images))


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


def check_pictures(pictures: np.ndarray | Sequence[np.ndarray]) -> None:
    """Refuses everything but a list of pictures uint8 [h, w, 3], or an array of several.

    Raises:
      DataError: there is no picture, or one is no such array; the message says how to get there.
    """
    expected = "expected a list of uint8 arrays [h, w, 3]"
    if isinstance(pictures, str) or any(isinstance(p, str | os.PathLike) for p in pictures):
        raise DataError(
            f"a picture is given by its name, {expected}: open it with "
            "np.asarray(PIL.Image.open(name).convert('RGB'))"
        )
    if isinstance(pictures, np.ndarray) and pictures.ndim == 3:
        raise DataError(f"this is one picture, {list(pictures.shape)}; {expected}: [picture]")
    if not len(pictures):
        raise DataError(f"there is no picture: {expected}")
    for picture in pictures:
        check_images(np.asarray(picture)[None])


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
    spec, params = model_folder.load(folder)
    if image_size is not None:
        spec, encoder = spec.resized(params["encoder"], image_size)
        params = {**params, "encoder": encoder}
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, jax.numpy.float32), params)
    return Model(spec, params)
