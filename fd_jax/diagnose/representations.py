"""The features after every block: how many dimensions they fill, and how alike two networks' are.

Both come from second moments of patch tokens, which are summed over images as they stream by. They
are exact over the whole dataset, not averages over batches.

Sums are taken of x - s instead of x, where the shift s is the same for all images, so that float32
keeps its digits where a channel's mean is far larger than its deviation, as it often is in vision
transformers. Covariances do not depend on s, except for rounding. After each block s is the mean
patch token of a picture in the mean colour, that is, of zeros as the network's input.

The formulas are in docs/reference.md#representations.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from fd_jax.diagnose.measurement import Figures, Sums
from fd_jax.errors import ConfigError, DataError
from fd_jax.inference import Model
from fd_jax.models import sizes
from fd_jax.models.features import FeatureMap
from fd_jax.typing import Batch, PyTree

# The share of a second moment that rounding in float32 can make up. A variance below it is none.
ROUNDING = 1e-6
SMALLEST_NORM = 1e-12  # of a token, in a cosine


class Rank:
    """Effective rank of the patch tokens after each block: the figure "rank".

    It is the exponential of the Shannon entropy of the eigenvalues of the tokens' covariance,
    divided by their sum: r for tokens that vary alike in r directions, 1 for tokens on a line. That
    is the effective rank of Roy and Vetterli (2007) of the covariance matrix. RankMe takes that of
    the matrix of features, without centring it. Its shares are those of the square roots of
    eigenvalues, so that its numbers are larger; they are not computed here, because square roots
    would also raise the rounding of the smallest eigenvalues to a visible share.

    Tokens are those of all images and places, centred over both, without class token and
    registers, and without the final norm.

    Args:
      subject: the network's name.
      model: the network, of any family.
    """

    def __init__(self, subject: str, model: Model):
        self.subject = subject
        self._blocks = _Blocks(model)
        self.params = self._blocks.with_shift()

    def sums(self, params: PyTree, batch: Batch) -> Sums:
        """See `Measurement`: "first_<block>" [D] and "second_<block>" [D, D] for every block."""
        sums = {}
        tokens = self._blocks.patches(params, batch["image"])
        for block, (x, shift) in enumerate(zip(tokens, params["shift"], strict=True)):
            x = x - shift
            sums[f"first_{block}"] = _first_moment(x, batch["weight"])
            sums[f"second_{block}"] = _second_moment(x, x, batch["weight"])
        return sums

    def figures(self, sums: Mapping[str, np.ndarray], images: int) -> Figures:
        """See `Measurement`.

        Returns:
          "rank": a number for every block.

        Raises:
          DataError: the tokens after a block do not vary.
        """
        ranks = []
        for block, (height, width) in enumerate(self._blocks.grids):
            covariance = _own_covariance(
                sums[f"second_{block}"],
                sums[f"first_{block}"],
                images * height * width,
                where=f"{self.subject}, block {block}",
            )
            ranks.append(effective_rank(covariance))
        return {"rank": ranks}


class Comparison:
    """How alike two networks' features are after each block: the figures "cka" and "cosine".

    "cka" is linear centred kernel alignment (Kornblith et al. 2019),

        |cov(a, b)|^2 / (|cov(a, a)| |cov(b, b)|)   with Frobenius norms,

    which is 1 for features that are equal up to rotation and scale, and does not ask for equal
    widths. Its rows are the patch tokens of all images where both networks have the same grid after
    every block, and the mean patch token of each image otherwise ("rows" of the result says which).
    With fewer rows than channels it is close to 1 for any two networks, which matters for mean
    tokens: take many more images than channels.

    "cosine" is the mean over images and patches of the cosine between the tokens of the same place,
    which are not centred. It exists where widths and grids are equal after every block; the result
    has no "cosine" otherwise.

    Block i is compared with block i, so that both networks need the same number of blocks. Class
    tokens and registers are left out, and the final norm is not applied.

    The sums of "cka" take D_a^2 + D_b^2 + D_a D_b numbers per block: 85 MB in float32 for two
    ViT-B, 302 MB for two ViT-L, and twice as much in float64 on the host.

    Args:
      subject: the networks' names.
      model_a: the first network, of any family.
      model_b: the second network.
      figures: names of figures; those of others are ignored.

    Raises:
      ConfigError: the networks differ in input size or number of blocks, or only "cosine" is asked
        for and does not exist.
    """

    def __init__(
        self,
        subject: tuple[str, str],
        model_a: Model,
        model_b: Model,
        figures: Collection[str],
    ):
        self.subject = subject
        self._a, self._b = _Blocks(model_a), _Blocks(model_b)
        _check_counterparts(subject, self._a, self._b)
        self._same_grids = self._a.grids == self._b.grids
        same_tokens = self._same_grids and self._a.widths == self._b.widths
        self._cka = "cka" in figures
        self.has_cosine = "cosine" in figures and same_tokens
        if "cosine" in figures and not (self.has_cosine or self._cka):
            raise ConfigError(
                f"cosine of {subject[0]} and {subject[1]}: their tokens differ in number or width "
                f"(grids {self._a.grids[-1]} and {self._b.grids[-1]}, widths {self._a.widths[-1]} "
                f"and {self._b.widths[-1]} after the last block); use cka, which does not need them"
            )
        self.params = {"a": self._a.with_shift(), "b": self._b.with_shift()}

    def sums(self, params: PyTree, batch: Batch) -> Sums:
        """See `Measurement`.

        Returns:
          For every block, "cosine_<block>" [], "first_a_<block>" [D_a], "first_b_<block>" [D_b],
          "aa_<block>" [D_a, D_a], "ab_<block>" and "bb_<block>"; those that the figures need.
        """
        sums, weight = {}, batch["weight"]
        tokens_a = self._a.patches(params["a"], batch["image"])
        tokens_b = self._b.patches(params["b"], batch["image"])
        for block, (a, b) in enumerate(zip(tokens_a, tokens_b, strict=True)):
            if self.has_cosine:
                sums[f"cosine_{block}"] = jnp.sum(weight * _mean_cosine(a, b))
            if self._cka:
                a = self._rows(a) - params["a"]["shift"][block]
                b = self._rows(b) - params["b"]["shift"][block]
                sums[f"first_a_{block}"] = _first_moment(a, weight)
                sums[f"first_b_{block}"] = _first_moment(b, weight)
                sums[f"aa_{block}"] = _second_moment(a, a, weight)
                sums[f"ab_{block}"] = _second_moment(a, b, weight)
                sums[f"bb_{block}"] = _second_moment(b, b, weight)
        return sums

    def figures(self, sums: Mapping[str, np.ndarray], images: int) -> Figures:
        """See `Measurement`.

        Returns:
          "cka" and "cosine": a number for every block, where they were asked for and exist; and
          "rows" of "cka": "patches" or "images".

        Raises:
          DataError: the features after a block do not vary, such as mean tokens of one image.
        """
        blocks = range(len(self._a.grids))
        figures: Figures = {}
        if self._cka:
            figures["cka"] = [self._cka_of(sums, block, images) for block in blocks]
            figures["rows"] = "patches" if self._same_grids else "images"
        if self.has_cosine:
            figures["cosine"] = [float(sums[f"cosine_{block}"]) / images for block in blocks]
        return figures

    def _rows(self, tokens: jax.Array) -> jax.Array:
        """The features that are compared. [B, P, D] -> [B, P, D] or [B, 1, D]."""
        return tokens if self._same_grids else jnp.mean(tokens, axis=1, keepdims=True)

    def _cka_of(self, sums: Mapping[str, np.ndarray], block: int, images: int) -> float:
        height, width = self._a.grids[block] if self._same_grids else (1, 1)
        rows = images * height * width
        first_a, first_b = sums[f"first_a_{block}"], sums[f"first_b_{block}"]
        where_a, where_b = (f"{name}, block {block}" for name in self.subject)
        return linear_cka(
            _own_covariance(sums[f"aa_{block}"], first_a, rows, where=where_a),
            _own_covariance(sums[f"bb_{block}"], first_b, rows, where=where_b),
            _covariance(sums[f"ab_{block}"], first_a, first_b, rows),
        )


def effective_rank(covariance: np.ndarray) -> float:
    """Exponential of the entropy of the eigenvalues, see `Rank`. [D, D] float64, not all zero."""
    eigenvalues = np.linalg.eigvalsh(covariance)
    shares = eigenvalues[eigenvalues > 0]  # rounding makes zeros slightly negative
    shares = shares / shares.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def linear_cka(aa: np.ndarray, bb: np.ndarray, ab: np.ndarray) -> float:
    """Linear CKA from covariances, see `Comparison`.

    Args:
      aa: [D_a, D_a] covariance of the first network's features, float64.
      bb: [D_b, D_b] covariance of the second network's.
      ab: [D_a, D_b] covariance of the one with the other.
    """
    return float(np.sum(ab**2) / (np.linalg.norm(aa) * np.linalg.norm(bb)))


class _Blocks:
    """The patch tokens after every block of a network.

    Attributes:
      size: (height, width) of its images in pixels.
      grids: (H, W) of the patches after every block.
      widths: number of channels after every block.
    """

    def __init__(self, model: Model):
        self._spec = model.spec
        self._definition, _ = model.spec.abstract()
        self._encoder = model.params["encoder"]
        self.size = sizes.sides(model.spec.arch["image_size"])
        image = jax.ShapeDtypeStruct((1, *self.size, 3), jnp.float32)
        layout = jax.eval_shape(self._features, self._encoder, image)
        self.grids = [features.grid for features in layout]
        self.widths = [features.tokens.shape[-1] for features in layout]

    def with_shift(self) -> dict[str, Any]:
        """Parameters for `patches`, with a "shift" [D] for every block, see above."""
        mean_colour = jnp.zeros((1, *self.size, 3), jnp.float32)
        features = jax.jit(self._features)(self._encoder, mean_colour)
        shift = [jnp.mean(after.patches, axis=(0, 1)) for after in features]
        return {"encoder": self._encoder, "shift": shift}

    def patches(self, params: dict[str, Any], images: jax.Array) -> list[jax.Array]:
        """Patch tokens after every block. uint8 [B, H, W, 3] -> float32 [B, P, D] each."""
        features = self._features(params["encoder"], self._spec.normalize(images))
        return [after.patches for after in features]

    def _features(self, encoder: PyTree, images: jax.Array) -> Sequence[FeatureMap]:
        network: Any = nnx.merge(self._definition, encoder)
        return network.intermediates(images, range(network.depth))


def _first_moment(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Sum over the rows of images of weight 1. [B, P, D] -> [D]."""
    return jnp.sum(x * weight[:, None, None], axis=(0, 1))


