"""TFDS builders for the datasets that come with packages; importing this module registers them."""

from fd_jax.data.builders.digit_scenes import DigitScenes
from fd_jax.data.builders.digits import Digits
from fd_jax.data.builders.fashion_mnist import FashionMnistDebian
from fd_jax.data.builders.photos import Photos

__all__ = ["DigitScenes", "Digits", "FashionMnistDebian", "Photos"]
