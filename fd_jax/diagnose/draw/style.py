"""The style sheet of all figures, and how a figure becomes a file.

Figures are made without pyplot, so that drawing needs no display and leaves nothing open. Only this
package's functions import matplotlib, which training and measuring do not need.
"""

from contextlib import AbstractContextManager
import io
from typing import Any

DPI = 150

# Lines differ in colour (Okabe and Ito's palette, which colour-blind readers can tell apart), in
# dashes and in marker, so that they differ in black and white too. A colour comes back after seven
# lines, with another marker and other dashes.
_LINES = (
    "cycler('color', 2 * ['000000', '0072B2', 'D55E00', '009E73', 'CC79A7', '56B4E9', 'E69F00'])"
    " + cycler('linestyle', 3 * ['-', '--', '-.', ':'] + ['-', '--'])"
    " + cycler('marker', ['o', 's', '^', 'D', 'v', 'P', 'X', '<', '>', 'p', '*', 'h', 'd', '8'])"
)

STYLE = {
    "axes.grid": True,
    "axes.labelsize": 8,
    "axes.prop_cycle": _LINES,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "figure.dpi": DPI,
    "figure.labelsize": 8,
    "font.size": 8,
    "grid.color": "0.88",
    "grid.linewidth": 0.5,
    # Lightness rises from near black to near white, so that it prints in grey.
    "image.cmap": "magma",
    # An entry of a matrix is a rectangle of one colour, in SVG too.
    "image.interpolation": "none",
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 3.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "savefig.dpi": DPI,
    # Without these two, every file would have names of its own for the same shapes.
    "svg.hashsalt": "fd_jax",
    "svg.id": "fd_jax",
    # Names of models may hold dollar signs.
    "text.parse_math": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
}


def applied() -> AbstractContextManager[None]:
    """A context with the style sheet and none of the user's own settings."""
    from matplotlib import style

    return style.context([STYLE], after_reset=True)


def new_figure(width: float, height: float, *, layout: str = "constrained") -> Any:
    """An empty figure.

    Args:
      width: width in inches.
      height: height in inches.
      layout: matplotlib's layout engine; "none" where axes are placed by pixels.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)  # pyright: ignore[reportArgumentType]


def encoded(figure: Any, kind: str) -> bytes:
    """A figure as the content of a file; the same figure always gives the same bytes.

    Args:
      figure: a figure that was made and is encoded under `applied`.
      kind: "png" or "svg".
    """
    buffer = io.BytesIO()
    # A date in the file would make every file another one.
    metadata = {"Date": None} if kind == "svg" else None
    figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()
