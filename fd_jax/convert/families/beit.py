"""BEiT's ViT, also the student of the original repository: relative positions, no k bias."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fd_jax.convert.families import timm_vit
from fd_jax.convert.family import Family
from fd_jax.convert.huggingface import HuggingFace, vit_fields
from fd_jax.convert.layout import EPSILON_1E6, EXACT_GELU, Need
from fd_jax.convert.networks.vit import (
    BIASES_QV,
    BLOCK,
    CLASS_TOKEN,
    NOT_ROTARY,
    PATCH_BIAS,
    POOL_HEAD,
    QKV,
    SIZES,
)
from fd_jax.convert.rules.tables import (
    Derived,
    Drop,
    Place,
    Rule,
    Table,
    conv,
    linear,
    norm,
    optional,
    prefixed,
    sometimes,
)
from fd_jax.convert.rules.transforms import FUSED_QKV
from fd_jax.convert.source import Part, Source
from fd_jax.convert.style import Style
from fd_jax.convert.timm import Timm, arguments
from fd_jax.models.attention import relative_position_index
from fd_jax.models.sizes import patch_grid
from fd_jax.models.spec import ModelSpec


def index(arch: Mapping[str, Any], place: Place) -> np.ndarray:
    """Row of the bias table for every query and key. [N, N]"""
    del place
    grid = patch_grid(arch["image_size"], arch["patch_size"])
    return relative_position_index(grid, cls_token=arch["cls_token"]).astype(np.int64)


# What the shared and the per-block variant have in common.
_TRUNK = Table(
    (
        Rule("cls_token", "encoder/cls_token"),
        *conv("patch_embed.proj", "encoder/patch_embed"),
        Rule("blocks.{i}.gamma_1", f"{BLOCK}/gamma_1"),
        Rule("blocks.{i}.gamma_2", f"{BLOCK}/gamma_2"),
        *norm("blocks.{i}.norm1", f"{BLOCK}/norm1"),
        Rule("blocks.{i}.attn.q_bias", f"{BLOCK}/attn/q_bias"),
        Rule("blocks.{i}.attn.v_bias", f"{BLOCK}/attn/v_bias"),
        Rule("blocks.{i}.attn.qkv.weight", QKV, FUSED_QKV),
        *linear("blocks.{i}.attn.proj", f"{BLOCK}/attn/proj"),
        *norm("blocks.{i}.norm2", f"{BLOCK}/norm2"),
        *linear("blocks.{i}.mlp.fc1", f"{BLOCK}/mlp/fc1"),
        *linear("blocks.{i}.mlp.fc2", f"{BLOCK}/mlp/fc2"),
    )
)
SHARED = _TRUNK + Table(
    (
        Rule("rel_pos_bias.relative_position_bias_table", "encoder/rel_pos_bias/table"),
        *norm("norm", "encoder/norm"),
    ),
    (),
    (Derived("rel_pos_bias.relative_position_index", index),),
)
PER_BLOCK = _TRUNK + Table(
    (
        Rule("blocks.{i}.attn.relative_position_bias_table", f"{BLOCK}/attn/rel_pos_bias/table"),
        *norm("fc_norm", "fc_norm"),
        *linear("head", "head"),
    ),
    (),
    (Derived("blocks.{i}.attn.relative_position_index", index),),
)
TIMM = Table(
    tuple(dict.fromkeys((*SHARED.rules, *PER_BLOCK.rules, Rule("pos_embed", "encoder/pos_embed")))),
    (),
    (*SHARED.derived, *PER_BLOCK.derived),
)

_LAYER = "encoder.layer.{i}"
_TABLE = "relative_position_bias.relative_position_bias_table"
HUGGINGFACE = timm_vit.HUGGINGFACE + Table(
    (
        Rule(f"{_LAYER}.lambda_1", f"{BLOCK}/gamma_1"),
        Rule(f"{_LAYER}.lambda_2", f"{BLOCK}/gamma_2"),
        Rule(f"encoder.{_TABLE}", "encoder/rel_pos_bias/table"),
        Rule(f"{_LAYER}.attention.attention.{_TABLE}", f"{BLOCK}/attn/rel_pos_bias/table"),
        *norm("pooler.layernorm", "fc_norm"),
    )
)


# --- networks of any size

_BEIT_MORE = (
    *SHARED.rules[len(_TRUNK.rules) :],
    *PER_BLOCK.rules[len(_TRUNK.rules) :],
    Rule("pos_embed", "encoder/pos_embed"),
)
_SOMETIMES = ("gamma_", "q_bias", "v_bias")
_BEIT_DROPS = (
    Drop("mask_token", "only masked-image training uses it"),
    Drop("lm_head.*", "the head of masked-image training"),
    Drop("attn_pool.*", POOL_HEAD),
)


TIMM_STYLE = Style(
    "timm_beit",
    "timm's Beit",
    "vit",
    {
        "": Table(
            (*sometimes(_TRUNK.rules, _SOMETIMES), *optional(dict.fromkeys(_BEIT_MORE))),
            _BEIT_DROPS,
            TIMM.derived,
        )
    },
    ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.gamma_1", "cls_token"),
    norms=("norm.weight", "fc_norm.weight"),
    one_of=(
        (
            "rel_pos_bias.relative_position_bias_table",
            "blocks.0.attn.relative_position_bias_table",
            "pos_embed",
        ),
    ),
    unlike=("storage_tokens", "reg_token", "rope*", "blocks.*.mlp.fc1_g.*", "blocks.*.mlp.norm.*"),
)
_HF_DROPS = (
    Drop("embeddings.mask_token", "only masked-image training uses it"),
    Drop("../lm_head.*", "the head of masked-image training"),
    Drop("../layernorm.*", "the norm before the head of masked-image training"),
    Drop("../pooler.dense.*", "the pooler, which no task here reads"),
)
_HF_INDEX = tuple(
    Derived(name, index)
    for name in (
        "encoder.relative_position_bias.relative_position_index",
        f"{_LAYER}.attention.attention.relative_position_bias.relative_position_index",
    )
)
HUGGINGFACE_STYLE = Style(
    "hf_beit",
    "transformers' BeitModel",
    "vit",
    {
        "": Table(
            (
                *sometimes(
                    HUGGINGFACE.rules,
                    (
                        "lambda_",
                        "relative_position",
                        "position_embeddings",
                        "pooler",
                        "layernorm.weight",
                        "layernorm.bias",
                        "attention.query.bias",
                        "attention.key.bias",
                        "attention.value.bias",
                    ),
                ),
                *optional(linear("../classifier", "head")),
            ),
            _HF_DROPS,
            _HF_INDEX,
        )
    },
    (
        "embeddings.patch_embeddings.projection.weight",
        "encoder.layer.0.attention.attention.query.weight",
        "encoder.layer.0.intermediate.dense.weight",
    ),
    one_of=(
        (
            f"encoder.{_TABLE}",
            _LAYER.format(i=0) + f".attention.attention.{_TABLE}",
        ),
    ),
    unlike=("embeddings.position_embeddings",),
    bases=("beit.", "data2vec_vision."),
    configs=("beit", "data2vec-vision"),
    renames=(
        (
            r"(^|\.)layers\.(\d+)\.relative_position",
            r"\1layers.\2.attention.attention.relative_position",
        ),
        (r"(^|\.)shared_position_bias\.", r"\1encoder.relative_position_bias."),
        *timm_vit.IN_MEMORY,
    ),
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
        style="timm_beit",
    ),
)


def _fields(spec: ModelSpec) -> dict[str, Any]:
    position = spec.arch["position"]
    return {
        **vit_fields(spec),
        "use_absolute_position_embeddings": position == "ape",
        "use_relative_position_bias": position == "rpb",
        "use_shared_relative_position_bias": position == "shared_rpb",
        "use_mean_pooling": not spec.arch["final_norm"],
        "use_mask_token": False,
        "layer_scale_init_value": spec.arch["layer_scale"] or 0.0,
    }


_HAS_HEAD = Need(
    "a classifier head on the class token, or on the normalised mean without a final norm",
    lambda spec, paths: (
        "head/kernel" in paths
        and spec.pooling == ("cls" if spec.arch["final_norm"] else "mean_norm")
    ),
)
_ONE_NORM = Need(
    "a norm at the end, of all tokens or of their mean",
    lambda spec, paths: spec.arch["final_norm"] or "fc_norm/scale" in paths,
)
_NEEDS = (BIASES_QV, NOT_ROTARY)
_HF_NEEDS = (CLASS_TOKEN, PATCH_BIAS, *_NEEDS)
LAYOUTS = (
    Timm(
        "Beit",
        "vit",
        TIMM,
        (CLASS_TOKEN, PATCH_BIAS, *_NEEDS, EXACT_GELU, EPSILON_1E6, _ONE_NORM),
        style=TIMM_STYLE,
        parts=arguments.beit_parts,
        arguments=arguments.beit_arguments,
        base=lambda spec, parts: "beit_base_patch16_224",
    ),
    HuggingFace("BeitModel", "vit", HUGGINGFACE, _HF_NEEDS, model_type="beit", fields=_fields),
    HuggingFace(
        "BeitForImageClassification",
        "vit",
        prefixed(HUGGINGFACE, "beit.") + timm_vit.HUGGINGFACE_HEAD,
        (*_HF_NEEDS, _HAS_HEAD),
        model_type="beit",
        fields=_fields,
    ),
)

FAMILY = Family("beit", SOURCES, LAYOUTS, styles=(TIMM_STYLE, HUGGINGFACE_STYLE))
