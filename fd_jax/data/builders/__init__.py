"""TFDS builders of the datasets that come with Python packages; importing registers them."""

from fd_jax.data.builders.digits import Digits
from fd_jax.data.builders.photos import Photos

__all__ = ["Digits", "Photos"]
