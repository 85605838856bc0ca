"""Sizes of images and of their grids of patches, which need not be square."""

from collections.abc import Sequence
import numbers

from fd_jax.errors import ConfigError

# Pixels: one number is the side of a square, two are height and width.
ImageSize = int | Sequence[int]

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


def check_patches(image_size: ImageSize, patch_size: int) -> None:
    """Refuses an image that patches do not fill.

    Raises:
      ConfigError: a side is smaller than a patch, or not divisible by it; the message names it.
    """
    size = describe(image_size)
    for axis, side in zip(AXES, sides(image_size), strict=True):
        name = f"image_size {size}" if size == f"{side}" else f"image_size {size}: {axis} {side}"
        if side < patch_size:
            raise ConfigError(f"{name} is less than patch_size {patch_size}")
        if side % patch_size:
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
