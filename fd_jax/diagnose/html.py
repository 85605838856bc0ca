"""The report of a record: one HTML file that opens offline.

The page is built as a tree, so that every text in it is escaped, whatever the name of a model. It
has no script and refers to nothing outside itself: pictures are data in it.
"""

import base64
from collections.abc import Mapping, Sequence
import struct
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from etils import epath
import numpy as np

from fd_jax.diagnose import tables
from fd_jax.diagnose.draw import DRAWINGS, names, style
from fd_jax.diagnose.explanations import EXPLANATIONS

STYLE_SHEET = """
:root { color-scheme: light dark; --text: #1b1b1b; --page: #ffffff; --line: #d5d5d5;
        --quiet: #555555; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e4; --page: #17181a; --line: #3c3e42; --quiet: #aaaaaa; } }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; color: var(--text);
       background: var(--page); font: 1rem/1.5 system-ui, sans-serif; }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; }
h2 { margin-top: 2.5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { max-width: 44rem; }
.quiet { color: var(--quiet); font-size: .875rem; }
.wide { overflow-x: auto; }
figure { margin: 1rem 0; }
figure img { display: block; height: auto; background: white; border-radius: 4px; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid var(--line); text-align: right;
         vertical-align: top; }
th:first-child, td:first-child, .words td, .words th { text-align: left; }
.words td, .words th { max-width: 40rem; overflow-wrap: break-word; }
.words { margin: 1rem 0; }
.models td, .models th { max-width: 16rem; }
summary { cursor: pointer; margin: .5rem 0; }
"""

# Figures whose entries are pixels, which a screen should show one by one.
PIXELS = ("maps",)

# On a narrow screen, other figures shrink to this share of their width, and scroll below it.
SMALLEST = 0.75


def page(record: Mapping[str, Any], drawings: Sequence[epath.Path]) -> str:
    """Makes report.html.

    Args:
      record: the content of figures.json.
      drawings: the files that `draw.draw_all` wrote for it.

    Returns:
      The text of a self-contained HTML file.
    """
    root = Element("html", lang="en")
    _head(root)
    body = SubElement(root, "body")
    _add(body, "h1", "Diagnostics of " + ", ".join(record["models"]))
    _table(body, tables.settings(record), kind="words")
    _table(body, tables.models(record), kind="words models")
    pictures = {path.stem: path for path in drawings if path.suffix == ".png"}
    for name in DRAWINGS:
        if name in pictures:
            _section(body, record, name, pictures[name].read_bytes())
    ElementTree.indent(root)
    return "<!DOCTYPE html>\n" + ElementTree.tostring(root, encoding="unicode", method="html")


def _head(root: Element) -> None:
    head = SubElement(root, "head")
    SubElement(head, "meta", charset="utf-8")
    SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    # Without an icon of its own, a browser asks the server for one.
    SubElement(head, "link", rel="icon", href="data:,")
    _add(head, "title", "Diagnostics")
    _add(head, "style", STYLE_SHEET)


def _section(body: Element, record: Mapping[str, Any], name: str, picture: bytes) -> None:
    """Adds a figure with its explanation and its numbers."""
    explanation = EXPLANATIONS[name]
    section = SubElement(body, "section", id=name)
    _add(section, "h2", explanation.title)
    _add(section, "p", explanation.shows)
    _add(section, "p", explanation.reading)
    _picture(SubElement(section, "figure", {"class": "wide"}), name, explanation.title, picture)
    formula = f"Formula: {explanation.formula}. Numbers: figures.json."
    _add(section, "p", formula, kind="quiet")
    table = tables.numbers(record, name)
    if table:
        details = SubElement(section, "details")
        _add(details, "summary", "Numbers")
        _table(details, table)


def _picture(figure: Element, name: str, title: str, content: bytes) -> None:
    """Adds a PNG file, at one pixel of the screen for each of its own or at its size in print."""
    pixels = np.array(struct.unpack(">II", content[16:24]))
    size = pixels if name in PIXELS else pixels * 96 / style.DPI
    smallest = size[0] if name in PIXELS else size[0] * SMALLEST
    attributes = {
        "src": "data:image/png;base64," + base64.b64encode(content).decode(),
        "alt": f"Figure: {title}",
        "width": f"{size[0]:.0f}",
        "height": f"{size[1]:.0f}",
        "style": f"max-width: max(100%, {smallest:.0f}px)",
    }
    SubElement(figure, "img", attributes)


def _table(parent: Element, table: tables.Table, *, kind: str = "") -> None:
    element = SubElement(SubElement(parent, "div", {"class": "wide"}), "table", {"class": kind})
    head = SubElement(SubElement(element, "thead"), "tr")
    for text in table.head:
        _add(head, "th", text)
    rows = SubElement(element, "tbody")
    for cells in table.rows:
        row = SubElement(rows, "tr")
        for text in cells:
            _add(row, "td", text)


def _add(parent: Element, tag: str, text: str, *, kind: str = "") -> None:
    """Adds an element with a text, in which characters that no file may hold are replaced."""
    element = SubElement(parent, tag, {"class": kind} if kind else {})
    element.text = text if tag == "style" else names.printable(text)
