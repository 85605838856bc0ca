"""Pages of results: one HTML file each, which opens offline.

A page is built as a tree, so that every text in it is escaped, whatever the name of a model or of a
picture. It has no script and refers to nothing outside itself: pictures are data in it.
"""

import base64
from collections.abc import Iterable
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

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


def printable(text: str) -> str:
    """Replaces control characters, line breaks and broken encodings, which no file may hold."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def new_page(title: str, *, style: str = "") -> tuple[Element, Element]:
    """Starts a page.

    Args:
      title: of the window.
      style: rules in addition to STYLE_SHEET.

    Returns:
      The whole page for `as_text`, and its body to add to.
    """
    root = Element("html", lang="en")
    head = SubElement(root, "head")
    SubElement(head, "meta", charset="utf-8")
    SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    # Without an icon of its own, a browser asks the server for one.
    SubElement(head, "link", rel="icon", href="data:,")
    add(head, "title", title)
    SubElement(head, "style").text = STYLE_SHEET + style
    return root, SubElement(root, "body")


def add(parent: Element, tag: str, text: str, *, kind: str = "") -> Element:
    """Adds an element with a text, in which characters that no file may hold are replaced."""
    element = SubElement(parent, tag, {"class": kind} if kind else {})
    element.text = printable(text)
    return element


def table(
    parent: Element, head: Iterable[str], rows: Iterable[Iterable[str]], *, kind: str = ""
) -> None:
    """Adds a table that scrolls by itself where it is wider than the screen."""
    element = SubElement(SubElement(parent, "div", {"class": "wide"}), "table", {"class": kind})
    headings = SubElement(SubElement(element, "thead"), "tr")
    for text in head:
        add(headings, "th", text)
    body = SubElement(element, "tbody")
    for cells in rows:
        row = SubElement(body, "tr")
        for text in cells:
            add(row, "td", text)


def png(content: bytes) -> str:
    """The address of a PNG file that is in the page itself."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def as_text(root: Element) -> str:
    """The text of the file."""
    ElementTree.indent(root)
    return "<!DOCTYPE html>\n" + ElementTree.tostring(root, encoding="unicode", method="html")
