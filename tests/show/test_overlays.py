"""The page of overlays is one file that opens offline, and shows what it says."""

import base64
import csv
import io
import re

import numpy as np
from PIL import Image
import pytest

from fd_jax.show import overlays
from tests.diagnose.test_html import Reader

NAMES = ["wall", "a<b>&'c'", "sky", "never seen"]


def samples():
    rng = np.random.default_rng(0)
    made = []
    for name, size in (("first", (20, 30)), ("<script>second", (900, 640))):
        image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        mask = rng.integers(0, 2, size).astype(np.uint8)
        mask[0] = 255
        predicted = np.full(size, 2, np.int32)
        made.append(overlays.Sample(name, image, mask, predicted))
    return made


def test_page_shows_each_picture_with_label_and_prediction():
    given = samples()
    text = overlays.page(given, NAMES, title="Ours & theirs")
    page = Reader(text)
    assert page.text("h1") == ["Ours & theirs"]
    assert page.text("h2") == ["first", "<script>second"]
    assert page.text("span") == NAMES[:3]  # only classes that occur
    assert not page.all("script") and not re.search(r"https?://", text)
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))))
        for image in page.all("img")
    ]
    assert len(pictures) == 6
    np.testing.assert_array_equal(pictures[0], given[0].image)
    assert pictures[3].shape == (512, 364, 3)
    colours = overlays.palette(4)
    for pixels, classes in zip(pictures[1:3], (given[0].mask, given[0].predicted), strict=True):
        want = given[0].image.astype(float)
        for y, x in np.ndindex(classes.shape):
            if classes[y, x] != 255:
                want[y, x] = 0.4 * want[y, x] + 0.6 * colours[classes[y, x]]
        assert np.abs(pixels - want).max() <= 0.5
    shown = [tuple(map(int, re.findall(r"\d+", i["style"]))) for i in page.all("i")]
    assert shown == [tuple(colour) for colour in colours[:3]]


def test_colours_of_classes_differ():
    colours = overlays.palette(150).astype(int)
    distance = np.abs(colours[:, None] - colours).sum(axis=-1)
    assert distance[~np.eye(150, dtype=bool)].min() > 20
    assert overlays.palette(0).shape == (0, 3)


def test_table_of_classes_has_the_best_first():
    iou, accuracy = np.array([0.25, np.nan, 0.5, 0.0]), np.array([0.5, np.nan, 1.0, np.nan])
    rows = list(csv.reader(io.StringIO(overlays.per_class(NAMES, iou, accuracy))))
    assert rows == [
        ["class", "name", "iou", "accuracy"],
        ["2", "sky", "0.5000", "1.0000"],
        ["0", "wall", "0.2500", "0.5000"],
        ["3", "never seen", "0.0000", ""],
        ["1", "a<b>&'c'", "", ""],
    ]


def test_samples_that_do_not_fit_are_refused():
    first = samples()[0]
    with pytest.raises(ValueError, match=r"first: the label is \(10, 30\), the picture \(20, 30\)"):
        overlays.page([first._replace(mask=first.mask[::2])], NAMES)
    with pytest.raises(ValueError, match="first: the prediction has classes from 2 to 2, but"):
        overlays.page([first], NAMES[:2])
