"""Semantic segmentation for people: a page of pictures with their classes, a table of classes."""

from collections.abc import Sequence
import csv
import io
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement

import numpy as np
from PIL import Image

from fd_jax.data.base import IGNORED
from fd_jax.show import html

LONGEST = 512  # pixels; larger pictures are reduced for the page
OPACITY = 0.6  # of the colour of a class over the picture
# Steps through the cube of colours that keep points apart, however many there are: powers of 1 / g,
# where g is the root of g^4 = g + 1.
_STEPS = (0.8191725134, 0.6710436067, 0.5497004779)
_STYLE = """
.row { display: flex; flex-wrap: wrap; gap: .5rem; }
.row figure { margin: 0; flex: 1 1 16rem; }
.row img { width: 100%; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; list-style: none; }
.legend i { display: inline-block; width: 1em; height: 1em; margin-right: .35em;
            border: 1px solid var(--line); vertical-align: -.1em; }
"""


class Sample(NamedTuple):
    """A picture with its label and a prediction.

    Attributes:
      name: for people.
      image: uint8 [h, w, 3] RGB.
      mask: classes [h, w], IGNORED where there is none.
      predicted: classes [h, w].
    """

    name: str
    image: np.ndarray
    mask: np.ndarray
    predicted: np.ndarray


def palette(classes: int) -> np.ndarray:
    """A colour for each class, all different. uint8 [K, 3]"""
    return np.round(255 * (np.outer(np.arange(1, classes + 1), _STEPS) % 1)).astype(np.uint8)


def overlay(image: np.ndarray, classes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Paints classes over a picture, and leaves ignored pixels as they are.

    Args:
      image: uint8 [h, w, 3].
      classes: [h, w], below the number of colours or IGNORED.
      colours: uint8 [K, 3].

    Returns:
      uint8 [h, w, 3].
    """
    counted = classes != IGNORED
    paint = colours[np.where(counted, classes, 0)]
    mixed = np.round((1 - OPACITY) * image + OPACITY * paint).astype(np.uint8)
    return np.where(counted[..., None], mixed, image)


def page(
    samples: Sequence[Sample],
    class_names: Sequence[str],
    colours: np.ndarray | None = None,
    *,
    title: str = "Segmentation",
) -> str:
    """Makes a page with each picture, its label and its prediction, and the colours in use.

    Args:
      samples: what to show.
      class_names: name of each class.
      colours: uint8 [K, 3]; None for those of `palette`.
      title: heading of the page.

    Returns:
      The text of a self-contained HTML file, for `files.write_text`.

    Raises:
      ValueError: a sample has arrays of several sizes, or a class without a name.
    """
    colours = palette(len(class_names)) if colours is None else colours
    for sample in samples:
        _check(sample, min(len(class_names), len(colours)))
    root, body = html.new_page(title, style=_STYLE)
    html.add(body, "h1", title)
    _legend(body, samples, class_names, colours)
    for sample in samples:
        _section(body, sample, colours)
    return html.as_text(root)


def per_class(class_names: Sequence[str], iou: np.ndarray, accuracy: np.ndarray) -> str:
    """CSV table of the classes, the best first; a class without a value comes last, without one.

    Args:
      class_names: name of each class.
      iou: [K], NaN where there is none.
      accuracy: [K], NaN where there is none.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("class", "name", "iou", "accuracy"))
    for k in np.argsort(-iou, kind="stable"):  # NaN sorts last
        shown = ["" if np.isnan(value) else f"{value:.4f}" for value in (iou[k], accuracy[k])]
        writer.writerow((int(k), class_names[k], *shown))
    return text.getvalue()


def _check(sample: Sample, classes: int) -> None:
    size = sample.image.shape[:2]
    for what, array in (("label", sample.mask), ("prediction", sample.predicted)):
        if array.shape != size:
            raise ValueError(f"{sample.name}: the {what} is {array.shape}, the picture {size}")
        known = array[array != IGNORED]
        if known.size and not 0 <= known.min() <= known.max() < classes:
            raise ValueError(
                f"{sample.name}: the {what} has classes from {known.min()} to {known.max()}, but "
                f"names and colours are given for {classes}"
            )


def _legend(
    body: Element, samples: Sequence[Sample], class_names: Sequence[str], colours: np.ndarray
) -> None:
    """The classes that occur somewhere."""
    found: set[int] = set()
    for sample in samples:
        found.update(np.unique(sample.mask).tolist(), np.unique(sample.predicted).tolist())
    legend = SubElement(body, "ul", {"class": "legend"})
    for k in sorted(found - {IGNORED}):
        item = SubElement(legend, "li")
        SubElement(item, "i", style=f"background: rgb({', '.join(map(str, colours[k]))})").text = ""
        SubElement(item, "span").text = html.printable(class_names[k])


def _section(body: Element, sample: Sample, colours: np.ndarray) -> None:
    section = SubElement(body, "section")
    html.add(section, "h2", sample.name)
    row = SubElement(section, "div", {"class": "row"})
    panels = {
        "picture": sample.image,
        "label": overlay(sample.image, sample.mask, colours),
        "prediction": overlay(sample.image, sample.predicted, colours),
    }
    for what, pixels in panels.items():
        figure = SubElement(row, "figure")
        alt = html.printable(f"{what} of {sample.name}")
        SubElement(figure, "img", src=html.png(_encoded(pixels)), alt=alt)
        html.add(figure, "figcaption", what, kind="quiet")


def _encoded(pixels: np.ndarray) -> bytes:
    image = Image.fromarray(pixels)
    image.thumbnail((LONGEST, LONGEST))
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
