"""SigLIP 2's image tower in the names of big_vision (stacked or per block) and of Hugging Face."""

from typing import Any

from fd_jax.convert.family import Family
from fd_jax.convert.huggingface import HuggingFace, vit_fields
from fd_jax.convert.layout import FINAL_NORM, Need
from fd_jax.convert.networks.vit import (
    ABSOLUTE,
    BIASES_QKV,
    BLOCK,
    NO_CLASS_TOKEN,
    PATCH_BIAS,
    POOL,
    POOL_BIASES,
    POOL_HEAD,
    POOL_QKV,
    QKV,
    QKV_BIASES,
    SIZES,
    is_pool_of_blocks,
)
from fd_jax.convert.rules.tables import Drop, Rule, Table, conv, linear, norm, optional, prefixed
from fd_jax.convert.rules.transforms import (
    FUSED_QKV,
    FUSED_QKV_BIAS,
    MATRIX_TOKENS,
    SPLIT_QKV,
    heads_bias,
    heads_out,
    split_qkv_heads,
)
from fd_jax.convert.source import Part, Source
from fd_jax.convert.style import Style
from fd_jax.models.spec import ModelSpec

_TEXT = "the text tower"
_SIMILARITY = "scale and bias of the similarity"


def _both(name: str, path: str, leaves: tuple[str, str]) -> tuple[Rule, Rule]:
    """Rules of a flax layer, whose layout is ours."""
    first, second = (Rule(f"{name}/{leaf}", f"{path}/{leaf}") for leaf in leaves)
    return first, second


def big_vision(heads: int) -> Table:
    """Rules of big_vision's names; query, key and value are stored per head."""
    block = "img/Transformer/encoderblock_{i}"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    qkv = ("query", "key", "value")
    return Table(
        (
            *_both("img/embedding", "encoder/patch_embed", ("kernel", "bias")),
            Rule("img/pos_embedding", "encoder/pos_embed"),
            *_both(f"{block}/LayerNorm_0", f"{BLOCK}/norm1", ("scale", "bias")),
            Rule(
                tuple(f"{attention}/{p}/kernel" for p in qkv),
                QKV,
                split_qkv_heads(heads),
            ),
            *(
                Rule(f"{attention}/{p}/bias", bias, heads_bias(heads))
                for p, bias in zip(qkv, QKV_BIASES, strict=True)
            ),
            Rule(f"{attention}/out/kernel", f"{BLOCK}/attn/proj/kernel", heads_out(heads)),
            Rule(f"{attention}/out/bias", f"{BLOCK}/attn/proj/bias"),
            *_both(f"{block}/LayerNorm_1", f"{BLOCK}/norm2", ("scale", "bias")),
            *_both(f"{block}/MlpBlock_0/Dense_0", f"{BLOCK}/mlp/fc1", ("kernel", "bias")),
            *_both(f"{block}/MlpBlock_0/Dense_1", f"{BLOCK}/mlp/fc2", ("kernel", "bias")),
            *_both("img/Transformer/encoder_norm", "encoder/norm", ("scale", "bias")),
        ),
        (
            Drop("img/MAPHead_0/*", POOL_HEAD),
            Drop("txt/*", _TEXT),
            Drop("t", _SIMILARITY),
            Drop("b", _SIMILARITY),
        ),
    )


