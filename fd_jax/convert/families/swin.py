"""The Swin Transformers: Microsoft's layout (EsViT, SwinV2, the original's students), timm's, HF's.

V1 has a bias table and a fused qkv bias per block, V2 a bias network (`cpb_mlp`, in the original's
code `rpe_mlp`), biases of q and v, and a logit scale.
"""

from collections.abc import Iterable, Mapping
import dataclasses
from typing import Any

import numpy as np

from fd_jax.convert.rules.tables import Derived, Drop, Place, Rule, Table
from fd_jax.convert.rules.transforms import FUSED_QKV, FUSED_QKV_BIAS, LINEAR, PER_HEAD, SPLIT_QKV
from fd_jax.convert.source import Part, Source, conv, linear, norm
from fd_jax.models import swin, windows
from fd_jax.models.layers import relative_position_index
from fd_jax.models.spec import ModelSpec

_STAGE = "encoder/stages/{s}"
_BLOCK = f"{_STAGE}/blocks/{{b}}"
_QKV_BIASES = tuple(f"{_BLOCK}/attn/{name}_bias" for name in "qkv")


def _merges(arch: Mapping[str, Any], place: Place) -> bool:
    """Whether a merging ends the stage."""
    return place.stage + 1 < len(arch["depths"])


def _ends_with_norm(arch: Mapping[str, Any], place: Place) -> bool:
    """Whether the block normalises the main branch."""
    every = arch["extra_norm_every"]
    return bool(every) and (place.block + 1) % every == 0


def _shifts(arch: Mapping[str, Any], place: Place) -> bool:
    return place.block % 2 == 1 and _grid(arch, place) > arch["window"]


def _grid(arch: Mapping[str, Any], place: Place) -> int:
    return swin.grids(arch["image_size"], arch["patch_size"], len(arch["depths"]))[place.stage]


def _window(arch: Mapping[str, Any], place: Place) -> int:
    return min(arch["window"], _grid(arch, place))


def _index(arch: Mapping[str, Any], place: Place) -> np.ndarray:
    """Row of the bias table for every query and key of a window. [N, N]"""
    side = _window(arch, place)
    return relative_position_index((side, side), cls_token=False).astype(np.int64)


