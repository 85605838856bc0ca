"""Sizes of images and of their grids of patches, which need not be square."""

from collections.abc import Sequence
import numbers
from typing import Literal

from fd_jax.errors import ConfigError, check_choice

# Pixels: one number is the side of a square, two are height and width.
ImageSize = int | Sequence[int]

# What becomes of an image that patches do not fill, see `check_patches`.
PartialPatches = Literal["refuse", "crop"]

AXES = ("height", "width")


def sides(image_size: ImageSize) -> tuple[int, int]:
    """Height and width in pixels.

    Raises:
      ConfigError: it is neither a whole number nor two of them.
    """
    given = tuple(image_size) if isinstance(image_size, Sequence) else (image_size,) * 2
    whole = all(isinstance(side, numbers.Integral) for side in given)
    if len(given) != len(AXES) or not whole:
        raise ConfigError(
            f"image_size={image_size!r}: expected a whole number, the side of a square, or a pair "
            "of them, height and width"
        )
    return int(given[0]), int(given[1])


def plain(image_size: ImageSize) -> int | list[int]:
    """The size as `model.json` holds it: one number for a square, [height, width] otherwise."""
    height, width = sides(image_size)
    return height if height == width else [height, width]


def describe(image_size: ImageSize) -> str:
    """The size for people: "224", or "224 x 336" with the height first."""
    height, width = sides(image_size)
    return f"{height}" if height == width else f"{height} x {width}"


def parse(text: str) -> int | list[int]:
    """The size in `plain` form from what a command line gives: "224", or "224x336" (height first).

    Raises:
      ConfigError: it is neither.
    """
    parts = text.split("x")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ConfigError(f"image size {text!r}: expected a number as 224, or HEIGHTxWIDTH")
    numbers_given = [int(part) for part in parts]
    return plain(numbers_given[0] if len(parts) == 1 else numbers_given)


def square_side(image_size: ImageSize, *, network: str) -> int:
    """The side of a square in pixels.

    Raises:
      ConfigError: the size is not square; `network` names in the message what has to have one.
    """
    height, width = sides(image_size)
    if height != width:
        raise ConfigError(
            f"image_size {describe(image_size)}: {network} takes square images only; use "
            f"{height} or {width}"
        )
    return height


def patch_grid(image_size: ImageSize, patch_size: int) -> tuple[int, int]:
    """(H, W) of the patches of an image; patches that the image cuts off are not counted."""
    height, width = sides(image_size)
    return height // patch_size, width // patch_size


def check_halved(image_size: ImageSize, patch_size: int, halvings: int) -> None:
    """Refuses an image of which nothing is left once its patches are halved along both axes.

    Sides need no divisor: a patch, or a half, that the side cuts off is not counted.

    Args:
      image_size: in pixels.
      patch_size: side of a patch.
      halvings: how often the grid of patches is halved.

    Raises:
      ConfigError: a side is too small.
    """
    least = patch_size << halvings
    if min(sides(image_size)) < least:
        raise ConfigError(
            f"image_size {describe(image_size)} is less than {least}, patch_size {patch_size} x "
            f"{1 << halvings} (the stages halve the grid); use {least} or more"
        )


def token_side(image_size: ImageSize, patch_size: int, grid: tuple[int, int]) -> int:
    """Pixels on a side of what a token of a map stands for.

    Args:
      image_size: of the network.
      patch_size: of the network.
      grid: (H, W) of the map: that of the patches, or what halvings leave of it, each of which may
        leave out an odd row or column.
    """
    halvings = (patch_grid(image_size, patch_size)[0] // grid[0]).bit_length() - 1
    return patch_size << halvings


def check_patches(
    image_size: ImageSize, patch_size: int, *, partial: PartialPatches = "refuse"
) -> None:
    """Refuses an image that patches do not fill.

    Args:
      image_size: of the network.
      patch_size: side of a patch in pixels.
      partial: "refuse" sides that patches do not fill; "crop" takes them, and what remains at the
        right and at the bottom is not read. An image has to hold one patch in any case.

    Raises:
      ConfigError: a side is smaller than a patch, or not divisible by it; the message names it.
    """
    check_choice("partial_patches", partial, PartialPatches.__args__)
    size = describe(image_size)
    for axis, side in zip(AXES, sides(image_size), strict=True):
        name = f"image_size {size}" if size == f"{side}" else f"image_size {size}: {axis} {side}"
        if side < patch_size:
            raise ConfigError(f"{name} is less than patch_size {patch_size}")
        if partial == "refuse" and side % patch_size:
            lower = side // patch_size * patch_size
            raise ConfigError(
                f"{name} is not divisible by patch_size {patch_size}; "
                f"use {lower} or {lower + patch_size}"
            )


def fitting_factor(height: int, width: int, scale: tuple[float, float]) -> float:
    """The largest factor at which a picture keeps within bounds of its long and its short side.

    Args:
      height: height of the picture.
      width: width of the picture.
      scale: the two bounds, in any order.
    """
    return min(max(scale) / max(height, width), min(scale) / min(height, width))
