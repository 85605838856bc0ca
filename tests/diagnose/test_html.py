"""The report is one file that opens offline, and escapes what it quotes."""

import base64
from html.parser import HTMLParser
import re
import shlex

from etils import epath
import numpy as np
import pytest

from fd_jax.diagnose import draw, html, tables
from fd_jax.diagnose.explanations import EXPLANATIONS
from tests.diagnose import records

NAME = "a<script>alert(\"b\")</script> & 'c'"


class Reader(HTMLParser):
    """Collects the elements of a page with their attributes, and the text of each kind."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag):
        return [text for name, text in self.texts if name == tag]


@pytest.fixture(scope="module")
def record():
    models = {NAME: records.vit(0), "student": records.vit(1), "swin": records.swin(2)}
    return records.record(models)


@pytest.fixture(scope="module")
def drawings(record, tmp_path_factory):
    return draw.draw_all(record, epath.Path(tmp_path_factory.mktemp("figures")))


@pytest.fixture(scope="module")
def page(record, drawings):
    return Reader(html.page(record, drawings))


def test_every_figure_is_embedded_with_its_explanation(page, drawings):
    sections = [attributes["id"] for attributes in page.all("section")]
    assert sections == list(draw.DRAWINGS) == list(EXPLANATIONS)
    pictures = [path.read_bytes() for path in drawings if path.suffix == ".png"]
    for image, content, name in zip(page.all("img"), pictures, sections, strict=True):
        kind, encoded = image["src"].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(encoded) == content
        assert EXPLANATIONS[name].title in page.text("h2")
        assert EXPLANATIONS[name].title in image["alt"]
        assert {EXPLANATIONS[name].shows, EXPLANATIONS[name].reading} <= set(page.text("p"))


def test_every_formula_has_its_section_in_the_reference():
    reference = (epath.Path(__file__).parents[2] / "docs/reference.md").read_text()
    for explanation in EXPLANATIONS.values():
        assert f'<a id="{explanation.formula.partition("#")[2]}"></a>' in reference


def references(text):
    """Addresses outside of a page that it refers to."""
    page = Reader(text)
    links = [
        attributes[key]
        for _, attributes in page.elements
        for key in ("src", "href", "srcset", "data", "action")
        if key in attributes and not attributes[key].startswith("data:")
    ]
    styles = [text for tag, text in page.texts if tag == "style"]
    styles += [attributes["style"] for _, attributes in page.elements if "style" in attributes]
    return links + [found for style in styles for found in re.findall(r"url\(|@import", style)]


def test_the_page_needs_nothing_from_outside(record, drawings, page):
    assert references(html.page(record, drawings)) == []
    assert not page.all("script")
    assert references('<img src="https://example.org/a.png"><style>@import "b"</style>')


def test_names_are_text_wherever_they_appear(record, drawings, page):
    text = html.page(record, drawings)
    assert "<script" not in text
    assert f"Diagnostics of {NAME}, student, swin" in page.text("h1")
    assert NAME in page.text("th") and "\ufffd" not in text
    assert shlex.join(record["command"]) in page.text("td")
    assert f"{NAME} and student" in page.text("th")


def test_characters_that_no_file_may_hold_are_replaced(record):
    odd = {**record, "models": {"a\x07\udc80b": record["models"]["swin"]}, "pairs": []}
    text = html.page(odd, [])
    text.encode()
    assert "a\ufffd\ufffdb" in text and "\x07" not in text


def test_figures_that_were_not_drawn_have_no_section(record, drawings):
    chosen = [path for path in drawings if path.stem in ("maps", "rank")]
    page = Reader(html.page(record, chosen))
    assert [attributes["id"] for attributes in page.all("section")] == ["maps", "rank"]


def test_maps_are_shown_pixel_by_pixel(page, drawings):
    """The size on the screen is that of the file for maps, and that in inches for the others."""
    sizes = {}
    for path, image in zip(drawings[::2], page.all("img"), strict=True):
        width, height = np.frombuffer(path.read_bytes()[16:24], ">u4")
        sizes[path.stem] = (width / int(image["width"]), height / int(image["height"]))
    assert sizes.pop("maps") == (1, 1)
    assert all(np.allclose(ratio, draw.style.DPI / 96, rtol=0.01) for ratio in sizes.values())


def test_settings_and_models_are_listed(record):
    settings = dict(tables.settings(record).rows)
    assert settings["images"] == "512" and settings["image size"] == "24×32"
    assert settings["normalize"] == "patches" and settings["picture"] == "cat.jpg"
    table = tables.models(record)
    assert list(table.head) == ["", *record["models"]]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["heads"] == ("4", "4", "2 (2 layers), 4 (1 layer)")
    assert rows["grid"][::2] == ("3×4", "8×8 (2 layers), 4×4 (1 layer)")
    assert rows["window"] == ("none", "none", "2")
    assert rows["class token and registers"] == ("1", "1", "0")


@pytest.mark.parametrize("name", draw.DRAWINGS)
def test_tables_hold_the_numbers_of_the_record(record, name):
    table = tables.numbers(record, name)
    if name in ("maps", "class_row", "class_column", "pca", "rollout", "heads"):
        assert table is None
        return
    assert all(len(row) == len(table.head) for row in table.rows)
    model = record["models"]["student"]
    expected = {
        "distance": ("student: mean", lambda layer: np.mean(model["distance"][layer])),
        "entropy": ("student: spread", lambda layer: np.std(model["entropy"][layer])),
        "shares": ("student: key", lambda layer: model["shares"]["key"][layer]),
        "cka": (f"{NAME} and swin", lambda layer: record["pairs"][1]["cka"][layer]),
        "cosine": (f"{NAME} and student", lambda layer: record["pairs"][0]["cosine"][layer]),
    }
    if name == "landscape":
        # Ends and centre of both ViTs; the loss at the centre is 0.5 in every direction.
        assert [row[1] for row in table.rows] == ["-1", "0", "1"] * 2
        assert table.rows[4] == ("student", "0", "0.5", "0.9")
        return
    heading, value = expected.get(name, ("student", lambda layer: model[name][layer]))
    column = list(table.head).index(heading)
    assert [row[column] for row in table.rows] == [f"{value(layer):.4g}" for layer in range(3)]


def test_a_shallower_model_leaves_cells_empty(record):
    models = {"deep": records.vit(0, layers=4), "flat": records.vit(1, layers=2)}
    table = tables.numbers(records.record(models), "rank")
    assert [row[2] == "" for row in table.rows] == [False, False, True, True]