_LAYER = "encoder.layers.{i}"
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_VISION_MODEL = Table(
    (
        *conv("embeddings.patch_embedding", "encoder/patch_embed"),
        Rule("embeddings.position_embedding.weight", "encoder/pos_embed", MATRIX_TOKENS),
        *norm(f"{_LAYER}.layer_norm1", f"{BLOCK}/norm1"),
        Rule(tuple(f"{_LAYER}.self_attn.{p}.weight" for p in _PROJECTIONS), QKV, SPLIT_QKV),
        *(
            Rule(f"{_LAYER}.self_attn.{p}.bias", bias)
            for p, bias in zip(_PROJECTIONS, QKV_BIASES, strict=True)
        ),
        *linear(f"{_LAYER}.self_attn.out_proj", f"{BLOCK}/attn/proj"),
        *norm(f"{_LAYER}.layer_norm2", f"{BLOCK}/norm2"),
        *linear(f"{_LAYER}.mlp.fc1", f"{BLOCK}/mlp/fc1"),
        *linear(f"{_LAYER}.mlp.fc2", f"{BLOCK}/mlp/fc2"),
        *norm("post_layernorm", "encoder/norm"),
    ),
    (Drop("head.*", POOL_HEAD), Drop("embeddings.position_ids", "a constant buffer")),
)
_OUTSIDE = (
    ("text_model.*", _TEXT),
    ("logit_scale", _SIMILARITY),
    ("logit_bias", _SIMILARITY),
)
HUGGINGFACE = prefixed(_VISION_MODEL, "vision_model.") + Table(
    (), tuple(Drop(*pair) for pair in _OUTSIDE)
)
_HEAD = (
    Rule("head.probe", f"{POOL}/latent"),
    Rule("head.attention.in_proj_weight", POOL_QKV, FUSED_QKV),
    Rule("head.attention.in_proj_bias", POOL_BIASES, FUSED_QKV_BIAS),
    *linear("head.attention.out_proj", f"{POOL}/attn/proj"),
    *norm("head.layernorm", f"{POOL}/norm"),
    *linear("head.mlp.fc1", f"{POOL}/mlp/fc1"),
    *linear("head.mlp.fc2", f"{POOL}/mlp/fc2"),
)
HUGGINGFACE_STYLE = Style(
    "hf_siglip",
    "transformers' SiglipVisionModel",
    "vit",
    {
        "": Table(
            (*_VISION_MODEL.rules, *optional((*_HEAD, *linear("../classifier", "head")))),
            (*_VISION_MODEL.drops, *(Drop(f"../{name}", why) for name, why in _OUTSIDE)),
        )
    },
    (
        "embeddings.patch_embedding.weight",
        "embeddings.patch_embedding.bias",
        "encoder.layers.0.self_attn.q_proj.weight",
    ),
    unlike=("embeddings.class_embedding",),
    bases=("vision_model.",),
    configs=("siglip_vision_model",),
)

SPEC = ModelSpec(
    "vit",
    {
        "image_size": 224,
        "patch_size": 16,
        **SIZES["B"],
        "position": "ape",
        "cls_token": False,
        "registers": 0,
        "ln_pre": False,
        "final_norm": True,
        "activation": "gelu_tanh",
        "norm_eps": 1e-6,
        "layer_scale": None,
        "qkv_bias": "qkv",
        "patch_bias": True,
    },
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)

_ORACLE = "transformers SiglipVisionModel"

SOURCES = (
    Source(
        "siglip2_base_patch16_224_bigvision",
        "siglip2_b16_224.npz",
        {"image": Part(big_vision(SIZES["B"]["heads"]), SPEC, ("params/",))},
        _ORACLE,
        "no class token; blocks stacked on a leading axis or one by one",
        unstack="img/Transformer/encoderblock",
    ),
    Source(
        "siglip2_base_patch16_224_hf",
        "google/siglip2-base-patch16-224 model.safetensors",
        {"image": Part(HUGGINGFACE, SPEC)},
        _ORACLE,
        "no class token",
        hf=True,
        style="hf_siglip",
    ),
)


def _fields(spec: ModelSpec) -> dict[str, Any]:
    return {**vit_fields(spec), "vision_use_head": False}


def _fields_with_head(spec: ModelSpec) -> dict[str, Any]:
    return {**vit_fields(spec), "vision_use_head": True}


_HAS_POOL = Need(
    "a pooling head like its blocks",
    lambda spec, paths: f"{POOL}/latent" in paths and is_pool_of_blocks(spec),
)
_NEEDS = (NO_CLASS_TOKEN, FINAL_NORM, PATCH_BIAS, ABSOLUTE, BIASES_QKV)
_TYPE = "siglip_vision_model"
LAYOUTS = (
    HuggingFace("SiglipVisionModel", "vit", HUGGINGFACE, _NEEDS, model_type=_TYPE, fields=_fields),
    HuggingFace(
        "SiglipVisionModel",
        "vit",
        HUGGINGFACE + prefixed(Table(_HEAD), "vision_model."),
        (*_NEEDS, _HAS_POOL),
        model_type=_TYPE,
        fields=_fields_with_head,
    ),
)

FAMILY = Family("siglip2", SOURCES, LAYOUTS, styles=(HUGGINGFACE_STYLE,))
