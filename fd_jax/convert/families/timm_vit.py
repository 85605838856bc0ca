"""DINO, DeiT and MAE: the ViT of timm, which all three use."""

from fd_jax.convert.rules.tables import Drop, Rule, Table
from fd_jax.convert.rules.transforms import FUSED_QKV, FUSED_QKV_BIAS
from fd_jax.convert.source import SIZES, Part, Source, conv, linear, norm
from fd_jax.models.spec import ModelSpec

BLOCK = "encoder/blocks/{i}"

TABLE = Table(
    (
        Rule("cls_token", "encoder/cls_token"),
        Rule("pos_embed", "encoder/pos_embed"),
        *conv("patch_embed.proj", "encoder/patch_embed"),
        *norm("blocks.{i}.norm1", f"{BLOCK}/norm1"),
        Rule("blocks.{i}.attn.qkv.weight", f"{BLOCK}/attn/qkv/kernel", FUSED_QKV),
        Rule(
            "blocks.{i}.attn.qkv.bias",
            (f"{BLOCK}/attn/q_bias", f"{BLOCK}/attn/k_bias", f"{BLOCK}/attn/v_bias"),
            FUSED_QKV_BIAS,
        ),
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
