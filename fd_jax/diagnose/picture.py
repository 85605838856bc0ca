"""What a network sees in one picture: its final features as colours, and where it looks.

Attention on class token and registers is left out of the maps, without dividing by the rest, so
that the sum of a map is the share of attention that goes to patches.

The formulas are in docs/reference.md#representations.
"""

from collections.abc import Collection, Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from fd_jax.diagnose.measurement import Figures
from fd_jax.errors import ConfigError
from fd_jax.inference import Model
from fd_jax.models import sizes
from fd_jax.models.attention_map import AttentionMap
from fd_jax.show import pictures
from fd_jax.typing import PyTree

FIGURES = ("pca", "rollout", "heads")
COLOURS = 3  # red, green and blue


def figures(
    model: Model, pixels: np.ndarray, figures: Collection[str], *, layer: int = -1
) -> Figures:
    """The figures of one picture, ready for JSON.

    "pca" shows the first three principal components of the patch tokens after the final norm, among
    the patches of this picture, as red, green and blue, see `pictures.principal_colours`. The sign
    of a component has no meaning, nor have colours in common between two networks.

    "rollout" is attention rollout (Abnar and Zuidema 2020): the product over blocks of
    (mean of A over heads + identity) / 2. "heads" is A of one block, a map per head. Both are seen
    from the class token, or averaged over the patches as queries where there is none. Registers
    take part in the product, and are removed at its end.

    "rollout" is undefined for a Swin, whose attention stays within windows and whose patches merge.
    "heads" of a Swin exist for blocks in which one window holds the whole grid. Both are undefined
    for a ConvNeXt, which has no attention.

    Args:
      model: the network, of any family.
      pixels: uint8 [H, W, 3], of the network's input size.
      figures: names in FIGURES; others are ignored.
      layer: number of the block of "heads"; negative numbers count from the last one.

    Returns:
      "pca" [H][W][3] in [0, 1], "rollout" [H][W] and "heads" [head][H][W], on the grid of patches,
      those that were asked for; and "picture" with "layer", counted from 0, and "query", which is
      "class" or "mean".

    Raises:
      ConfigError: the picture has another size, there is no such layer, or a figure is undefined.
      DataError: the features of the patches vary in fewer than three directions, for "pca".
    """
    _check_pixels(model, pixels)
    encoder = _Encoder(model)
    layer = _block(layer, encoder.network.depth)
    _check_defined(encoder, figures, layer)
    images = model.preprocess(pixels[None])
    query = "class" if encoder.network.cls else "mean"
    result: Figures = {"picture": {"layer": layer, "query": query}}
    if "pca" in figures:
        result["pca"] = pictures.pca_picture(model(images))[0].tolist()
    if "rollout" in figures:
        result["rollout"] = encoder.rollout(images).tolist()
    if "heads" in figures:
        result["heads"] = encoder.heads(images, layer).tolist()
    return result


class _Encoder:
    """The attention of a network's blocks.

    Attributes:
      network: the network, with shapes in the place of arrays.
      layout: the maps of all blocks for one image, likewise; [] for a network without attention.
    """

    def __init__(self, model: Model):
        self._definition, shapes = model.spec.abstract()
        self._params = model.params["encoder"]
        shape = (1, *sizes.sides(model.spec.arch["image_size"]), 3)
        image = jax.ShapeDtypeStruct(shape, jnp.float32)
        self.network: Any = nnx.merge(self._definition, shapes)
        blocks = range(self.network.depth if model.spec.has_attention else 0)
        self.layout = jax.eval_shape(
            lambda params, images: self._maps(params, images, blocks), self._params, image
        )

    def rollout(self, images: jax.Array) -> np.ndarray:
        """Attention rollout of one image. [1, H, W, 3] -> [H, W]."""

        @jax.jit
        def rolled(params, images):
            maps = self._maps(params, images, range(len(self.layout)))
            share = jnp.asarray(_query(maps[-1]))
            # The product of matrices is only needed for one query: a row times one matrix after the
            # other. The rows of each sum to 1, so that there is nothing to renormalise.
            for attention in reversed(maps):
                looked = jnp.einsum("q,hqk->hk", share, attention.weights()[0], precision="highest")
                share = (share + jnp.mean(looked, axis=0)) / 2
            return share[maps[-1].prefix :]

        return np.asarray(rolled(self._params, images)).reshape(self.layout[-1].grid)

    def heads(self, images: jax.Array, layer: int) -> np.ndarray:
        """Attention of one block and image. [1, H, W, 3] -> [A, H, W]."""

        @jax.jit
        def looked(params, images):
            (attention,) = self._maps(params, images, [layer])
            query, weights = _query(attention), attention.weights()[0]
            rows = jnp.einsum("q,hqk->hk", query, weights, precision="highest")
            return rows[:, attention.prefix :]

        return np.asarray(looked(self._params, images)).reshape(-1, *self.layout[layer].grid)

    def _maps(self, params: PyTree, images: jax.Array, blocks: Sequence[int]) -> list[AttentionMap]:
        if not blocks:
            return []
        network: Any = nnx.merge(self._definition, params)
        return network.attention_maps(images, blocks)


def _query(attention: AttentionMap) -> np.ndarray:
    """Weights [N] of the queries that a map is averaged over: the class token, or all patches."""
    height, width = attention.grid
    patches = height * width
    query = np.zeros(attention.prefix + patches, np.float32)
    if attention.cls:
        query[0] = 1
    else:
        query[attention.prefix :] = 1 / patches
    return query


def _block(layer: int, depth: int) -> int:
    """The number of a block, counted from 0."""
    if not -depth <= layer < depth:
        raise ConfigError(
            f"layer={layer}: the network has {depth} blocks; expected 0 to {depth - 1}, or "
            f"-{depth} to -1, counted from the last one"
        )
    return layer % depth


def _check_pixels(model: Model, pixels: np.ndarray) -> None:
    expected = (*sizes.sides(model.spec.arch["image_size"]), 3)
    if pixels.dtype != np.uint8 or pixels.shape != expected:
        raise ConfigError(
            f"a picture of shape {pixels.shape} and dtype {pixels.dtype}: the network takes uint8 "
            f"{expected}; resize the picture, or the network"
        )


def _check_defined(encoder: _Encoder, figures: Collection[str], layer: int) -> None:
    """Refuses colours of too few patches, and maps of attention that stays within windows."""
    height, width = encoder.network.grid
    layout = encoder.layout
    if "pca" in figures and height * width <= COLOURS:
        raise ConfigError(
            f"pca: the grid of patches, {height} x {width}, has fewer than three principal "
            "components; use a larger image size, which gives four patches or more"
        )
    undefined = [name for name in ("rollout", "heads") if name in figures]
    if undefined and not layout:
        raise ConfigError(
            f"{' and '.join(undefined)}: undefined for a network without attention, such as a "
            "ConvNeXt; ask for pca"
        )
    if "rollout" in figures and layout[0].window is not None:
        raise ConfigError(
            "rollout is undefined for a Swin: its attention stays within windows, and its patches "
            "merge between stages; leave rollout out for this network"
        )
    windows = layout[layer].values.shape[0] if "heads" in figures else 1
    if windows > 1:
        raise ConfigError(
            f"heads of layer {layer}: the grid {layout[layer].grid} of this Swin is divided into "
            f"{windows} windows, so that no query sees the whole picture; use a layer whose grid "
            "is a single window, as the last layer's often is"
        )
