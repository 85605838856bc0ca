"""InternVL's vision model in the names of transformers: branches as BEiT's, absolute positions."""

from typing import Any

from fd_jax.convert.family import Family
from fd_jax.convert.huggingface import HuggingFace, vit_fields
from fd_jax.convert.layout import Need, need
from fd_jax.convert.networks.vit import (
    ABSOLUTE,
    BLOCK,
    CLASS_TOKEN,
    LAYER_SCALE,
    PATCH_BIAS,
    QKV,
    QKV_BIASES,
)
from fd_jax.convert.rules.tables import Drop, Rule, Table, conv, linear, norm, optional
from fd_jax.convert.rules.transforms import SPLIT_QKV
from fd_jax.convert.style import Style
from fd_jax.models.spec import ModelSpec

_LAYER = "encoder.layer.{i}"
_PROJECTIONS = tuple(f"{_LAYER}.attention.{name}_proj" for name in "qkv")
_BIASES = tuple(
    Rule(f"{name}.bias", bias) for name, bias in zip(_PROJECTIONS, QKV_BIASES, strict=True)
)
TABLE = Table(
    (
        Rule("embeddings.cls_token", "encoder/cls_token"),
        Rule("embeddings.position_embeddings", "encoder/pos_embed"),
        *conv("embeddings.patch_embeddings.projection", "encoder/patch_embed"),
        *norm(f"{_LAYER}.layernorm_before", f"{BLOCK}/norm1"),
        Rule(tuple(f"{name}.weight" for name in _PROJECTIONS), QKV, SPLIT_QKV),
        *optional(_BIASES),  # `attention_bias` says whether they are there
        *linear(f"{_LAYER}.attention.projection_layer", f"{BLOCK}/attn/proj"),
        Rule(f"{_LAYER}.lambda_1", f"{BLOCK}/gamma_1"),
        *norm(f"{_LAYER}.layernorm_after", f"{BLOCK}/norm2"),
        *linear(f"{_LAYER}.mlp.fc1", f"{BLOCK}/mlp/fc1"),
        *linear(f"{_LAYER}.mlp.fc2", f"{BLOCK}/mlp/fc2"),
        Rule(f"{_LAYER}.lambda_2", f"{BLOCK}/gamma_2"),
        *optional(norm("layernorm", "encoder/norm")),  # none where `use_mean_pooling` is set
    ),
    (Drop("embeddings.mask_token", "only masked-image training uses it"),),
)
STYLE = Style(
    "hf_internvl",
    "transformers' InternVLVisionModel",
    "vit",
    {"": TABLE},
    (
        "embeddings.patch_embeddings.projection.weight",
        "embeddings.cls_token",
        "encoder.layer.0.attention.q_proj.weight",
        "encoder.layer.0.attention.projection_layer.weight",
    ),
    norms=("layernorm.weight",),
    configs=("internvl_vision",),
)


def _fields(spec: ModelSpec) -> dict[str, Any]:
    return {
        **vit_fields(spec),
        "attention_bias": spec.arch["qkv_bias"] == "qkv",
        "layer_scale_init_value": spec.arch["layer_scale"],
        "norm_type": "layer_norm",
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": not spec.arch["final_norm"],
        "use_qk_norm": False,
    }


_ALL_BIASES_OR_NONE = need(
    "biases of q, k and v, or of none of them", lambda arch: arch["qkv_bias"] in ("qkv", "none")
)
# Others with layer scale are DINOv2's for transformers, whose class users know.
_OF_INTERNVL = Need(
    "a network from InternVL's files",
    lambda spec, paths: spec.source.partition(":")[0] == STYLE.name,
)
LAYOUTS = (
    HuggingFace(
        "InternVLVisionModel",
        "vit",
        TABLE,
        (CLASS_TOKEN, PATCH_BIAS, ABSOLUTE, LAYER_SCALE, _ALL_BIASES_OR_NONE, _OF_INTERNVL),
        model_type="internvl_vision",
        fields=_fields,
    ),
)

FAMILY = Family("internvl", (), LAYOUTS, styles=(STYLE,))
