"""Swin transformers: parameter paths, published sizes, what shapes and index tensors tell."""

from collections.abc import Mapping, Sequence
import math
import re
from typing import Any

import numpy as np

from fd_jax.convert.containers.tensors import Tensor
from fd_jax.convert.layout import need
from fd_jax.convert.networks.network import (
    PIXELS,
    STAND_INS,
    Arch,
    Network,
    Settled,
    Shapes,
    patches,
    shape_of,
)
from fd_jax.convert.rules.tables import Place
from fd_jax.errors import ConversionError
from fd_jax.models import swin, windows
from fd_jax.models.attention import relative_position_index

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
    return swin.windows_of(arch)[place.stage].side


def merges(arch: Arch, place: Place) -> bool:
    """Whether a merging ends the stage."""
    return place.stage + 1 < len(arch["depths"])


def ends_with_norm(arch: Arch, place: Place) -> bool:
    """Whether the block normalises the main branch."""
    every = arch["extra_norm_every"]
    return bool(every) and (place.block + 1) % every == 0


def shifts(arch: Arch, place: Place) -> bool:
    """Whether the block's windows are shifted."""
    return place.block % 2 == 1 and swin.windows_of(arch)[place.stage].shifts


def _decides_windows(arch: Arch) -> bool:
    """Whether its windows are those that its image size decides, see `swin.Swin`."""
    window = arch["window"]
    own, deciding = (
        swin.grids(size, arch["patch_size"], len(arch["depths"]))
        for size in (arch["image_size"], arch.get("windows_at", arch["image_size"]))
    )
    pairs = zip(own, deciding, strict=True)
    return all(one == other or min(one, other) > window for one, other in pairs)


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
FREE_WINDOWS = need("windows that the size of its input decides", _decides_windows)
NO_EXTRA_NORMS = need("no norms on the main branch", lambda arch: not arch["extra_norm_every"])


# Buffers whose shapes tell windows, and the stage in their names.
_COORDINATES = re.compile(r"layers\.(\d+)\.blocks\.0\..*relative_coords_table")
_MASK = re.compile(r"layers\.(\d+)\.blocks\.1\.attn_mask")
_INDEX = re.compile(r"layers\.(\d+)\.blocks\.0\..*relative_position_index")


def _first_block(stage: int) -> str:
    return BLOCK.format(s=stage, b=0)


def _told(shapes: Shapes, depths: Sequence[int], heads: str, heads_axis: int) -> dict[str, Any]:
    """What both versions have in common.

    Args:
      shapes: of the parameters.
      depths: blocks of each stage.
      heads: the parameter of an attention with an axis of heads.
      heads_axis: this axis.
    """
    patch_size, width = patches(shapes)
    hidden = shape_of(shapes, f"{_first_block(0)}/mlp/fc1/kernel", 2)[1]
    if hidden % width:
        raise ConversionError(f"its MLPs are {hidden} wide, no multiple of {width}")
    axes = heads_axis + 1
    return {
        "patch_size": patch_size,
        "embed_width": width,
        "depths": list(depths),
        "heads": [
            shape_of(shapes, f"{_first_block(stage)}/attn/{heads}", axes)[heads_axis]
            for stage in range(len(depths))
        ],
        "mlp_ratio": hidden // width,
        "final_norm": "encoder/norm/scale" in shapes,
    }


