"""Names of models as figures show them: folders can have any name."""

from collections.abc import Collection
import re
import textwrap

from fd_jax.show.html import printable

# Longer names lose their middle.
LINES = 3


class _Wrapper(textwrap.TextWrapper):
    """Breaks lines after the characters that separate the words of a folder's name."""

    wordsep_re = re.compile(r"(\s+)|(?<=[-_.,/])")


def wrapped(text: str, width: int) -> str:
    """Breaks a text into lines of at most `width` characters."""
    return "\n".join(_Wrapper(width).wrap(text))


def titles(names: Collection[str], width: int) -> dict[str, str]:
    """Returns the title of each name: at most `LINES` lines of `width` characters, all different.

    Args:
      names: names of models.
      width: characters in a line.
    """
    short = [wrapped(_shortened(printable(name), LINES * width - 8), width) for name in names]
    numbered = [
        wrapped(f"{number}: {text}", width) if short.count(text) > 1 else text
        for number, text in enumerate(short, start=1)
    ]
    return dict(zip(names, numbered, strict=True))


def _shortened(name: str, length: int) -> str:
    if len(name) <= length:
        return name
    half = (length - 1) // 2
    return f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"
