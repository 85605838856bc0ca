"""A page of text, tables and plots that is written twice: as Markdown, and as one HTML file."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement

from etils import epath

from fd_jax import files
from fd_jax.show import html, tables


class Heading(NamedTuple):
    """A heading of a section."""

    text: str


class Paragraph(NamedTuple):
    """A paragraph; in small print if `quiet`."""

    text: str
    quiet: bool = False


class Commands(NamedTuple):
    """Commands to type, one a line."""

    lines: Sequence[str]


class Table(NamedTuple):
    """A table: a heading for each column, and the rows. `words`: all columns are aligned left."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


class Picture(NamedTuple):
    """A PNG file in the folder of the document, and what it shows."""

    file: str
    shows: str


Block = Heading | Paragraph | Commands | Table | Picture


def write(folder: epath.Path, name: str, title: str, blocks: Sequence[Block]) -> None:
    """Writes NAME.md, which refers to the pictures, and NAME.html, which holds them.

    Args:
      folder: existing folder that has the pictures.
      name: of both files, without an ending.
      title: heading of the whole document.
      blocks: its content in order.
    """
    files.write_text(folder / f"{name}.md", _markdown(title, blocks))
    files.write_text(folder / f"{name}.html", _html(folder, title, blocks))


def _markdown(title: str, blocks: Iterable[Block]) -> str:
    parts = [f"# {title}", *(_markdown_of(block) for block in blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown_of(block: Block) -> str:
    if isinstance(block, Heading):
        return f"## {block.text}"
    if isinstance(block, Paragraph):
        return block.text
    if isinstance(block, Commands):
        return "\n".join(["```", *block.lines, "```"])
    if isinstance(block, Picture):
        return f"![{block.shows}]({block.file})"
    return tables.markdown(block.head, block.rows)


def _html(folder: epath.Path, title: str, blocks: Iterable[Block]) -> str:
    root, body = html.new_page(title)
    html.add(body, "h1", title)
    for block in blocks:
        _add(body, folder, block)
    return html.as_text(root)


def _add(body: Element, folder: epath.Path, block: Block) -> None:
    if isinstance(block, Heading):
        html.add(body, "h2", block.text)
    elif isinstance(block, Paragraph):
        html.add(body, "p", block.text, kind="quiet" if block.quiet else "")
    elif isinstance(block, Commands):
        for line in block.lines:
            html.add(body, "pre", line, kind="wide")
    elif isinstance(block, Table):
        html.table(body, block.head, block.rows, kind="words" if block.words else "")
    else:
        figure = SubElement(body, "figure")
        content = html.png((folder / block.file).read_bytes())
        SubElement(figure, "img", src=content, alt=block.shows, style="max-width: 100%")
