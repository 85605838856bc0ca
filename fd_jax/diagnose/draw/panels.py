"""Figures of many small images, placed by whole pixels so that no entry of a matrix is blurred."""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import numpy as np

from fd_jax.diagnose.draw import names, style

# Sizes in pixels of the PNG file. An entry of a matrix has a whole number of pixels, as few as give
# an image of at least SIDE pixels. Photographs are scaled to SIDE.
SIDE = 190
MARGIN = 14
GAP = 16
LINE = 22  # of a title
BAR = 8  # of a colour bar
BAR_LABELS = 24

# Characters in a line of a panel's title, and pixels of a character of a longer text.
TITLE = 18
CHARACTER = 12


class Panel(NamedTuple):
    """One image of a figure.

    Attributes:
      title: text above it.
      image: numbers [H, W], colours [H, W, 3] in 0..1, or a photograph uint8 [H, W, 3].
      norm: the colour scale of numbers, which gets a colour bar; None for colours.
    """

    title: str
    image: np.ndarray
    norm: Any = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        height, width = self.image.shape[:2]
        if self.image.dtype == np.uint8:
            scale = SIDE / max(height, width)
        else:
            scale = math.ceil(SIDE / max(height, width))
        return max(1, round(width * scale)), max(1, round(height * scale))


Blocks = Mapping[str, Sequence[Panel]]


def log_scale(values: np.ndarray) -> Any:
    """A logarithmic colour scale for weights, in which a few extreme ones do not hide the others.

    It ends at the 1st and at the 99.8th percentile: the diagonal of a 196 x 196 map is 0.5% of its
    entries. Zeros have the colour of the lower end, which is at least 1e-4 of the upper one.
    """
    from matplotlib.colors import LogNorm

    low, high = np.nanpercentile(values, [1, 99.8])
    high = max(high, 1e-30)
    low = max(low, 1e-4 * high)
    if high < 1.001 * low:  # Equal weights: the middle of a scale from half to twice of them.
        low, high = low / 2, high * 2
    return LogNorm(low, high, clip=True)


def linear_scale(values: np.ndarray) -> Any:
    """A linear colour scale for weights, from the 1st (or from 0) to the 99th percentile."""
    from matplotlib.colors import Normalize

    low, high = np.nanpercentile(values, [1, 99])
    low = low if low > high / 10 else 0.0
    return Normalize(low, high if high > low else low + 1e-6, clip=True)


def draw(blocks: Blocks, caption: str, *, columns: int = 4, across: int = 2) -> Any:
    """Draws blocks of panels, from the top left to the bottom right.

    Args:
      blocks: the panels by the title of their block, which is a model's name or "" for none.
      caption: what the figure shows; text above the blocks.
      columns: panels in a row of a block.
      across: blocks in a row of the figure.
    """
    columns = min(columns, max(len(panels) for panels in blocks.values()))
    across = min(across, len(blocks))
    cells = {name: _Cell.of(panels) for name, panels in blocks.items()}
    width = columns * (max(cell.width for cell in cells.values()) + GAP)
    titles = names.titles(blocks, width // CHARACTER)
    top = _height(titles.values())
    total = across * width + (across - 1) * GAP + 2 * MARGIN - GAP
    text = names.wrapped(caption, total // CHARACTER)

    rows = [list(blocks)[at : at + across] for at in range(0, len(blocks), across)]
    heights = [
        top + max(math.ceil(len(blocks[name]) / columns) * cells[name].height for name in row)
        for row in rows
    ]
    start = MARGIN + _height([text]) + GAP
    page = _Page(total, start + sum(heights))
    page.text(MARGIN, MARGIN, text, fontsize=8)
    for row, height in zip(rows, heights, strict=True):
        for index, name in enumerate(row):
            left = MARGIN + index * (width + GAP)
            page.text(left, start, titles[name], fontsize=9, fontweight="bold")
            page.panels(left, start + top, blocks[name], cells[name], columns)
        start += height
    return page.figure


class _Cell(NamedTuple):
    """The room of a panel in pixels: its title, its image and its colour bar."""

    width: int
    height: int
    title: int

    @classmethod
    def of(cls, panels: Sequence[Panel]) -> "_Cell":
        width = max(panel.size[0] for panel in panels)
        title = _height(panel.title for panel in panels)
        below = GAP + (BAR + BAR_LABELS if any(panel.norm for panel in panels) else 0)
        return cls(width, title + max(panel.size[1] for panel in panels) + below, title)


class _Page:
    """A figure on which things are placed in pixels from the top left."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.figure = style.new_figure(width / style.DPI, height / style.DPI, layout="none")

    def text(self, x: int, y: int, text: str, **format: Any) -> None:
        """Writes a text whose top left corner is at (x, y)."""
        self.figure.text(x / self.width, 1 - y / self.height, text, va="top", **format)

    def axes(self, x: int, y: int, width: int, height: int) -> Any:
        """Axes without frame and ticks; (x, y) is their top left corner."""
        bottom = self.height - y - height
        box = (x / self.width, bottom / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(box)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return axes

    def panels(self, x: int, y: int, panels: Sequence[Panel], cell: _Cell, columns: int) -> None:
        """Draws panels row by row; (x, y) is the top left corner of the first."""
        for place, panel in enumerate(panels):
            row, column = divmod(place, columns)
            self.panel(x + column * (cell.width + GAP), y + row * cell.height, panel, cell)

    def panel(self, x: int, y: int, panel: Panel, cell: _Cell) -> None:
        """Draws a panel whose title begins at (x, y)."""
        width, height = panel.size
        axes = self.axes(x, y + cell.title, width, height)
        axes.set_title(panel.title, fontsize=8, fontweight="normal", pad=3)
        axes.imshow(panel.image, norm=panel.norm, aspect="auto")
        if panel.norm is not None:
            self._bar(self.axes(x, y + cell.title + height + 4, width, BAR), panel)

    def _bar(self, axes: Any, panel: Panel) -> None:
        """Draws a colour bar, with the two ends of the scale as its labels."""
        norm = panel.norm
        axes.imshow(np.linspace(0, 1, 256)[None], aspect="auto", vmin=0, vmax=1)
        below = "\N{LESS-THAN OR EQUAL TO}" if np.nanmin(panel.image) < norm.vmin else ""
        above = "\N{GREATER-THAN OR EQUAL TO}" if np.nanmax(panel.image) > norm.vmax else ""
        axes.set_xticks([-0.5, 255.5], [f"{below}{norm.vmin:.2g}", f"{above}{norm.vmax:.2g}"])
        axes.tick_params(length=0, pad=2)
        for label, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
            label.set_horizontalalignment(side)


def _height(texts: Any) -> int:
    """The height in pixels of the longest of some texts."""
    return LINE * max((text.count("\n") + 1 for text in texts if text), default=0)