def _second_moment(x: jax.Array, y: jax.Array, weight: jax.Array) -> jax.Array:
    """Sum of outer products over the rows of images of weight 1. [B, P, D], [B, P, E] -> [D, E]."""
    # "highest": by default, accelerators multiply float32 with the digits of bfloat16 or TF32.
    return jnp.einsum("bpd,bpe->de", x * weight[:, None, None], y, precision="highest")


def _mean_cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Cosine of tokens in the same place, averaged over places. 2 x [B, P, D] -> [B]."""
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.mean(jnp.sum(x * y, axis=-1) / jnp.maximum(norms, SMALLEST_NORM), axis=1)


def _covariance(
    second: np.ndarray, first_x: np.ndarray, first_y: np.ndarray, rows: int
) -> np.ndarray:
    """Covariance of x and y [D, E] from sums over rows."""
    return second / rows - np.outer(first_x, first_y) / rows**2


def _own_covariance(second: np.ndarray, first: np.ndarray, rows: int, *, where: str) -> np.ndarray:
    """Covariance of one network's features [D, D]; `where` names them in errors."""
    covariance = _covariance(second, first, first, rows)
    if np.trace(covariance) <= ROUNDING * np.trace(second) / rows:
        raise DataError(
            f"{where}: the features do not vary over the images ({rows} rows), so that neither "
            "their rank nor their similarity is defined; use more images, and different ones"
        )
    return covariance


def _check_counterparts(names: tuple[str, str], a: _Blocks, b: _Blocks) -> None:
    """Refuses networks that cannot see the same images or whose blocks do not correspond."""
    if a.size != b.size:
        raise ConfigError(
            f"{names[0]} takes images of {sizes.describe(a.size)} pixels and {names[1]} of "
            f"{sizes.describe(b.size)}; name one image size for both"
        )
    if len(a.grids) != len(b.grids):
        raise ConfigError(
            f"{names[0]} has {len(a.grids)} blocks and {names[1]} has {len(b.grids)}, so that no "
            "block has a counterpart; leave out cka and cosine, or compare networks of equal depth"
        )
