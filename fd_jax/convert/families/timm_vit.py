"""The plain ViT in the names of timm, as DINO, DeiT and MAE are published, and of Hugging Face."""

from collections.abc import Mapping
import dataclasses
import itertools
from typing import Any

from fd_jax.convert.containers.tensors import Tensor
from fd_jax.convert.family import Family
from fd_jax.convert.huggingface import (
    HAS_HEAD_ON_CLASS,
    HuggingFace,
    vit_fields,
)
from fd_jax.convert.layout import EPSILON_1E6_OR_1E5, Need
from fd_jax.convert.networks.vit import (
    ABSOLUTE,
    ALL_ROWS,
    BIASES_ALL_OR_NONE,
    BLOCK,
    CLASS_ROW,
    NO_ROW,
    ONE_REGISTER,
    PACKED,
    PATCH_BIAS_OR_NORM,
    PLAIN,
    POOL_HEAD,
    QKV,
    QKV_BIASES,
    ROWS,
    SIZES,
    is_packed,
    packed_mlp,
    position_rows,
    position_rules,
    timm_pool,
)
from fd_jax.convert.rules.tables import Drop, Rule, Table, conv, linear, norm, optional, prefixed
from fd_jax.convert.rules.transforms import FUSED_QKV, FUSED_QKV_BIAS, SPLIT_QKV
from fd_jax.convert.source import Part, Source
from fd_jax.convert.style import Style, variant_name
from fd_jax.convert.timm import Timm, arguments
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

# What networks of timm's class may lack or have beyond those published here.
_LACKING = ("patch_embed.proj.bias", "blocks.{i}.attn.qkv.bias", "norm.weight", "norm.bias")
_MORE = (
    Rule("cls_token", "encoder/cls_token"),
    *norm("norm_pre", "encoder/ln_pre"),
    Rule("blocks.{i}.ls1.gamma", f"{BLOCK}/gamma_1"),
    Rule("blocks.{i}.ls2.gamma", f"{BLOCK}/gamma_2"),
    *norm("blocks.{i}.attn.norm", f"{BLOCK}/attn/norm"),
    *norm("blocks.{i}.mlp.norm", f"{BLOCK}/mlp/norm"),
    *norm("fc_norm", "fc_norm"),
    *linear("head", "head"),
    *timm_pool("attn_pool"),
)
_DROPS = (
    Drop("head_dist.*", "the head of the distillation token"),
    Drop("attn_pool.*", POOL_HEAD),
)
_MLP = "blocks.{i}.mlp.fc1"
# Token beside the class token -> what the name of a variant says of it.
_REGISTERS = {"reg_token": "", "dist_token": "distilled"}


def _variant(rows: str, registers: str, packed: bool) -> Table:
    """The names of timm's class for one form of the position table and of the MLP."""
    own = ("cls_token", "pos_embed", *((f"{_MLP}.weight", f"{_MLP}.bias") if packed else ()))
    rules = [
        dataclasses.replace(rule, optional=rule.names in _LACKING)
        for rule in TABLE.rules
        if rule.names not in own
    ]
    gate = packed_mlp(_MLP) if packed else ()
    positions = position_rules("pos_embed", rows, registers)
    return Table((*positions, *rules, *gate, *optional(_MORE)), _DROPS)


def _name(rows: str, registers: str, packed: bool) -> str:
    return variant_name(rows, _REGISTERS[registers], PACKED if packed else "")


def _pick(tensors: Mapping[str, Tensor]) -> str:
    registers = "dist_token" if "dist_token" in tensors else "reg_token"
    count = tensors[registers].shape[1] if registers in tensors else 0
    table = tensors.get("pos_embed")
    rows = position_rows(table, cls="cls_token" in tensors, registers=count)
    return _name(rows, registers, is_packed(tensors, "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"))


_CASES = list(itertools.product(ROWS, _REGISTERS, (False, True)))


TIMM_STYLE = Style(
    "timm_vit",
    "timm's VisionTransformer",
    "vit",
    {_name(*case): _variant(*case) for case in _CASES},
    (
        "patch_embed.proj.weight",
        "blocks.0.norm1.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.fc1.weight",
    ),
    unlike=("mask_token", "storage_tokens", "rope*", "blocks.*.gamma_1", "blocks.*.attn.q_bias"),
    norms=("norm.weight", "fc_norm.weight"),
    pick=_pick,
    code=lambda tensors: {"rope_theta": None},
)

# --- timm's class, made by arguments

