"""Weights that follow from names and shapes alone, so that no file has to hold them.

`benchmarks.coverage` fills the networks of timm, open_clip and transformers with them, and the
tests fill files of the same names with them. NumPy only.
"""

from collections.abc import Mapping, Sequence
import math
import re
import zlib

import numpy as np

SCALES = ("gamma", "gamma_1", "gamma_2", "lambda1", "scale", "weight", "layer_scale_parameter")
EMBEDDED = (
    "patch_embed",
    "conv1.",
    "pos_embed",
    "position_embed",
    "positional",
    "_token",
    "class_",
)

_NOT_EMBEDDED = re.compile("norm|relative")


def array(name: str, shape: Sequence[int]) -> np.ndarray:
    """The tensor of this name: at the scale of a trained network, so that each counts. float32.

    Scales of norms and branches are near 1, matrices keep the size of what they map, and Swin V2's
    logit scales are near their start. What enters the first norm is small, so that its epsilon
    counts.
    """
    shape = tuple(shape)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    noise = np.asarray(rng.standard_normal(shape, np.float32))
    last = name.rpartition(".")[2]
    embedded = any(part in name for part in EMBEDDED) and not _NOT_EMBEDDED.search(name)
    size = np.float32(0.03 if embedded else 1.0)
    if last == "logit_scale" and len(shape) == 3:
        return np.float32(2.3) + np.float32(0.3) * noise
    if last == "running_var":  # what enters the first norms of a ResNet's blocks is small too
        small = "bn1." in name or "conv1." in name
        return np.float32(1e-3 if small else 1.0) * (1 + np.float32(0.2) * noise)
    if len(shape) == 1:
        return np.float32(last in SCALES) + np.float32(0.2) * size * noise
    if embedded and len(shape) < 4 or "rel" in last or len(shape) < 2:
        return np.asarray(size * noise)
    return size * noise / np.float32(math.sqrt(math.prod(shape[1:])))


def is_statistic(name: str) -> bool:
    """Whether a tensor is a running statistic of a BatchNorm."""
    return name.endswith((".running_mean", ".running_var"))


def arrays(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """The tensors of all these names."""
    return {name: array(name, shape) for name, shape in shapes.items()}


def images(height: int, width: int | None = None, count: int = 1) -> np.ndarray:
    """Pictures as they come from a file. [B, H, W, 3] uint8."""
    shape = (count, height, width or height, 3)
    return np.random.default_rng(17).integers(0, 256, shape, np.uint8)
