"""CLIP's image tower in the names of OpenAI (also open_clip's) and of Hugging Face."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from fd_jax.convert.containers.tensors import Tensor
from fd_jax.convert.family import Family
from fd_jax.convert.huggingface import HuggingFace, vit_fields
from fd_jax.convert.layout import FINAL_NORM, Need
from fd_jax.convert.networks.vit import (
    ABSOLUTE,
    BIASES_QKV,
    BLOCK,
    CLASS_TOKEN,
    NORM_BEFORE_BLOCKS,
    POOL,
    POOL_HEAD,
    PROJECTION,
    QKV,
    QKV_BIASES,
    SIZES,
)
from fd_jax.convert.rules.tables import Drop, Rule, Table, linear, norm, prefixed, sometimes
from fd_jax.convert.rules.transforms import (
    CONV,
    FUSED_QKV,
    FUSED_QKV_BIAS,
    LINEAR,
    MATRIX_TOKENS,
    SPLIT_QKV,
    VECTOR_TOKEN,
)
from fd_jax.convert.source import Part, Source
from fd_jax.convert.style import Style
from fd_jax.models.spec import CLIP_MEAN, CLIP_STD, ModelSpec

_TEXT = "the text tower"
_SIMILARITY = "the map into the space shared with text"

_RES = "transformer.resblocks.{i}"
_TOWER = Table(
    (
        Rule("class_embedding", "encoder/cls_token", VECTOR_TOKEN),
        Rule("positional_embedding", "encoder/pos_embed", MATRIX_TOKENS),
        Rule("conv1.weight", "encoder/patch_embed/kernel", CONV),
        *norm("ln_pre", "encoder/ln_pre"),
        *norm(f"{_RES}.ln_1", f"{BLOCK}/norm1"),
        Rule(f"{_RES}.attn.in_proj_weight", QKV, FUSED_QKV),
        Rule(f"{_RES}.attn.in_proj_bias", QKV_BIASES, FUSED_QKV_BIAS),
        *linear(f"{_RES}.attn.out_proj", f"{BLOCK}/attn/proj"),
        *norm(f"{_RES}.ln_2", f"{BLOCK}/norm2"),
        *linear(f"{_RES}.mlp.c_fc", f"{BLOCK}/mlp/fc1"),
        *linear(f"{_RES}.mlp.c_proj", f"{BLOCK}/mlp/fc2"),
        *norm("ln_post", "encoder/norm"),
    ),
    (Drop("proj", _SIMILARITY),),
)
_OUTSIDE = (
    ("logit_scale", _SIMILARITY),
    ("text_projection", _SIMILARITY),
    ("transformer.*", _TEXT),
    ("token_embedding.*", _TEXT),
    ("positional_embedding", _TEXT),
    ("ln_final.*", _TEXT),
    ("attn_mask", _TEXT),
    ("input_resolution", "a constant of the archive"),
    ("context_length", "a constant of the archive"),
    ("vocab_size", "a constant of the archive"),
)
OPENAI = prefixed(_TOWER, "visual.") + Table((), tuple(Drop(*pair) for pair in _OUTSIDE))

# Towers of any size, with what some of open_clip's have or lack.
_ANY_TOWER = Table(
    (
        *sometimes(_TOWER.rules, ("ln_pre",)),
        Rule("proj", PROJECTION, optional=True),
        Rule(f"{_RES}.ls_1.gamma", f"{BLOCK}/gamma_1", optional=True),
        Rule(f"{_RES}.ls_2.gamma", f"{BLOCK}/gamma_2", optional=True),
    ),
    (
        *_TOWER.drops,
        *(Drop(f"../{name}", why) for name, why in _OUTSIDE),
        Drop("../text.*", _TEXT),
    ),
)
# CoCa's: what follows the blocks is an attention of learned queries, and `ln_post` and `proj` are
# of the vectors that these make, whose width is another one. The map has no norm.
_ABOVE_POOL = ("ln_post.weight", "ln_post.bias")
_POOLED = "pooled"
_POOLED_TOWER = Table(
    tuple(rule for rule in _ANY_TOWER.rules if rule.names not in (*_ABOVE_POOL, "proj")),
    (
        *_ANY_TOWER.drops,
        Drop("../text_decoder.*", _TEXT),
        Drop("attn_pool.*", POOL_HEAD),
        *(Drop(name, POOL_HEAD) for name in _ABOVE_POOL),
    ),
)


def _pick(tensors: Mapping[str, Tensor]) -> str:
    return _POOLED if "attn_pool.query" in tensors else ""


OPENAI_STYLE = Style(
    "openai_clip",
    "the tower of OpenAI's CLIP and open_clip",
    "vit",
    {"": _ANY_TOWER, _POOLED: _POOLED_TOWER},
    ("conv1.weight", "class_embedding", "transformer.resblocks.0.attn.in_proj_weight"),
    bases=("visual.",),
    pick=_pick,
)

_LAYER = "encoder.layers.{i}"
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_VISION_MODEL = Table(
    (
        Rule("embeddings.class_embedding", "encoder/cls_token", VECTOR_TOKEN),
        Rule("embeddings.position_embedding.weight", "encoder/pos_embed", MATRIX_TOKENS),
        Rule("embeddings.patch_embedding.weight", "encoder/patch_embed/kernel", CONV),
        *norm("pre_layrnorm", "encoder/ln_pre"),  # the public name lacks the "e"
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
    (Drop("embeddings.position_ids", "a constant buffer"),),
)
_HF_OUTSIDE = (
    ("text_model.*", _TEXT),
    ("visual_projection.weight", _SIMILARITY),
    ("text_projection.weight", _SIMILARITY),
    ("logit_scale", _SIMILARITY),
)
HUGGINGFACE = prefixed(_VISION_MODEL, "vision_model.") + Table(
    (), tuple(Drop(*pair) for pair in _HF_OUTSIDE)
)
_PROJECTION = Rule("../visual_projection.weight", PROJECTION, LINEAR)
HUGGINGFACE_STYLE = Style(
    "hf_clip",
    "transformers' CLIPVisionModel",
    "vit",
    {
        "": Table(
            (*_VISION_MODEL.rules, dataclasses.replace(_PROJECTION, optional=True)),
            (
                *_VISION_MODEL.drops,
                *(Drop(f"../{name}", why) for name, why in _HF_OUTSIDE),
                Drop("../classifier.*", "it reads the mean of patches before the norm"),
            ),
        )
    },
    (
        "embeddings.patch_embedding.weight",
        "embeddings.class_embedding",
        "encoder.layers.0.self_attn.q_proj.weight",
    ),
    bases=("vision_model.",),
    configs=("clip_vision_model", "metaclip_2_vision_model"),
)

_ARCH = {
    "position": "ape",
    "cls_token": True,
    "registers": 0,
    "ln_pre": True,
    "final_norm": True,
    "activation": "quick_gelu",
    "norm_eps": 1e-5,
    "layer_scale": None,
    "qkv_bias": "qkv",
    "patch_bias": False,
}


def _spec(size: str, patch_size: int, image_size: int, **changes) -> ModelSpec:
    arch = {"image_size": image_size, "patch_size": patch_size, **SIZES[size], **_ARCH, **changes}
    return ModelSpec("vit", arch, mean=CLIP_MEAN, std=CLIP_STD)


VIT_B16 = Part(OPENAI, _spec("B", 16, 224))
VIT_L14 = Part(OPENAI, _spec("L", 14, 224))

_NOTE = "QuickGELU and epsilon 1e-5 are in no key; the final norm is visual.ln_post"
_OPENAI_ORACLE = "transformers CLIPVisionModel, ln_post on every token"

# OpenAI's download addresses hold the checksums.
_PUBLISHED = {
    "b16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "l14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "l14_336": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}


def _openai(size: str, file: str, part: Part) -> Source:
    return Source(
        f"openai_clip_vit_{size}",
        file,
        {"image": part},
        _OPENAI_ORACLE,
        _NOTE,
        published=_PUBLISHED[size],
        style="openai_clip",
    )


SOURCES = (
    _openai("b16", "ViT-B-16.pt", VIT_B16),
    _openai("l14", "ViT-L-14.pt", VIT_L14),
    _openai("l14_336", "ViT-L-14-336px.pt", Part(OPENAI, _spec("L", 14, 336))),
    Source(
        "hf_clip_vit_base_patch16",
        "openai/clip-vit-base-patch16: model.safetensors or pytorch_model.bin",
        {"image": dataclasses.replace(VIT_B16, table=HUGGINGFACE)},
        _OPENAI_ORACLE,
        "QuickGELU and epsilon; a config.json beside the file must agree",
        hf=True,
        style="hf_clip",
    ),
    Source(
        "hf_clip_vit_large_patch14",
        "openai/clip-vit-large-patch14: model.safetensors or pytorch_model.bin",
        {"image": dataclasses.replace(VIT_L14, table=HUGGINGFACE)},
        _OPENAI_ORACLE,
        "QuickGELU and epsilon; a config.json beside the file must agree",
        hf=True,
        style="hf_clip",
    ),
    Source(
        "open_clip_vit_b16_laion2b",
        "laion/CLIP-ViT-B-16-laion2B-s34B-b88K: open_clip_pytorch_model.bin or "
        "open_clip_model.safetensors",
        {
            "image": Part(
                OPENAI,
                _spec("B", 16, 224, activation="gelu_erf"),
                ("state_dict/", ""),
                ("module.",),
            )
        },
        _OPENAI_ORACLE,
        "OpenAI's names, but the exact GELU",
        style="openai_clip",
    ),
)


def _normalized(model, tokens):
    """All tokens after the final norm, which the class applies to the class token only."""
    return getattr(model, "vision_model", model).post_layernorm(tokens)


def _fields_with_projection(spec: ModelSpec) -> dict[str, Any]:
    pool: Any = spec.pool
    return {**vit_fields(spec), "projection_dim": pool["width"]}


_PROJECTS = Need(
    "a projection of the class token without a bias",
    lambda spec, paths: (
        {path for path in paths if path.startswith(f"{POOL}/")} == {PROJECTION}
        and spec.pool is not None
        and spec.pool["kind"] == "projection"
    ),
)
_NEEDS = (CLASS_TOKEN, NORM_BEFORE_BLOCKS, FINAL_NORM, ABSOLUTE, BIASES_QKV)
LAYOUTS = (
    HuggingFace(
        "CLIPVisionModel",
        "vit",
        HUGGINGFACE,
        _NEEDS,
        model_type="clip_vision_model",
        fields=vit_fields,
        final_tokens=_normalized,
    ),
    HuggingFace(
        "CLIPVisionModelWithProjection",
        "vit",
        HUGGINGFACE + Table((Rule("visual_projection.weight", PROJECTION, LINEAR),)),
        (*_NEEDS, _PROJECTS),
        model_type="clip_vision_model",
        fields=_fields_with_projection,
        final_tokens=_normalized,
    ),
)

FAMILY = Family("clip", SOURCES, LAYOUTS, styles=(OPENAI_STYLE, HUGGINGFACE_STYLE))
