"""The plain ViT in the names of timm, as DINO, DeiT and MAE are published, and of Hugging Face."""

from typing import Any

from fd_jax.convert.family import Family
from fd_jax.convert.huggingface import HAS_HEAD, HuggingFace, vit_fields
from fd_jax.convert.layout import Timm
from fd_jax.convert.networks.vit import BLOCK, NOT_ROTARY, PLAIN, QKV, QKV_BIASES, SIZES
from fd_jax.convert.rules.tables import Drop, Rule, Table, conv, linear, norm, prefixed
from fd_jax.convert.rules.transforms import FUSED_QKV, FUSED_QKV_BIAS, SPLIT_QKV
from fd_jax.convert.source import Part, Source
from fd_jax.models.spec import ModelSpec

TABLE = Table(
    (
        Rule("cls_token", "encoder/cls_token"),
        Rule("pos_embed", "encoder/pos_embed"),
        *conv("patch_embed.proj", "encoder/patch_embed"),
        *norm("blocks.{i}.norm1", f"{BLOCK}/norm1"),
        Rule("blocks.{i}.attn.qkv.weight", QKV, FUSED_QKV),
        Rule("blocks.{i}.attn.qkv.bias", QKV_BIASES, FUSED_QKV_BIAS),
        *linear("blocks.{i}.attn.proj", f"{BLOCK}/attn/proj"),
        *norm("blocks.{i}.norm2", f"{BLOCK}/norm2"),
        *linear("blocks.{i}.mlp.fc1", f"{BLOCK}/mlp/fc1"),
        *linear("blocks.{i}.mlp.fc2", f"{BLOCK}/mlp/fc2"),
        *norm("norm", "encoder/norm"),
    )
)
HEAD = Table(linear("head", "head"))
DINO_HEAD = Table((), (Drop("head.*", "DINO's projection head", required=True),))
MAE_DECODER = Table(
    (), (Drop("decoder_*", "MAE's decoder", required=True), Drop("mask_token", "MAE's decoder"))
)

# timm's class covers more networks than those published here.
_VISION_TRANSFORMER = (
    TABLE
    + Table(
        (
            *norm("norm_pre", "encoder/ln_pre"),
            Rule("blocks.{i}.ls1.gamma", f"{BLOCK}/gamma_1"),
            Rule("blocks.{i}.ls2.gamma", f"{BLOCK}/gamma_2"),
        )
    )
    + HEAD
)

_LAYER = "encoder.layer.{i}"
_ATTENTION = tuple(f"{_LAYER}.attention.attention.{p}" for p in ("query", "key", "value"))
# BEiT's class of transformers has these names as well.
HUGGINGFACE = Table(
    (
        Rule("embeddings.cls_token", "encoder/cls_token"),
        Rule("embeddings.position_embeddings", "encoder/pos_embed"),
        *conv("embeddings.patch_embeddings.projection", "encoder/patch_embed"),
        *norm(f"{_LAYER}.layernorm_before", f"{BLOCK}/norm1"),
        Rule(tuple(f"{a}.weight" for a in _ATTENTION), QKV, SPLIT_QKV),
        *(Rule(f"{a}.bias", bias) for a, bias in zip(_ATTENTION, QKV_BIASES, strict=True)),
        *linear(f"{_LAYER}.attention.output.dense", f"{BLOCK}/attn/proj"),
        *norm(f"{_LAYER}.layernorm_after", f"{BLOCK}/norm2"),
        *linear(f"{_LAYER}.intermediate.dense", f"{BLOCK}/mlp/fc1"),
        *linear(f"{_LAYER}.output.dense", f"{BLOCK}/mlp/fc2"),
        *norm("layernorm", "encoder/norm"),
    )
)
HUGGINGFACE_HEAD = Table(linear("classifier", "head"))

ARCH = {
    "image_size": 224,
    "patch_size": 16,
    **SIZES["B"],
    "position": "ape",
    "cls_token": True,
    "registers": 0,
    "ln_pre": False,
    "final_norm": True,
    "activation": "gelu_erf",
    "norm_eps": 1e-6,
    "layer_scale": None,
    "qkv_bias": "qkv",
    "patch_bias": True,
}
DINO = ModelSpec("vit", ARCH, position_resize="offset_0.1")
DEIT = ModelSpec("vit", ARCH)

_ORACLE = "transformers ViTModel"

SOURCES = (
    Source(
        "dino_vitb16",
        "dino_vitbase16_pretrain.pth",
        {"backbone": Part(TABLE, DINO)},
        _ORACLE,
    ),
    Source(
        "dino_vitb16_full_checkpoint",
        "dino_vitbase16_pretrain_full_checkpoint.pth",
        {
            "teacher": Part(TABLE + DINO_HEAD, DINO, ("teacher/",), ("module.", "backbone.")),
            "student": Part(TABLE + DINO_HEAD, DINO, ("student/",), ("module.", "backbone.")),
        },
        _ORACLE,
        "the backbone file holds the teacher",
    ),
    Source(
        "deit_base_patch16_224",
        "deit_base_patch16_224-b5f2ef4d.pth",
        {"classifier": Part(TABLE + HEAD, DEIT, ("model/",))},
        "transformers ViTForImageClassification",
        "the head reads the class token",
        published="b5f2ef4d",
    ),
    Source(
        "mae_vit_base_pretrain",
        "mae_pretrain_vit_base.pth",
        {"encoder": Part(TABLE, DEIT, ("model/",))},
        _ORACLE,
        "the position table is the fixed sine-cosine one, stored in the file",
    ),
    Source(
        "mae_vit_base_full",
        "mae_pretrain_vit_base_full.pth",
        {"encoder": Part(TABLE + MAE_DECODER, DEIT, ("model/",))},
        _ORACLE,
        "the position table is the fixed sine-cosine one, stored in the file",
    ),
)


def _fields(spec: ModelSpec) -> dict[str, Any]:
    return {**vit_fields(spec), "qkv_bias": True, "encoder_stride": spec.arch["patch_size"]}


LAYOUTS = (
    Timm("VisionTransformer", "vit", _VISION_TRANSFORMER, (NOT_ROTARY,)),
    HuggingFace("ViTModel", "vit", HUGGINGFACE, PLAIN, model_type="vit", fields=_fields),
    HuggingFace(
        "ViTForImageClassification",
        "vit",
        prefixed(HUGGINGFACE, "vit.") + HUGGINGFACE_HEAD,
        (*PLAIN, HAS_HEAD),
        model_type="vit",
        fields=_fields,
    ),
)

FAMILY = Family("timm_vit", SOURCES, LAYOUTS)
