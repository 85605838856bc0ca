"""Data of semantic segmentation: pictures in which each pixel has a class."""

from fd_jax.data.base import IGNORED, Picture
from fd_jax.data.segmentation.feed import SegmentationFeed
from fd_jax.data.segmentation.labels import Labels, Scene
from fd_jax.data.segmentation.sources import open_scenes

__all__ = ["IGNORED", "Labels", "Picture", "Scene", "SegmentationFeed", "open_scenes"]
