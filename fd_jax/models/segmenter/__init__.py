"""Semantic segmentation: from the maps of an encoder's blocks to logits for every class.

`network.Segmenter` holds all of it. `necks.py` makes the four levels of a pyramid, `decoders.py`
turns levels into logits; `convolution.py`, `normalization.py` and `resampling.py` have their parts.
"""

from fd_jax.models.segmenter.network import (
    Decoder,
    Levels,
    Segmentation,
    Segmenter,
    levels,
    maps_of,
    widths_of,
)

__all__ = ["Decoder", "Levels", "Segmentation", "Segmenter", "levels", "maps_of", "widths_of"]
