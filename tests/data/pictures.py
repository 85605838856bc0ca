"""Small datasets and transforms that worker processes can import."""

import os
import pathlib
import signal
import time

import numpy as np

from fd_jax.data.datasets import BrokenImageError, Example, SkippedError
from fd_jax.data.elements import Element

SIDE = 4


class Pictures:
    """Images in which every pixel is the index of the image."""

    name = "pictures"
    num_classes = 7
    class_names = None

    def __init__(self, size, *, broken=(), skipped=()):
        self.size, self.broken, self.skipped = size, broken, skipped

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenImageError("cut off")
        if index in self.skipped:
            raise SkippedError
        return Example(np.full((SIDE, SIDE, 3), index % 256, np.uint8), index % 7)

    def describe(self, index):
        return f"picture-{index}"


class Patterns(Pictures):
    """Images of 20 x 24 pixels that differ in every pixel, so that crops and mirrors show."""

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        return Example(pixels, index % 7)


class Noise:
    """Adds noise from the generator it gets, so that a different generator changes the image."""

    image_size = SIDE

    def __call__(self, image, rng):
        return image + rng.integers(0, 256, image.shape, dtype=np.uint8)


class Large(Noise):
    """Images large enough that JAX on a CPU uses the host memory in place, without a copy."""

    image_size = 96

    def __call__(self, image, rng):
        return super().__call__(np.resize(image, (96, 96, 3)), rng)


class Plain:
    """Leaves images as they are."""

    image_size = SIDE

    def __call__(self, image, rng):
        return image


class Hangs(Plain):
    """Sleeps when it gets one of the images."""

    def __init__(self, index, seconds=6):
        self.index, self.seconds = index, seconds

    def __call__(self, image, rng):
        if image[0, 0, 0] == self.index:
            time.sleep(self.seconds)
        return image


class Stops(Plain):
    """Sends its own process a signal at one image, after writing the process id to a file."""

    def __init__(self, index, number, pid_file):
        self.index, self.number, self.pid_file = index, number, pid_file

    def __call__(self, image, rng):
        if image[0, 0, 0] == self.index:
            pathlib.Path(self.pid_file).write_text(str(os.getpid()))
            os.kill(os.getpid(), self.number)
        return image


class Buggy(Plain):
    """Raises an error that is not about the image."""

    def __call__(self, image, rng):
        raise TypeError("a bug, not a broken picture")


class LabelMaps:
    """Makes rows with a label per pixel and a box, as segmentation or stored targets need them."""

    elements = {
        "image": Element((SIDE, SIDE, 3), "uint8"),
        "label_map": Element((SIDE, SIDE), "int32", 255),
        "box": Element((4,), "float32"),
    }

    def __call__(self, example, rng):
        return {"image": example.image, **self.of_index(int(example.image[0, 0, 0]))}

    def of_index(self, index):
        """The elements of a row other than the image."""
        return {
            "label_map": np.arange(index, index + SIDE * SIDE, dtype=np.int32).reshape(SIDE, SIDE),
            "box": np.array([index, 0, 0.5, 1], np.float32),
        }


SIGKILL, SIGSTOP = signal.SIGKILL, signal.SIGSTOP
