"""BEiT's ViT, which is the official feature distillation student: relative positions, no k bias."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fd_jax.convert.rules.tables import Derived, Place, Rule, Table
from fd_jax.convert.rules.transforms import FUSED_QKV
from fd_jax.convert.source import SIZES, Part, Source, conv, linear, norm
from fd_jax.models.layers import relative_position_index
from fd_jax.models.spec import ModelSpec

_BLOCK = "encoder/blocks/{i}"


def _index(arch: Mapping[str, Any], place: Place) -> np.ndarray:
    """Row of the bias table for every query and key. [N, N]"""
    del place
    side = arch["image_size"] // arch["patch_size"]
    return relative_position_index((side, side), cls_token=arch["cls_token"]).astype(np.int64)


# What the shared and the per-block variant have in common.
_TRUNK = Table(
    (
        Rule("cls_token", "encoder/cls_token"),
        *conv("patch_embed.proj", "encoder/patch_embed"),
        Rule("blocks.{i}.gamma_1", f"{_BLOCK}/gamma_1"),
        Rule("blocks.{i}.gamma_2", f"{_BLOCK}/gamma_2"),
        *norm("blocks.{i}.norm1", f"{_BLOCK}/norm1"),
        Rule("blocks.{i}.attn.q_bias", f"{_BLOCK}/attn/q_bias"),
        Rule("blocks.{i}.attn.v_bias", f"{_BLOCK}/attn/v_bias"),
        Rule("blocks.{i}.attn.qkv.weight", f"{_BLOCK}/attn/qkv/kernel", FUSED_QKV),
        *linear("blocks.{i}.attn.proj", f"{_BLOCK}/attn/proj"),
        *norm("blocks.{i}.norm2", f"{_BLOCK}/norm2"),
        *linear("blocks.{i}.mlp.fc1", f"{_BLOCK}/mlp/fc1"),
        *linear("blocks.{i}.mlp.fc2", f"{_BLOCK}/mlp/fc2"),
    )
)
SHARED = _TRUNK + Table(
    (
        Rule("rel_pos_bias.relative_position_bias_table", "encoder/rel_pos_bias/table"),
        *norm("norm", "encoder/norm"),
    ),
    (),
    (Derived("rel_pos_bias.relative_position_index", _index),),
)
PER_BLOCK = _TRUNK + Table(
    (
        Rule("blocks.{i}.attn.relative_position_bias_table", f"{_BLOCK}/attn/rel_pos_bias/table"),
        *norm("fc_norm", "fc_norm"),
        *linear("head", "head"),
    ),
    (),
    (Derived("blocks.{i}.attn.relative_position_index", _index),),
)


def arch(size: str, patch_size: int, *, shared: bool) -> dict[str, Any]:
    """Architecture of the distillation student (shared table) or the classifier (per block)."""
    return {
        "image_size": 224,
        "patch_size": patch_size,
        **SIZES[size],
        "position": "shared_rpb" if shared else "rpb",
        "cls_token": True,
        "registers": 0,
        "ln_pre": False,
        "final_norm": shared,  # the classifier normalises the mean token (fc_norm) instead
        "activation": "gelu_erf",
        "norm_eps": 1e-6,
        "layer_scale": 0.1,
        "qkv_bias": "qv",
        "patch_bias": True,
    }


_HALF = (0.5, 0.5, 0.5)

SOURCES = (
    Source(
        "timm_beit_base_patch16_224",
        "timm/beit_base_patch16_224.in22k_ft_in22k_in1k model.safetensors",
        {
            "classifier": Part(
                PER_BLOCK,
                ModelSpec(
                    "vit",
                    arch("B", 16, shared=False),
                    mean=_HALF,
                    std=_HALF,
                    pooling="mean_norm",
                ),
                ("model/", "module/", ""),
            )
        },
        "transformers BeitForImageClassification",
        "the head reads fc_norm of the mean patch token; BEiT v2 has ImageNet statistics",
    ),
)