_PACKED_EPSILON = Need(
    "norm epsilon 1e-6 beside a gated MLP",
    lambda spec, paths: not spec.arch.get("gated_mlp") or spec.arch["norm_eps"] == 1e-6,
)
TIMM_LAYOUT = Timm(
    "VisionTransformer",
    "vit",
    TIMM_STYLE.tables[""],
    (ABSOLUTE, BIASES_ALL_OR_NONE, PATCH_BIAS_OR_NORM, EPSILON_1E6_OR_1E5, _PACKED_EPSILON),
    style=TIMM_STYLE,
    variant=arguments.vit_variant,
    parts=arguments.vit_parts,
    arguments=arguments.vit_arguments,
    base=arguments.vit_base,
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

# What these classes call otherwise in memory than in files; those of BEiT do so too.
IN_MEMORY = (
    (r"(^|\.)layers\.(\d+)\.", r"\1encoder.layer.\2."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_HF_CLASS = Rule("embeddings.cls_token", "encoder/cls_token")
_HF_POSITIONS = "embeddings.position_embeddings"
_HF_DISTILLED = "distilled"
_HF_DROPS = (
    Drop("embeddings.mask_token", "only masked-image training uses it"),
    Drop("pooler.dense.*", "the pooler, which no task here reads"),
    Drop("../distillation_classifier.*", "the head of the distillation token"),
    Drop("../decoder.*", "the decoder of masked-image training"),
)


def _hf_variant(rows: str, word: str) -> Table:
    head = linear("../cls_classifier" if word else "../classifier", "head")
    own = ("embeddings.cls_token", _HF_POSITIONS)
    rules = [
        dataclasses.replace(rule, optional="bias" in str(rule.paths) and "attn" in str(rule.paths))
        for rule in HUGGINGFACE.rules
        if rule.names not in own
    ]
    positions = position_rules(own[1], rows, "embeddings.distillation_token")
    return Table((*positions, *rules, *optional((_HF_CLASS, *head))), _HF_DROPS)


def _hf_pick(tensors: Mapping[str, Tensor]) -> str:
    distilled = "embeddings.distillation_token" in tensors
    rows = position_rows(
        tensors.get(_HF_POSITIONS),
        cls="embeddings.cls_token" in tensors,
        registers=int(distilled),
    )
    return variant_name(rows, _HF_DISTILLED if "../cls_classifier.weight" in tensors else "")


HUGGINGFACE_STYLE = Style(
    "hf_vit",
    "transformers' ViTModel",
    "vit",
    {
        variant_name(rows, word): _hf_variant(rows, word)
        for rows in (CLASS_ROW, NO_ROW, ALL_ROWS)
        for word in ("", _HF_DISTILLED)
    },
    (
        "embeddings.patch_embeddings.projection.weight",
        "encoder.layer.0.layernorm_before.weight",
        "encoder.layer.0.attention.attention.query.weight",
        "encoder.layer.0.intermediate.dense.weight",
    ),
    unlike=("encoder.layer.*.lambda_1", "*relative_position_bias_table"),
    bases=("vit_msn.", "ijepa.", "deit.", "vit."),
    pick=_hf_pick,
    configs=("vit", "deit", "ijepa", "vit_mae", "vit_msn"),
    renames=IN_MEMORY,
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
        style="timm_vit",
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
        style="timm_vit",
    ),
    Source(
        "mae_vit_base_pretrain",
        "mae_pretrain_vit_base.pth",
        {"encoder": Part(TABLE, DEIT, ("model/",))},
        _ORACLE,
        "the position table is the fixed sine-cosine one, stored in the file",
        style="timm_vit",
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


def _of_class(
    name: str, kind: str, base: str, table: Table, needs: tuple[Need, ...]
) -> tuple[HuggingFace, ...]:
    """A class for features, and the one with a classifier on it."""
    more = {"model_type": kind, "fields": _fields}
    classifier = prefixed(table, base) + HUGGINGFACE_HEAD
    needs_head = (*needs, HAS_HEAD_ON_CLASS)
    return (
        HuggingFace(f"{name}Model", "vit", table, needs, **more),
        HuggingFace(f"{name}ForImageClassification", "vit", classifier, needs_head, **more),
    )


# A distillation token is a register with a position; the sum of both is in the token.
_DISTILLED = Table(
    (
        *position_rules(_HF_POSITIONS, ALL_ROWS, "embeddings.distillation_token"),
        _HF_CLASS,
        *(r for r in HUGGINGFACE.rules if r.names not in (_HF_CLASS.names, _HF_POSITIONS)),
    )
)
LAYOUTS = (
    TIMM_LAYOUT,
    *_of_class("ViT", "vit", "vit.", HUGGINGFACE, PLAIN),
    *_of_class("DeiT", "deit", "deit.", _DISTILLED, (*PLAIN, ONE_REGISTER)),
)

FAMILY = Family("timm_vit", SOURCES, LAYOUTS, styles=(TIMM_STYLE, HUGGINGFACE_STYLE))
