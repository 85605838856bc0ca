"""Attention over the images of a dataset: distances, similar heads, entropy and average maps.

The formulas are those of docs/reference.md#diagnostics. In the shapes, R is the number of rows that
attention takes place in (images, or the windows of a Swin), G of rows per image, A of heads, N of
tokens in a row, and P of patches among them.
"""

from collections.abc import Collection, Mapping
import dataclasses
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from fd_jax.diagnose.measurement import Figures, Sums
from fd_jax.errors import ConfigError, check_choice
from fd_jax.inference import Model
from fd_jax.models import sizes
from fd_jax.models.attention import relative_position_index
from fd_jax.models.attention_map import AttentionMap
from fd_jax.models.backbone import Backbone
from fd_jax.typing import Batch, PyTree

FIGURES = ("distance", "similarity", "entropy", "divergence", "maps", "shares")
PAIRED = ("similarity", "divergence")  # figures that compare the heads of a layer

Normalize = Literal["patches", "none"]
Compare = Literal["rows", "columns"]

# A map whose standard deviation is below this part of its mean is constant up to the rounding of
# float32 sums.
ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Layer:
    """What is the same for all images in the attention of one block.

    Attributes:
      heads: number of attention heads.
      cls: 1 with a class token, 0 without.
      prefix: number of tokens in front of the patches: class token and registers.
      grid: (H, W) of the patches in a row: those of the image, or of one window.
      distances: [G, N, N] float32, pixels between the patches of every pair of tokens; 0 where one
        of them is no patch. Row r of the weights has the distances of entry r % G.
    """

    heads: int
    cls: int
    prefix: int
    grid: tuple[int, int]
    distances: np.ndarray

    @classmethod
    def of(cls, attention: AttentionMap, distances: np.ndarray) -> "Layer":
        """The layer that has this attention, of any batch."""
        window = attention.window
        return cls(
            heads=attention.inputs.q.shape[2],
            cls=attention.cls,
            prefix=attention.prefix,
            grid=attention.grid if window is None else (window, window),
            distances=distances,
        )


