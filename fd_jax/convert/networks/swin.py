"""Swin transformers: parameter paths, published sizes, and tensors that follow from windows."""

from typing import Any

import numpy as np

from fd_jax.convert.layout import need
from fd_jax.convert.networks.network import Arch, Network
from fd_jax.convert.rules.tables import Place
from fd_jax.models import swin, windows
from fd_jax.models.attention import relative_position_index

V1 = Network(
    depths=lambda arch: arch["depths"],
    width=lambda arch: arch["embed_width"] << len(arch["depths"]) - 1,  # doubles at each stage
    positions=lambda arch: "windows",
)
V2 = Network(V1.depths, V1.width, positions=lambda arch: arch["position"])

STAGE = "encoder/stages/{s}"
BLOCK = f"{STAGE}/blocks/{{b}}"
QKV = f"{BLOCK}/attn/qkv/kernel"
QKV_BIASES = tuple(f"{BLOCK}/attn/{name}_bias" for name in "qkv")

SIZES: dict[str, dict[str, Any]] = {
    "B": {"embed_width": 128, "depths": [2, 2, 18, 2], "heads": [4, 8, 16, 32]},
    "L": {"embed_width": 192, "depths": [2, 2, 18, 2], "heads": [6, 12, 24, 48]},
    "G": {"embed_width": 512, "depths": [2, 2, 42, 4], "heads": [16, 32, 64, 128]},
}


def _grid(arch: Arch, stage: int) -> int:
    return swin.grids(arch["image_size"], arch["patch_size"], len(arch["depths"]))[stage]


def _window(arch: Arch, place: Place) -> int:
    return min(arch["window"], _grid(arch, place.stage))


def merges(arch: Arch, place: Place) -> bool:
    """Whether a merging ends the stage."""
    return place.stage + 1 < len(arch["depths"])


def ends_with_norm(arch: Arch, place: Place) -> bool:
    """Whether the block normalises the main branch."""
    every = arch["extra_norm_every"]
    return bool(every) and (place.block + 1) % every == 0


def shifts(arch: Arch, place: Place) -> bool:
    """Whether the block's windows are shifted."""
    return place.block % 2 == 1 and _grid(arch, place.stage) > arch["window"]


def bias_index(arch: Arch, place: Place) -> np.ndarray:
    """Row of the bias table for every query and key of a window. int64 [N, N]"""
    side = _window(arch, place)
    return relative_position_index((side, side), cls_token=False).astype(np.int64)


def shift_mask(arch: Arch, place: Place) -> np.ndarray:
    """0 or -100 for every pair of tokens in every window. [windows, N, N]"""
    window = arch["window"]
    return windows.shift_mask(_grid(arch, place.stage), window, window // 2)


def coordinates(arch: Arch, place: Place) -> np.ndarray:
    """Scaled offsets of a window's tokens. float32 [1, 2w-1, 2w-1, 2]"""
    side = _window(arch, place)
    offsets = windows.log_offsets(side, arch["pretrained_windows"][place.stage])
    return offsets.reshape(1, 2 * side - 1, 2 * side - 1, 2).astype(np.float32)


GRIDS_HOLD_WINDOWS = need(
    "grids no smaller than the window", lambda arch: _grid(arch, -1) >= arch["window"]
)
BIAS_PER_BLOCK = need("a position bias per block", lambda arch: arch["position"] == "rpb")
OWN_WINDOWS = need(
    "coordinates scaled by the window itself", lambda arch: not any(arch["pretrained_windows"])
)
NO_EXTRA_NORMS = need("no norms on the main branch", lambda arch: not arch["extra_norm_every"])
