"""A network and its classifier head, as a fine-tuned or probed model folder holds them."""

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from fd_jax import model_folder
from fd_jax.errors import ModelFolderError
from fd_jax.models.sizes import ImageSize
from fd_jax.models.spec import ModelSpec
from fd_jax.typing import PyTree


class ImageClassifier:
    """An encoder and its head in evaluation: from uint8 images to logits.

    The BatchNorm of a linear probe is folded into the head of its model folder, so that there are
    no running statistics here.

    Attributes:
      spec: description of the encoder and head.
      params: {"encoder", "head"} and, where the pooling has a norm, "fc_norm"; numpy, float32.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        image_size: ImageSize | None = None,
        dtype: DTypeLike = jnp.float32,
    ):
        """Loads a model folder; its weights are read only if it has a head.

        Args:
          folder: the model folder.
          image_size: side of square images in pixels, or (height, width), to which position tables
            are resized; None to keep the stored size.
          dtype: of the encoder's matmuls and activations; the head computes in float32.

        Raises:
          ModelFolderError: the folder has no classifier head, is missing or is damaged.
          ConfigError: the network cannot have this image size.
        """
        _check_head(folder, model_folder.load_spec(folder))
        spec, parts = model_folder.load(folder)
        encoder = parts["encoder"]
        if image_size is not None:
            spec, encoder = spec.resized(encoder, image_size)
        self.spec = spec
        self._encoder, shapes = spec.abstract(dtype=dtype)
        width = nnx.merge(self._encoder, shapes).width
        self._head, shapes = spec.abstract_head(width)
        stored = {name: parts[name] for name in shapes}
        self.params = jax.tree.map(
            lambda leaf: np.asarray(leaf, np.float32), {"encoder": encoder, **stored}
        )

    def logits(self, params: PyTree, images: jax.Array) -> jax.Array:
        """Logits of images that are not normalised yet.

        Args:
          params: arrays in the form of the attribute of the same name.
          images: uint8 [B, H, W, 3].

        Returns:
          [B, K] float32.
        """
        encoder = nnx.merge(self._encoder, params["encoder"])
        head = nnx.merge(self._head, {k: v for k, v in params.items() if k != "encoder"})
        return head(encoder(self.spec.normalize(images, encoder.dtype)))


def _check_head(folder: epath.PathLike, spec: ModelSpec) -> None:
    if not spec.classes:
        raise ModelFolderError(
            f"{folder} has no classifier head, so that it has no loss and no accuracy; fine-tune "
            "or probe it with finetune.py and name the model folder of that run"
        )
