"""Plots of results as PNG files; matplotlib is imported only when one is drawn."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath
import jax.numpy as jnp
import numpy as np

from fd_jax.errors import DataError
from fd_jax.models.features import FeatureMap
from fd_jax.show import html

MOST_NAMES = 40  # classes whose names fit on the axes of a confusion matrix


def pyplot() -> Any:
    """Imports matplotlib.pyplot with a backend that needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: epath.Path) -> None:
    """Writes a figure as PNG and closes it."""
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot().close(figure)


def losses(rows: Iterable[Mapping[str, float]], path: epath.Path) -> None:
    """Plots training and held-out loss over the steps, from the rows of a run's metrics."""
    figure, axes = pyplot().subplots(figsize=(6, 3.5), layout="constrained")
    for name, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if "eval" in name else "")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    save(figure, path)


def curves(points: Mapping[str, Sequence[tuple[int, float]]], path: epath.Path) -> None:
    """Plots figures over the steps, (step, value) by name: one panel each, as scales differ."""
    figure, axes = pyplot().subplots(
        1, len(points), figsize=(3.2 * len(points), 2.6), layout="constrained", squeeze=False
    )
    for axis, (name, values) in zip(axes[0], points.items(), strict=True):
        axis.plot(*zip(*values, strict=True), marker=".")
        axis.set(xlabel="step", title=name)
    save(figure, path)


def maps(
    images: np.ndarray,
    patches: Mapping[str, np.ndarray],
    path: epath.Path,
    *,
    grid: tuple[int, int],
    reference: str,
) -> None:
    """Plots images and the feature maps of several networks side by side.

    Args:
      images: [M, S, S, 3] uint8, one row of the plot each.
      patches: patch tokens of each network by name, [M, H*W, D]; one column of the plot each.
      path: PNG file to write.
      grid: (H, W) of the patches.
      reference: name of the network whose first three principal components define the colours.
    """
    colour = principal_colours(patches[reference])
    columns = ["picture", *patches]
    figure, axes = pyplot().subplots(
        len(images),
        len(columns),
        figsize=(2 * len(columns), 2 * len(images)),
        layout="constrained",
        squeeze=False,
    )
    for row, image in enumerate(images):
        axes[row][0].imshow(image)
        for column, tokens in enumerate(patches.values(), start=1):
            colours = colour(tokens[row]).reshape(*grid, 3)
            axes[row][column].imshow(colours, interpolation="nearest")
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    save(figure, path)


def principal_colours(
    tokens: np.ndarray, *, eps: float | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """Maps the first three principal components of [..., D] tokens to red, green and blue.

    Args:
      tokens: features of the network that defines the colours.
      eps: relative precision of the tokens, by which a component that is only rounding noise is
        refused; None shows it.

    Returns:
      A function [..., D] -> [..., 3] in [0, 1], to be applied to every network in a comparison.

    Raises:
      DataError: the tokens do not vary in three directions.
    """
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    mean = flat.mean(axis=0)
    _, sizes, axes = np.linalg.svd(flat - mean, full_matrices=False)
    low, high = np.percentile((flat - mean) @ axes[:3].T, [1, 99], axis=0)
    # Rounding changes no singular value by more than the norm of what it changes.
    directions = np.sum(sizes[:3] > (eps or 0) * np.linalg.norm(flat))
    if eps is not None and (directions < 3 or not (high > low).all()):
        raise DataError(
            "pca: the features of these patches do not vary in three directions; use another "
            "picture, or several"
        )

    def colour(other: np.ndarray) -> np.ndarray:
        return np.clip(((other - mean) @ axes[:3].T - low) / (high - low), 0, 1)

    return colour


def pca_picture(features: FeatureMap) -> np.ndarray:
    """Shows features as colours: the first three principal components of the patches of all images.

    Colours can be compared between the images of one call, not between calls.

    Args:
      features: what a network returns for B images.

    Returns:
      float [B, H, W, 3] in [0, 1], on the grid of the patches; matplotlib's `imshow` draws it.

    Raises:
      DataError: the features do not vary in three directions.
    """
    patches = np.asarray(features.on_grid(), np.float32)
    eps = float(jnp.finfo(features.tokens.dtype).eps)
    colours = principal_colours(patches, eps=eps)(patches)
    return colours.reshape(len(patches), *features.grid, 3)


def confusion(
    matrix: np.ndarray, path: epath.Path, class_names: Sequence[str] | None = None
) -> None:
    """Plots a confusion matrix whose rows are divided by their sums.

    Args:
      matrix: counts [K, K], a row for each label.
      path: file to write.
      class_names: name of each class, which the axes have if there are at most MOST_NAMES.
    """
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure, axes = pyplot().subplots(figsize=(5, 4.4), layout="constrained")
    image = axes.imshow(share, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set(xlabel="prediction", ylabel="label")
    if len(matrix) <= MOST_NAMES:
        given = class_names or [""] * len(matrix)
        names = [html.printable(name) or str(k) for k, name in enumerate(given)]
        axes.set_xticks(range(len(matrix)), names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(matrix)), names, parse_math=False)
    else:
        axes.locator_params(integer=True)
    figure.colorbar(image, label="share of the label's images")
    save(figure, path)
