"""Loss and accuracy of a classifier along random directions in the space of its weights.

Directions are normalised filter by filter (docs/reference.md#landscape, Li et al. 2018), so that
networks whose weights differ in scale can be compared. One table says what a filter of each kind of
parameter is; a parameter that does not match exactly one row of it is an error.
"""

from collections.abc import Callable, Mapping
import re
from typing import Any, Literal
import zlib

from etils import epath
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from fd_jax.data.class_names import Classes, Match, numbering
from fd_jax.data.datasets import Dataset, classes_of
from fd_jax.data.feed import check_labelled
from fd_jax.diagnose.classifier import ImageClassifier
from fd_jax.diagnose.measurement import Figures, Sums
from fd_jax.errors import ConfigError, DataError, check_choice, check_positive
from fd_jax.evaluation import classification
from fd_jax.models.sizes import ImageSize
from fd_jax.typing import Batch, PyTree

# What happens to parameters that have more than one dimension in PyTorch but are not the weights of
# a layer: class token, registers, positions, position biases, logit scales and the response
# normalisation of a ConvNeXt V2. "zeroed" leaves them
# as they are, and "literal" perturbs them as the code of Li et al. would
# (docs/reference.md#diagnostic-variants).
Tables = Literal["zeroed", "literal"]

EPS = 1e-10  # added to the norm of a filter's noise, as in the code of Li et al.

# Path pattern -> role, and a letter for each axis: a filter extends over the axes "i", and those
# with an "o" count filters. In PyTorch's layout the latter are the first axis. A "weight" is always
# perturbed, a "table" only if tables are "literal", and a "vector", which has one dimension in
# PyTorch too, never.
FILTERS: tuple[tuple[str, str, str], ...] = (
    (r"(^|/)(patch_embed|dwconv|conv)/kernel$", "weight", "iiio"),
    (r"attn/qkv/kernel$", "weight", "ioo"),
    (r"(attn/proj|mlp/(fc[12]|gate)|downsample/reduction)/kernel$", "weight", "io"),
    (r"(^head|/(lift|widen))/kernel$", "weight", "io"),
    (r"(^|/)(cls_token|register_tokens|pos_embed)$", "table", "iii"),
    (r"rel_pos_bias/table$", "table", "oi"),
    # SwinV2's network of offsets, which takes the place of such a table.
    (r"rel_pos_bias/fc[12]/kernel$", "table", "io"),
    (r"attn/logit_scale$", "table", "o"),  # [A, 1, 1] in PyTorch
    (r"/grn/(scale|bias)$", "table", "i"),  # [1, 1, 1, D] in PyTorch
    (r"(^|(?<!grn)/)(bias|[qkv]_bias|scale|gamma(_[12])?)$", "vector", "o"),
    (r"norm/(mean|var)$", "vector", "o"),  # a ResNet's running statistics
)


class Landscape:
    """Cross entropy and top-1 of a classifier at theta + a delta, for directions delta and steps a.

    The loss has neither label smoothing nor weight decay, and images are not augmented. Every
    image is evaluated at all points of all directions, one point at a time, so that the devices
    hold one forward pass and three copies of the weights. A direction depends on the seed, on its
    number and on the names and values of the weights, and on nothing else.

    Attributes:
      subject: name of the network.
      params: its weights, see `ImageClassifier`.
      positions: the steps a, [points] float64; on the devices they are float32.
    """

    def __init__(
        self,
        subject: str,
        folder: epath.PathLike,
        *,
        image_size: ImageSize | None = None,
        seed: int = 0,
        directions: int = 5,
        points: int = 51,
        radius: float = 1.0,
        tables: Tables = "zeroed",
        dtype: DTypeLike = jnp.float32,
    ):
        """Loads the classifier.

        Args:
          subject: name of the network, for results.
          folder: model folder with a classifier head.
          image_size: as in `ImageClassifier`.
          seed: of the directions.
          directions: number of independent directions.
          points: number of positions on each, odd, so that the network itself is the middle one.
          radius: positions run from -radius to radius, in equal steps.
          tables: what happens to tokens, positions and logit scales, see `Tables`.
          dtype: of the encoder's matmuls and activations; weights are perturbed in float32.

        Raises:
          ConfigError: a setting is impossible.
          ModelFolderError: the folder has no classifier head, is missing or is damaged.
        """
        check_positive("directions", directions)
        check_choice("tables", tables, Tables.__args__)
        self.positions = symmetric_steps(points, radius)
        self.subject = subject
        self.seed, self.directions, self.radius = seed, directions, radius
        self.tables: Tables = tables
        self._classifier = ImageClassifier(folder, image_size=image_size, dtype=dtype)
        self.params = self._classifier.params
        self._numbers: tuple[int, ...] | None = None  # by label of the dataset
        jax.eval_shape(self._direction, self.params, 0)  # a parameter without a row fails here

    def check_dataset(self, dataset: Dataset, *, match: Match = "name") -> None:
        """Refuses a dataset whose labels do not fit the head, and numbers them as the head does.

        Args:
          dataset: labelled images.
          match: see `class_names.numbering`.

        Raises:
          DataError: it has no labels, hides them, or has classes that the head does not know.
        """
        check_labelled(dataset)
        spec = self._classifier.spec
        head = Classes(f"the head of {self.subject}", spec.classes, spec.class_names)
        self._numbers = numbering(classes_of(dataset), head, match=match)

    def _label(self, label: jax.Array) -> jax.Array:
        """The labels of a batch as the head numbers them. [B] int32 -> [B] int32"""
        if self._numbers is None:
            return label
        numbers = jnp.asarray(self._numbers, jnp.int32)
        return numbers.at[jnp.where(label < 0, len(numbers), label)].get(mode="fill", fill_value=-1)

    def sums(self, params: PyTree, batch: Batch) -> Sums:
        """Summed loss and number of correct images at each point of each direction.

        Args:
          params: see `Measurement`.
          batch: see `Measurement`; all images have labels.

        Returns:
          "loss" and "correct", [directions, points] float32, and "unlabelled", the number of images
          whose label is not a class.
        """
        label, weight = self._label(batch["label"]), batch["weight"]

        def evaluate(params):
            logits = self._classifier.logits(params, batch["image"])
            metrics = classification.accuracy_metrics(logits, label, weight)
            return {"loss": metrics["loss"][0], "correct": metrics["top1"][0]}

        def along(number):
            return curve(evaluate, params, self._direction(params, number), self.positions)

        is_class = (label >= 0) & (label < self._classifier.spec.classes)
        curves = jax.lax.map(along, jnp.arange(self.directions))
        return {**curves, "unlabelled": jnp.sum(weight * ~is_class)}

    def figures(self, sums: Mapping[str, np.ndarray], images: int) -> Figures:
        """Mean loss and top-1 accuracy, [direction][point], with positions and settings.

        Raises:
          DataError: some images have no label.
        """
        if sums["unlabelled"]:
            raise DataError(
                f"{sums['unlabelled']:.0f} of {images} images have no label of the classes that "
                f"{self.subject} knows; use a split in which all images are labelled"
            )
        return {
            "landscape": {
                "position": self.positions.tolist(),
                "loss": (sums["loss"] / images).tolist(),
                "accuracy": (sums["correct"] / images).tolist(),
                "tables": self.tables,
                "seed": self.seed,
                "radius": self.radius,
                "augmentation": "none (evaluation transform)",
                "weight_decay": "not part of the loss",
            }
        }

    def _direction(self, params: PyTree, number: int | jax.Array) -> PyTree:
        # The kind of key is spelled out, because it is otherwise a setting of jax.
        key = jax.random.fold_in(jax.random.key(self.seed, impl="threefry2x32"), number)
        return random_direction(params, key, tables=self.tables)


