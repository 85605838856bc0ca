"""The report of a record: one HTML file that opens offline."""

from collections.abc import Mapping, Sequence
import struct
from typing import Any
from xml.etree.ElementTree import Element, SubElement

from etils import epath
import numpy as np

from fd_jax.diagnose import tables
from fd_jax.diagnose.draw import DRAWINGS, style
from fd_jax.diagnose.explanations import EXPLANATIONS
from fd_jax.show import html

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
    root, body = html.new_page("Diagnostics")
    html.add(body, "h1", "Diagnostics of " + ", ".join(record["models"]))
    html.table(body, *tables.settings(record), kind="words")
    html.table(body, *tables.models(record), kind="words models")
    pictures = {path.stem: path for path in drawings if path.suffix == ".png"}
    for name in DRAWINGS:
        if name in pictures:
            _section(body, record, name, pictures[name].read_bytes())
    return html.as_text(root)


def _section(body: Element, record: Mapping[str, Any], name: str, picture: bytes) -> None:
    """Adds a figure with its explanation and its numbers."""
    explanation = EXPLANATIONS[name]
    section = SubElement(body, "section", id=name)
    html.add(section, "h2", explanation.title)
    html.add(section, "p", explanation.shows)
    html.add(section, "p", explanation.reading)
    _picture(SubElement(section, "figure", {"class": "wide"}), name, explanation.title, picture)
    formula = f"Formula: {explanation.formula}. Numbers: figures.json."
    html.add(section, "p", formula, kind="quiet")
    table = tables.numbers(record, name)
    if table:
        details = SubElement(section, "details")
        html.add(details, "summary", "Numbers")
        html.table(details, *table)


def _picture(figure: Element, name: str, title: str, content: bytes) -> None:
    """Adds a PNG file, at one pixel of the screen for each of its own or at its size in print."""
    pixels = np.array(struct.unpack(">II", content[16:24]))
    size = pixels if name in PIXELS else pixels * 96 / style.DPI
    smallest = size[0] if name in PIXELS else size[0] * SMALLEST
    attributes = {
        "src": html.png(content),
        "alt": f"Figure: {title}",
        "width": f"{size[0]:.0f}",
        "height": f"{size[1]:.0f}",
        "style": f"max-width: max(100%, {smallest:.0f}px)",
    }
    SubElement(figure, "img", attributes)