class AttentionStatistics:
    """Statistics of a network's attention, per layer, in one pass over images.

    For a Swin, all of them are taken inside the windows, an image counts as the mean of its
    windows, and the maps are those of one window.

    Args:
      subject: name of the network.
      model: the network.
      figures: which of FIGURES are computed; nothing else is.
      normalize: "patches" divides each query's weights of patches by their sum before distances are
        averaged, "none" leaves them as they are. The share that class token and registers take away
        is reported beside the distances in both cases.
      compare: "rows" compares how the heads of a layer spread each query over the keys, "columns"
        how they spread each key over the queries (DeepViT).
      dtype: of the network's activations; weights and statistics are float32.

    Raises:
      ConfigError: an unknown figure or setting, or heads are compared in a network that has a layer
        with one head.
    """

    subject: str
    params: PyTree

    def __init__(
        self,
        subject: str,
        model: Model,
        figures: Collection[str],
        *,
        normalize: Normalize = "patches",
        compare: Compare = "rows",
        dtype: DTypeLike = jnp.float32,
    ):
        for name in figures:
            check_choice("figures", name, FIGURES)
        check_choice("normalize", normalize, Normalize.__args__)
        check_choice("compare", compare, Compare.__args__)
        self.subject = subject
        self.params = model.params["encoder"]
        self._spec = model.spec
        self._wanted = frozenset(figures)
        self._normalize = normalize
        self._compare = compare
        self._dtype = dtype
        # Of all implementations, this one has the weights as an array, so that the statistics share
        # it with the network.
        self._definition, _ = model.spec.abstract(dtype=dtype, attention="xla")
        self._layers = self._describe()
        self._check_heads()

    def sums(self, params: PyTree, batch: Batch) -> Sums:
        """Sums over images, named "figure/layer"; see `Measurement.sums`.

        An image's rows, heads, queries and, in maps, keys are kept apart, so that means over them
        are taken in float64.
        """

        def measure(number: int, attention: AttentionMap) -> dict[str, jax.Array]:
            return self._statistics(self._layers[number], attention, batch["weight"])

        network, images = self._network(params, batch["image"])
        return {
            f"{name}/{number}": value
            for number, layer in enumerate(network.measure_attention(images, measure))
            for name, value in layer.items()
        }

    def figures(self, sums: Mapping[str, np.ndarray], images: int) -> Figures:
        """The results by figure, a list over layers each; see `Measurement.figures`.

        Returns:
          "distance" and "dropped" [layer][head], "similarity" [layer], "entropy" [layer][head],
          "divergence" [layer], "maps" [layer][query][key] and, with a class token, "class_row"
          [layer][key] and "class_column" [layer][query]; "shares" {"offset": [layer], "key":
          [layer]}.
        """

        def means(name: str) -> list[np.ndarray]:
            """Each layer's sums, averaged over images and their rows."""
            layers = range(len(self._layers))
            return [np.mean(sums[f"{name}/{number}"], axis=0) / images for number in layers]

        results: Figures = {}
        if "distance" in self._wanted:
            for name in ("distance", "dropped"):
                results[name] = [
                    mean[:, layer.prefix :].mean(axis=-1).tolist()
                    for layer, mean in zip(self._layers, means(name), strict=True)
                ]
        for name in ("similarity", "entropy", "divergence"):
            if name in self._wanted:
                results[name] = [mean.mean(axis=-1).tolist() for mean in means(name)]
        if "maps" in self._wanted:
            results |= self._pictures(means("maps"))
        if "shares" in self._wanted:
            results["shares"] = self._shares(means("maps"))
        return results

    def _describe(self) -> list[Layer]:
        """The layers of the network, without running it."""

        def maps(params: PyTree, images: jax.Array) -> list[AttentionMap]:
            network, pixels = self._network(params, images)
            return network.attention_maps(pixels, range(network.depth))

        arch = self._spec.arch
        images = jax.ShapeDtypeStruct((1, *sizes.sides(arch["image_size"]), 3), jnp.uint8)
        tables: dict[tuple, np.ndarray] = {}  # one for all layers that are alike
        layers = []
        for attention in jax.eval_shape(maps, self.params, images):
            alike = (attention.grid, attention.window, attention.shift)
            if alike not in tables:
                patch = sizes.token_side(arch["image_size"], arch["patch_size"], attention.grid)
                tables[alike] = distance_table(attention, patch=patch)
            layers.append(Layer.of(attention, tables[alike]))
        return layers

    def _check_heads(self) -> None:
        asked = [name for name in PAIRED if name in self._wanted]
        single = [number for number, layer in enumerate(self._layers) if layer.heads == 1]
        if asked and single:
            raise ConfigError(
                f"{', '.join(asked)} of {self.subject!r}: heads are compared in pairs, but its "
                f"layers {single} have one head each; leave {' and '.join(asked)} out of --figures"
            )

    def _network(self, params: PyTree, images: jax.Array) -> tuple[Backbone, jax.Array]:
        """The network, and what it sees of uint8 images."""
        return nnx.merge(self._definition, params), self._spec.normalize(images, self._dtype)

    def _statistics(
        self, layer: Layer, attention: AttentionMap, weight: jax.Array
    ) -> dict[str, jax.Array]:
        """The sums of one layer over the images of a batch. weight: [B]."""
        weights = attention.weights()
        rows: dict[str, jax.Array] = {}
        if "similarity" in self._wanted:
            rows["similarity"] = similarity(weights, axis=-1 if self._compare == "rows" else -2)
        if self._wanted & {"entropy", "divergence"}:
            logarithms = jax.nn.log_softmax(attention.logits(), axis=-1)
            if "entropy" in self._wanted:
                rows["entropy"] = -jnp.sum(weights * logarithms, axis=-1)
            if "divergence" in self._wanted:
                rows["divergence"] = divergence(weights, logarithms)
        if self._wanted & {"maps", "shares"}:
            # Heads first, so that the weights of images multiply the smaller array.
            rows["maps"] = jnp.sum(weights, axis=1) / layer.heads
        sums = {name: sum_over_images(value, weight) for name, value in rows.items()}
        if "distance" in self._wanted:
            normalize = self._normalize == "patches"
            sums |= distance(weights, weight, layer.distances, layer.prefix, normalize=normalize)
        return sums

    def _pictures(self, maps: list[np.ndarray]) -> Figures:
        """Maps of patches, and the rows and columns of the class token where there is one."""
        pairs = list(zip(self._layers, maps, strict=True))
        found = {"maps": [_patches(layer, mean).tolist() for layer, mean in pairs]}
        if all(layer.cls for layer in self._layers):
            found["class_row"] = [mean[0, layer.prefix :].tolist() for layer, mean in pairs]
            found["class_column"] = [mean[layer.prefix :, 0].tolist() for layer, mean in pairs]
        return found

    def _shares(self, maps: list[np.ndarray]) -> Figures:
        shares = [
            explained_shares(_patches(layer, mean), layer.grid)
            for layer, mean in zip(self._layers, maps, strict=True)
        ]
        return {name: [share[name] for share in shares] for name in ("offset", "key")}