def _mask(arch: Mapping[str, Any], place: Place) -> np.ndarray:
    """0 or -100 for every pair of tokens in every window. [windows, N, N]"""
    window = arch["window"]
    return windows.shift_mask(_grid(arch, place), window, window // 2)


def _coordinates(arch: Mapping[str, Any], place: Place) -> np.ndarray:
    """Scaled offsets of a window's tokens. [1, 2w-1, 2w-1, 2]"""
    side = _window(arch, place)
    offsets = windows.log_offsets(side, arch["pretrained_windows"][place.stage])
    return offsets.reshape(1, 2 * side - 1, 2 * side - 1, 2).astype(np.float32)


def _where(rules: Iterable[Rule], where) -> tuple[Rule, ...]:
    return tuple(dataclasses.replace(rule, where=where) for rule in rules)


def _merging(source: str) -> tuple[Rule, ...]:
    target = f"{_STAGE}/downsample"
    reduction = Rule(f"{source}.reduction.weight", f"{target}/reduction/kernel", LINEAR)
    return _where((reduction, *norm(f"{source}.norm", f"{target}/norm")), _merges)


def _trunk(merging: str) -> Table:
    """What Microsoft and timm call alike in both versions, but for the stage of a merging."""
    block = "layers.{s}.blocks.{b}"
    return Table(
        (
            *conv("patch_embed.proj", "encoder/patch_embed"),
            *norm("patch_embed.norm", "encoder/patch_norm"),
            *norm(f"{block}.norm1", f"{_BLOCK}/norm1"),
            Rule(f"{block}.attn.qkv.weight", f"{_BLOCK}/attn/qkv/kernel", FUSED_QKV),
            *linear(f"{block}.attn.proj", f"{_BLOCK}/attn/proj"),
            *norm(f"{block}.norm2", f"{_BLOCK}/norm2"),
            *linear(f"{block}.mlp.fc1", f"{_BLOCK}/mlp/fc1"),
            *linear(f"{block}.mlp.fc2", f"{_BLOCK}/mlp/fc2"),
            *_merging(merging),
            *norm("norm", "encoder/norm"),
        ),
        (),
        (
            Derived(f"{block}.attn.relative_position_index", _index),
            Derived(f"{block}.attn_mask", _mask, where=_shifts),
        ),
    )


def _bias_network(source: str) -> tuple[Rule, ...]:
    target = f"{_BLOCK}/attn/rel_pos_bias"
    return (
        *linear(f"{source}.0", f"{target}/fc1"),
        Rule(f"{source}.2.weight", f"{target}/fc2/kernel", LINEAR),
    )


def _v1(merging: str) -> Table:
    attn = "layers.{s}.blocks.{b}.attn"
    return _trunk(merging) + Table(
        (
            Rule(f"{attn}.qkv.bias", _QKV_BIASES, FUSED_QKV_BIAS),
            Rule(f"{attn}.relative_position_bias_table", f"{_BLOCK}/attn/rel_pos_bias/table"),
        )
    )


def _v2(merging: str, bias_network: str) -> Table:
    attn = "layers.{s}.blocks.{b}.attn"
    return _trunk(merging) + Table(
        (
            Rule(f"{attn}.q_bias", f"{_BLOCK}/attn/q_bias"),
            Rule(f"{attn}.v_bias", f"{_BLOCK}/attn/v_bias"),
            Rule(f"{attn}.logit_scale", f"{_BLOCK}/attn/logit_scale", PER_HEAD),
            *_bias_network(f"{attn}.{bias_network}"),
        ),
        (),
        # Computed in float32 there.
        (Derived(f"{attn}.relative_coords_table", _coordinates, tolerance=1e-5),),
    )


HEAD = Table(linear("head", "head"))
_TIMM_HEAD = Table(linear("head.fc", "head"))
_EXTRA_NORM = Table(
    _where(norm("layers.{s}.blocks.{b}.enorm", f"{_BLOCK}/extra_norm"), _ends_with_norm)
)

V1 = _v1("layers.{s}.downsample")
V2 = _v2("layers.{s}.downsample", "cpb_mlp")
OFFICIAL_V2 = _v2("layers.{s}.downsample", "rpe_mlp") + _EXTRA_NORM
TIMM_V1 = _v1("layers.{s+1}.downsample") + _TIMM_HEAD
TIMM_V2 = _v2("layers.{s+1}.downsample", "cpb_mlp") + _TIMM_HEAD

_LAYER = "encoder.layers.{s}.blocks.{b}"
_SELF = f"{_LAYER}.attention.self"
_HF_QKV = tuple(f"{_SELF}.{name}" for name in ("query", "key", "value"))
_HF_TRUNK = Table(
    (
        *conv("embeddings.patch_embeddings.projection", "encoder/patch_embed"),
        *norm("embeddings.norm", "encoder/patch_norm"),
        *norm(f"{_LAYER}.layernorm_before", f"{_BLOCK}/norm1"),
        Rule(tuple(f"{name}.weight" for name in _HF_QKV), f"{_BLOCK}/attn/qkv/kernel", SPLIT_QKV),
        Rule(f"{_SELF}.query.bias", f"{_BLOCK}/attn/q_bias"),
        Rule(f"{_SELF}.value.bias", f"{_BLOCK}/attn/v_bias"),
        *linear(f"{_LAYER}.attention.output.dense", f"{_BLOCK}/attn/proj"),
        *norm(f"{_LAYER}.layernorm_after", f"{_BLOCK}/norm2"),
        *linear(f"{_LAYER}.intermediate.dense", f"{_BLOCK}/mlp/fc1"),
        *linear(f"{_LAYER}.output.dense", f"{_BLOCK}/mlp/fc2"),
        *_merging("encoder.layers.{s}.downsample"),
        *norm("layernorm", "encoder/norm"),
    ),
    (),
    (Derived(f"{_SELF}.relative_position_index", _index),),
)
HUGGINGFACE_V1 = _HF_TRUNK + Table(
    (
        Rule(f"{_SELF}.key.bias", f"{_BLOCK}/attn/k_bias"),
        Rule(f"{_SELF}.relative_position_bias_table", f"{_BLOCK}/attn/rel_pos_bias/table"),
    )
)
HUGGINGFACE_V2 = _HF_TRUNK + Table(
    (
        Rule(f"{_SELF}.logit_scale", f"{_BLOCK}/attn/logit_scale", PER_HEAD),
        *_bias_network(f"{_SELF}.continuous_position_bias_mlp"),
    ),
    (),
    (Derived(f"{_SELF}.relative_coords_table", _coordinates, tolerance=1e-5),),
)
HUGGINGFACE_HEAD = Table(linear("classifier", "head"))
_OPTIONAL_HEAD = Table(
    tuple(dataclasses.replace(rule, optional=True) for rule in HUGGINGFACE_HEAD.rules)
)


SIZES = {
    "B": {"embed_width": 128, "depths": [2, 2, 18, 2], "heads": [4, 8, 16, 32]},
    "L": {"embed_width": 192, "depths": [2, 2, 18, 2], "heads": [6, 12, 24, 48]},
    "G": {"embed_width": 512, "depths": [2, 2, 42, 4], "heads": [16, 32, 64, 128]},
}


def arch_v1(size: str, image_size: int, window: int) -> dict[str, Any]:
    """Architecture of a Swin V1."""
    return {
        "image_size": image_size,
        "patch_size": 4,
        **SIZES[size],
        "window": window,
        "mlp_ratio": 4,
        "activation": "gelu_erf",
        "norm_eps": 1e-5,
        "final_norm": True,
    }


def arch_v2(size: str, image_size: int, window: int, **changes: Any) -> dict[str, Any]:
    """Architecture of a Swin V2, Microsoft's unless changed."""
    return {
        **arch_v1(size, image_size, window),
        "position": "rpb",
        "pretrained_windows": [0, 0, 0, 0],
        "residual_scale": 0.0,
        "extra_norm_every": 0,
        **changes,
    }


_DINO_HEADS = Table(
    (), tuple(Drop(f"{name}.*", "EsViT's projection heads") for name in ("head", "head_dense"))
)
ESVIT = Part(
    V1 + _DINO_HEADS, ModelSpec("swin", arch_v1("B", 224, 14)), ("student/",), ("module.",)
)


def _microsoft(size: str, name: str, image_size: int, window: int, **changes: Any) -> Source:
    spec = ModelSpec("swin_v2", arch_v2(size, image_size, window, **changes), pooling="mean")
    return Source(
        name,
        f"{name}.pth",
        {"classifier": Part(V2 + HEAD, spec, ("model/", ""))},
        "transformers Swinv2ForImageClassification",
    )


def _hugging_face(family: str, name: str, repository: str, arch: Mapping[str, Any]) -> Source:
    version, prefix = ("2", "swinv2.") if family == "swin_v2" else ("", "swin.")
    trunk = HUGGINGFACE_V2 if version else HUGGINGFACE_V1
    spec = ModelSpec(family, dict(arch), pooling="mean")
    return Source(
        name,
        f"{repository} model.safetensors",
        {"classifier": Part(trunk + _OPTIONAL_HEAD, spec, strip=(prefix,))},
        f"transformers Swin{'v2' if version else ''}ForImageClassification",
        hf=True,
    )


def _timm(family: str, name: str, arch: Mapping[str, Any]) -> Source:
    v2 = family == "swin_v2"
    spec = ModelSpec(family, dict(arch), pooling="mean")
    return Source(
        f"timm_{name}",
        f"timm/{name}.ms_in1k model.safetensors",
        {"classifier": Part(TIMM_V2 if v2 else TIMM_V1, spec)},
        f"transformers Swin{'v2' if v2 else ''}ForImageClassification",
        "names of timm from 0.8.12 on, where a merging belongs to the stage after it",
    )


SOURCES = (
    Source(
        "esvit_swin_base_w14",
        "checkpoint_best.pth of EsViT's swin_base, window 14",
        {
            "student": ESVIT,
            "teacher": dataclasses.replace(ESVIT, under=("teacher/",)),
        },
        "Swin V1 in plain torch (transformers' has no table for a window that the grid clips)",
        "the original distils the student branch, with the epsilon given here; EsViT itself has "
        "1e-6",
    ),
    _microsoft("B", "swinv2_base_patch4_window8_256", 256, 8),
    _microsoft("L", "swinv2_large_patch4_window12_192_22k", 192, 12),
    _microsoft(
        "L",
        "swinv2_large_patch4_window12to16_192to256_22kto1k_ft",
        256,
        16,
        pretrained_windows=[12, 12, 12, 6],
    ),
    Source(
        "swinv2_giant",
        "none: SwinV2-G was never released; names as the original's class gives them",
        {
            "encoder": Part(
                OFFICIAL_V2,
                ModelSpec(
                    "swin_v2", arch_v2("G", 256, 16, residual_scale=1e-5, extra_norm_every=6)
                ),
                ("model/", ""),
            )
        },
        "Swin V2 in plain torch (transformers' has no norms on the main branch)",
        "heads, window and size are assumed: its authors give channels, depths and the norm after "
        "every sixth block",
    ),
    _hugging_face(
        "swin",
        "swin_base_patch4_window7_224_hf",
        "microsoft/swin-base-patch4-window7-224",
        arch_v1("B", 224, 7),
    ),
    _hugging_face(
        "swin_v2",
        "swinv2_base_patch4_window8_256_hf",
        "microsoft/swinv2-base-patch4-window8-256",
        arch_v2("B", 256, 8),
    ),
    _timm("swin", "swin_base_patch4_window7_224", arch_v1("B", 224, 7)),
    _timm("swin_v2", "swinv2_base_window8_256", arch_v2("B", 256, 8)),
)