def _told_v1(
    shapes: Shapes, depths: Sequence[int], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    table = "rel_pos_bias/table"
    found = _told(shapes, depths, table, 1)
    found |= _size_of_buffers(tensors, found["patch_size"])
    rows = shape_of(shapes, f"{_first_block(0)}/attn/{table}", 2)[0]
    window = (math.isqrt(rows) + 1) // 2
    if (2 * window - 1) ** 2 != rows:
        raise ConversionError(f"a bias table has {rows} rows: not the offsets of a square window")
    return found | {"window": window}


def _told_v2(
    shapes: Shapes, depths: Sequence[int], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    found = _told(shapes, depths, "logit_scale", 0)
    found |= _size_of_buffers(tensors, found["patch_size"])
    return found | _windows_of_buffers(tensors, len(depths))


def _size_of_buffers(tensors: Mapping[str, Tensor], patch_size: int) -> dict[str, Any]:
    """The image size, from the masks of shifted windows or from a window that its grid clips."""
    sides: dict[int, int] = {}
    for name, tensor in tensors.items():
        if (mask := _MASK.search(name)) and len(tensor.shape) == 3:
            grid = math.isqrt(tensor.shape[0]) * math.isqrt(tensor.shape[1])
            return {"image_size": grid * patch_size << int(mask[1])}
        if (index := _INDEX.search(name)) and len(tensor.shape) == 2:
            sides[int(index[1])] = math.isqrt(tensor.shape[0])
    for stage, side in sides.items():
        if side < sides.get(0, side):
            return {"image_size": side * patch_size << stage}
    return {}


def _windows_of_buffers(tensors: Mapping[str, Tensor], stages: int) -> dict[str, Any]:
    """Windows, and those of pre-training, from buffers that some files hold beside the weights."""
    sides: dict[int, int] = {}
    trained: dict[int, int] = {}
    for name, tensor in tensors.items():
        if (index := _INDEX.search(name)) and len(tensor.shape) == 2:
            sides[int(index[1])] = math.isqrt(tensor.shape[0])
        if (table := _COORDINATES.search(name)) and len(tensor.shape) == 4:
            side = (tensor.shape[1] + 1) // 2
            sides[int(table[1])] = side
            trained[int(table[1])] = _pretrained_window(tensor.load(), side)
    found: dict[str, Any] = {"window": sides[0]} if 0 in sides else {}
    if len(trained) == stages:
        found["pretrained_windows"] = [trained[stage] for stage in range(stages)]
    return found


def _pretrained_window(table: np.ndarray, side: int) -> int:
    """The window that scaled coordinates belong to; 0 for the window itself."""
    reach = 8 * (side - 1) / (2 ** (3 * float(np.max(table))) - 1) if side > 1 else 0
    found = round(reach) + 1
    return 0 if found == side or not reach else found


def _asks_v1(told: Mapping[str, Any]) -> tuple[str, ...]:
    del told
    return ("image_size", "activation", "norm_eps", *PIXELS)


def _asks_v2(told: Mapping[str, Any]) -> tuple[str, ...]:
    return (*_asks_v1(told), "window", "pretrained_windows")


_FIELDS = (
    "image_size patch_size embed_width depths heads window mlp_ratio activation norm_eps final_norm"
).split()


def _arch_v1(settled: Settled) -> tuple[dict[str, Any], list[str]]:
    return {name: settled[name].value for name in _FIELDS}, []


def _arch_v2(settled: Settled) -> tuple[dict[str, Any], list[str]]:
    arch, remarks = _arch_v1(settled)
    fixed = {"windows_at": arch["image_size"]} if "fixed_windows" in settled else {}
    return {
        **arch,
        **fixed,
        "position": "rpb",
        # transformers has four by default, whatever the number of stages.
        "pretrained_windows": list(settled["pretrained_windows"].value)[: len(arch["depths"])],
        # The start of fresh norms; a file has the trained ones.
        "residual_scale": 0.0,
        "extra_norm_every": 0,
    }, remarks


def _stand_ins(told: Mapping[str, Any]) -> dict[str, Any]:
    stages = len(told["depths"])
    window = told.get("window", 7)
    return {
        **STAND_INS,
        "window": window,
        "pretrained_windows": [0] * stages,
        "image_size": told["patch_size"] * window << stages - 1,
    }


def _last_width(arch: Arch) -> int:
    return arch["embed_width"] << len(arch["depths"]) - 1  # doubles at each stage


V1 = Network(
    depths=lambda arch: arch["depths"],
    width=_last_width,
    positions=lambda arch: "windows",
    told=_told_v1,
    asks=_asks_v1,
    arch=_arch_v1,
    stand_ins=_stand_ins,
)
V2 = Network(
    depths=lambda arch: arch["depths"],
    width=_last_width,
    positions=lambda arch: arch["position"],
    told=_told_v2,
    asks=_asks_v2,
    arch=_arch_v2,
    stand_ins=_stand_ins,
)