def symmetric_steps(points: int, radius: float) -> np.ndarray:
    """Equal steps from -radius to radius; the middle one is exactly 0. -> [points] float64.

    Raises:
      ConfigError: there is no middle, or the radius is not positive.
    """
    if points < 3 or points % 2 == 0:
        raise ConfigError(
            f"points={points}: expected an odd number from 3 up, so that the network itself is the "
            "middle point"
        )
    if not 0 < radius < np.inf:
        raise ConfigError(f"radius={radius}: expected a number above 0")
    steps = np.arange(points) - points // 2
    return radius * steps / (points // 2)


def curve(
    function: Callable[[PyTree], Any], params: PyTree, direction: PyTree, positions: np.ndarray
) -> Any:
    """The values of function(params + a * direction) at the positions a, one after another.

    Args:
      function: function of a tree like `params`; may return a tree of arrays.
      params: where a = 0 is.
      direction: tree like `params`.
      positions: [points].

    Returns:
      What `function` returns, with an axis of points in front.
    """

    def at(position):
        return function(jax.tree.map(lambda p, d: p + position * d, params, direction))

    return jax.lax.map(at, jnp.asarray(positions, jnp.float32))


def random_direction(params: PyTree, key: jax.Array, *, tables: Tables) -> PyTree:
    """A direction of N(0, 1) draws, each filter of which is scaled to the norm of the weights'.

    Args:
      params: weights by path, as in `ImageClassifier.params`, float32.
      key: of the direction; a parameter's draws depend on it and on the parameter's path alone.
      tables: see `Tables`.

    Returns:
      A tree like `params`; 0 where nothing is perturbed.

    Raises:
      ValueError: a parameter does not match exactly one row of FILTERS.
    """
    perturbed = {"weight", "table"} if tables == "literal" else {"weight"}

    def delta(path, theta):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        role, axes = _filters(name, theta.shape)
        if role not in perturbed:
            return jnp.zeros_like(theta)
        own_key = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
        noise = jax.random.normal(own_key, theta.shape, jnp.float32)
        return normalize_filters(noise, theta, axes)

    return jax.tree_util.tree_map_with_path(delta, params)


def normalize_filters(noise: jax.Array, theta: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Scales each filter of the noise by |theta_f| / (|noise_f| + 1e-10).

    Args:
      noise: any shape.
      theta: weights of the same shape.
      axes: the axes over which a filter extends; () if each number is a filter.
    """

    def norm(x):
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))

    return noise * (norm(theta) / (norm(noise) + EPS))


def _filters(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Role of a parameter, and the axes over which its filters extend."""
    rows = [row for row in FILTERS if re.search(row[0], name)]
    if len(rows) != 1:
        raise ValueError(
            f"parameter {name} {shape} matches {len(rows)} rows of FILTERS; expected exactly one"
        )
    _, role, letters = rows[0]
    if len(letters) != len(shape):
        raise ValueError(f"parameter {name} has shape {shape}, but its row has {len(letters)} axes")
    return role, tuple(axis for axis, letter in enumerate(letters) if letter == "i")
