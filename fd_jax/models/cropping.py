"""The evaluation transform of decoded pictures, in numpy: using a network needs no other package.

`data.transforms.EvalTransform` is the same for encoded pictures, and reads them faster.
"""

import numpy as np

from fd_jax.models import sizes
from fd_jax.models.resize import antialias_matrix
from fd_jax.models.sizes import ImageSize

EVAL_RATIO = 256 / 224  # short side before the centre crop, divided by the side of the crop


def covering(pixels: np.ndarray, covered: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a picture [h, w, 3], scaled so that it just covers `covered`."""
    (height, width), (rows, columns) = pixels.shape[:2], covered
    if height * columns < width * rows:  # flatter than what it covers: its height is what counts
        return rows, int(rows * width / height)
    return int(columns * height / width), columns


def centre(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The centre of a picture. [h, w, 3] -> [H, W, 3]"""
    (height, width), (h, w) = pixels.shape[:2], size
    top, left = round((height - h) / 2), round((width - w) / 2)
    return pixels[top : top + h, left : left + w]


def for_evaluation(picture: np.ndarray, image_size: ImageSize) -> np.ndarray:
    """Resizes the short side, bicubic and antialiased, to 256 / 224 of the size; crops the centre.

    Equal to Pillow's pixels within one grey level, see docs/reference.md#evaluation-transform.

    Args:
      picture: uint8 [h, w, 3].
      image_size: side of a square result in pixels, or its height H and width W.

    Returns:
      uint8 [H, W, 3].
    """
    size = sizes.sides(image_size)
    covered = int(EVAL_RATIO * size[0]), int(EVAL_RATIO * size[1])
    wanted = covering(picture, covered)
    for axis in (1, 0):  # Pillow also rounds in between
        if picture.shape[axis] != wanted[axis]:
            picture = _resized(picture, axis, wanted[axis])
    return centre(picture, size)


def _resized(picture: np.ndarray, axis: int, side: int) -> np.ndarray:
    matrix = antialias_matrix(picture.shape[axis], side, method="bicubic").astype(np.float32)
    pixels = np.tensordot(picture.astype(np.float32), matrix, axes=(axis, 1))
    pixels = np.moveaxis(pixels, -1, axis)
    return np.clip(np.floor(pixels + 0.5), 0, 255).astype(np.uint8)
