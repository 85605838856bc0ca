"""The bytes of one stored view of a picture: which one it is, its crop, and its map."""

import struct
from typing import NamedTuple

WHOLE, UNREADABLE, SKIPPED = range(3)  # states of a picture; only a whole one has a map

_HEADER = struct.Struct("<qiBBxx6i")


class View(NamedTuple):
    """One view of a picture.

    Attributes:
      index: position of the picture in its split.
      number: which of its views this is.
      state: `WHOLE`, `UNREADABLE`, or `SKIPPED` for one of the files that the original skips.
      flipped: whether it is mirrored after the crop.
      box: (top, left, height, width) of the crop in pixels of the picture.
      size: (height, width) of the picture, as decoded.
    """

    index: int
    number: int
    state: int
    flipped: bool
    box: tuple[int, int, int, int]
    size: tuple[int, int]


def pack(view: View, content: bytes) -> bytes:
    """The record of a view; `content` is its map, b"" where there is none."""
    head = _HEADER.pack(
        view.index, view.number, view.state, view.flipped, *map(int, view.box + view.size)
    )
    return head + content


def unpack(record: bytes) -> tuple[View, memoryview]:
    """The view of a record, and the bytes of its map.

    Raises:
      ValueError: it is too short.
    """
    if len(record) < _HEADER.size:
        raise ValueError(f"has {len(record)} bytes; expected at least {_HEADER.size}")
    index, number, state, flipped, *rest = _HEADER.unpack_from(record)
    top, left, height, width, rows, columns = rest
    view = View(index, number, state, bool(flipped), (top, left, height, width), (rows, columns))
    return view, memoryview(record)[_HEADER.size :]