def distance_table(attention: AttentionMap, *, patch: float) -> np.ndarray:
    """Pixels between the centres of the patches of every pair of tokens.

    Args:
      attention: of any batch; only its places are read.
      patch: side of a patch in pixels.

    Returns:
      [G, N, N] float32; 0 where one of the tokens is the class token or a register.
    """
    rows, columns = np.moveaxis(np.asarray(attention.positions(), np.float64), -1, 0)  # [G, P]
    across = [x[:, :, None] - x[:, None, :] for x in (rows, columns)]
    front = (attention.prefix, 0)
    return np.pad(patch * np.hypot(*across), ((0, 0), front, front)).astype(np.float32)


def distance(
    weights: jax.Array,
    weight: jax.Array,
    distances: np.ndarray,
    prefix: int,
    *,
    normalize: bool,
) -> dict[str, jax.Array]:
    """Distance from a query to what it attends to (docs/reference.md#attention-distance).

    Args:
      weights: [R, A, N, N] float32.
      weight: [B], of the images.
      distances: [G, N, N] pixels, 0 where one of the tokens is no patch.
      prefix: number of tokens in front of the patches.
      normalize: whether the weights of patches are divided by their sum. A query that has no weight
        on patches at all counts with a distance of 0.

    Returns:
      "distance" in pixels, and "dropped", the share of weight that class token and registers have;
      both [G, A, N], sums over images for each query. Only those of patches have a meaning.
    """
    is_patch = np.arange(weights.shape[-1]) >= prefix
    kinds = np.stack([is_patch, ~is_patch], axis=-1).astype(np.float32)
    # A matmul, since a sum over some of the keys makes XLA copy them. The share of patches is no
    # difference to 1, which would have few correct digits where patches have little weight.
    shares = jnp.einsum("raqk,kc->raqc", weights, kinds, precision="highest")
    kept, dropped = shares[..., 0], shares[..., 1]
    scale = jnp.repeat(weight, len(weights) // len(weight))[:, None, None]
    scale = scale / _nonzero(kept) if normalize else scale
    # The average of distances is the distance of the average map, so that the table of distances
    # does not have to be multiplied with every image's weights.
    maps = weights * scale[..., None]
    maps = jnp.sum(maps.reshape(len(weight), -1, *maps.shape[1:]), axis=0)  # [G, A, N, N]
    return {
        "distance": jnp.sum(maps * distances[:, None], axis=-1),
        "dropped": sum_over_images(dropped, weight),
    }


def similarity(weights: jax.Array, *, axis: int) -> jax.Array:
    """Mean cosine between the heads of a layer (docs/reference.md#head-similarity).

    The cosines of all pairs of unit vectors u_a sum to (|sum_a u_a|^2 - sum_a |u_a|^2) / 2, which
    needs no array of pairs. The cosine with a vector of zeros, which only a column can be, is 0.

    Args:
      weights: [R, A, N, N] float32, A > 1.
      axis: -1 to compare the keys' weights of each query, -2 the queries' weights of each key; all
        tokens count.

    Returns:
      [R, N], means over pairs of heads for each query (or key).
    """
    if axis == -2:
        # The squares of a column can be too small for float32; a row's cannot, as it sums to 1.
        weights = weights / _nonzero(jnp.max(weights, axis=axis, keepdims=True))
    squares = jnp.sum(weights * weights, axis=axis, keepdims=True)
    inverse = 1 / jnp.sqrt(_nonzero(squares))
    together = jnp.sum(weights * inverse, axis=1)  # [R, N, N]
    alone = jnp.sum(jnp.squeeze(squares * inverse * inverse, axis), axis=1)
    heads = weights.shape[1]
    return (jnp.sum(together * together, axis=axis) - alone) / (heads * (heads - 1))


def divergence(weights: jax.Array, logarithms: jax.Array) -> jax.Array:
    """Mean Kullback-Leibler divergence between the heads of a layer, in nats.

    The divergences of all ordered pairs, sum_ab KL(p_a || p_b), are A sum_a <p_a, log p_a - m> with
    m the mean of log p over heads, which needs no array of pairs and is exact for equal heads.

    Args:
      weights: [R, A, N, N] float32, A > 1; all tokens count as queries and keys.
      logarithms: those of the weights.

    Returns:
      [R, N], means over ordered pairs of heads for each query.
    """
    apart = logarithms - jnp.mean(logarithms, axis=1, keepdims=True)
    return jnp.sum(jnp.sum(weights * apart, axis=-1), axis=1) / (weights.shape[1] - 1)


def sum_over_images(values: jax.Array, weight: jax.Array) -> jax.Array:
    """Weighted sum over images; their rows stay apart. [R, ...], [B] -> [G, ...]."""
    images = values.reshape(len(weight), -1, *values.shape[1:])
    return jnp.sum(images * weight.reshape(-1, *(1,) * (images.ndim - 1)), axis=0)


def explained_shares(average: np.ndarray, grid: tuple[int, int]) -> dict[str, float]:
    """How much of a map is diagonals, and how much is columns (docs/reference.md#attention-maps).

    Both are shares of variance: sum (g - mean)^2 / sum (M - mean)^2 over all entries of the map M,
    where g is the mean of the entries of a group. A group has the entries with the same offset from
    key to query, (r_i - r_j, c_i - c_j), or those with the same key. The shares overlap, so that
    their sum can exceed 1. Of a constant map there is nothing to explain, and both are 0.

    Args:
      average: [P, P], query by key.
      grid: (H, W) with H * W = P.

    Returns:
      "offset" and "key", from 0 to 1.
    """
    average = np.asarray(average, np.float64)
    keys = np.broadcast_to(np.arange(average.shape[1]), average.shape)
    offsets = relative_position_index(grid, cls_token=False)
    return {"offset": _share(average, offsets), "key": _share(average, keys)}


def _share(x: np.ndarray, group: np.ndarray) -> float:
    values, group = x.ravel(), group.ravel()
    variance = values.var()
    if variance <= (ROUNDING * values.mean()) ** 2:
        return 0.0
    means = np.bincount(group, values) / np.bincount(group)
    return float(means[group].var() / variance)


def _patches(layer: Layer, tokens: np.ndarray) -> np.ndarray:
    """The part of a map of all tokens that lies between patches. [N, N] -> [P, P]."""
    return tokens[layer.prefix :, layer.prefix :]


def _nonzero(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1)
