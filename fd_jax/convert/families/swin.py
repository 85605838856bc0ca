"""Swin V1 in the names of Microsoft (EsViT's also), timm and Hugging Face.

A block has a table of position biases and a fused qkv bias. `swin_v2.py` builds on the names here.
"""

from collections.abc import Mapping, Set
import dataclasses
from typing import Any

from fd_jax.convert.containers.tensors import Tensor
from fd_jax.convert.family import Family
from fd_jax.convert.huggingface import HAS_HEAD_ON_MEAN, HuggingFace
from fd_jax.convert.layout import EPSILON_1E5, EXACT_GELU, FINAL_NORM
from fd_jax.convert.networks import swin as network
from fd_jax.convert.networks.swin import BLOCK, QKV, QKV_BIASES, SIZES, STAGE
from fd_jax.convert.rules.tables import (
    Derived,
    Drop,
    Rule,
    Table,
    conv,
    linear,
    norm,
    only_where,
    optional,
    prefixed,
)
from fd_jax.convert.rules.transforms import FUSED_QKV, FUSED_QKV_BIAS, LINEAR, SPLIT_QKV
from fd_jax.convert.source import Part, Source
from fd_jax.convert.style import Style
from fd_jax.convert.timm import Arguments, Timm, head_on
from fd_jax.models.spec import ModelSpec


def _merging(name: str) -> tuple[Rule, ...]:
    path = f"{STAGE}/downsample"
    reduction = Rule(f"{name}.reduction.weight", f"{path}/reduction/kernel", LINEAR)
    return only_where((reduction, *norm(f"{name}.norm", f"{path}/norm")), network.merges)


def trunk(merging: str) -> Table:
    """What Microsoft and timm call alike in both versions, but for the stage of a merging."""
    block = "layers.{s}.blocks.{b}"
    return Table(
        (
            *conv("patch_embed.proj", "encoder/patch_embed"),
            *norm("patch_embed.norm", "encoder/patch_norm"),
            *norm(f"{block}.norm1", f"{BLOCK}/norm1"),
            Rule(f"{block}.attn.qkv.weight", QKV, FUSED_QKV),
            *linear(f"{block}.attn.proj", f"{BLOCK}/attn/proj"),
            *norm(f"{block}.norm2", f"{BLOCK}/norm2"),
            *linear(f"{block}.mlp.fc1", f"{BLOCK}/mlp/fc1"),
            *linear(f"{block}.mlp.fc2", f"{BLOCK}/mlp/fc2"),
            *_merging(merging),
            *norm("norm", "encoder/norm"),
        ),
        (),
        (
            Derived(f"{block}.attn.relative_position_index", network.bias_index),
            Derived(f"{block}.attn_mask", network.shift_mask, where=network.shifts),
        ),
    )


# timm counts a merging to the stage after it (from its 0.8.12 on), Microsoft to the one before.
MERGING = "layers.{s}.downsample"
TIMM_MERGING = "layers.{s+1}.downsample"


def _table(merging: str) -> Table:
    attn = "layers.{s}.blocks.{b}.attn"
    return trunk(merging) + Table(
        (
            Rule(f"{attn}.qkv.bias", QKV_BIASES, FUSED_QKV_BIAS),
            Rule(f"{attn}.relative_position_bias_table", f"{BLOCK}/attn/rel_pos_bias/table"),
        )
    )


HEAD = Table(linear("head", "head"))
TIMM_HEAD = Table(linear("head.fc", "head"))
TABLE = _table(MERGING)
TIMM = _table(TIMM_MERGING) + TIMM_HEAD

_LAYER = "encoder.layers.{s}.blocks.{b}"
HUGGINGFACE_SELF = f"{_LAYER}.attention.self"
_PROJECTIONS = tuple(f"{HUGGINGFACE_SELF}.{name}" for name in ("query", "key", "value"))
HUGGINGFACE_TRUNK = Table(
    (
        *conv("embeddings.patch_embeddings.projection", "encoder/patch_embed"),
        *norm("embeddings.norm", "encoder/patch_norm"),
        *norm(f"{_LAYER}.layernorm_before", f"{BLOCK}/norm1"),
        Rule(tuple(f"{name}.weight" for name in _PROJECTIONS), QKV, SPLIT_QKV),
        Rule(f"{HUGGINGFACE_SELF}.query.bias", f"{BLOCK}/attn/q_bias"),
        Rule(f"{HUGGINGFACE_SELF}.value.bias", f"{BLOCK}/attn/v_bias"),
        *linear(f"{_LAYER}.attention.output.dense", f"{BLOCK}/attn/proj"),
        *norm(f"{_LAYER}.layernorm_after", f"{BLOCK}/norm2"),
        *linear(f"{_LAYER}.intermediate.dense", f"{BLOCK}/mlp/fc1"),
        *linear(f"{_LAYER}.output.dense", f"{BLOCK}/mlp/fc2"),
        *_merging("encoder.layers.{s}.downsample"),
        *norm("layernorm", "encoder/norm"),
    ),
    (),
    (Derived(f"{HUGGINGFACE_SELF}.relative_position_index", network.bias_index),),
)
HUGGINGFACE = HUGGINGFACE_TRUNK + Table(
    (
        Rule(f"{HUGGINGFACE_SELF}.key.bias", f"{BLOCK}/attn/k_bias"),
        Rule(
            f"{HUGGINGFACE_SELF}.relative_position_bias_table", f"{BLOCK}/attn/rel_pos_bias/table"
        ),
    )
)
HUGGINGFACE_HEAD = Table(linear("classifier", "head"))
OPTIONAL_HEAD = Table(
    tuple(dataclasses.replace(rule, optional=True) for rule in HUGGINGFACE_HEAD.rules)
)


# --- networks of any size

MICROSOFT_MARKS = ("patch_embed.proj.weight", "layers.0.downsample.reduction.weight")
TIMM_MARKS = ("patch_embed.proj.weight", "layers.1.downsample.reduction.weight")
_FIRST_TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"
MASK_TOKEN = Table((), (Drop("mask_token", "only masked-image training uses it"),))


def any_size(table: Table, head: Table) -> Table:
    """The names of networks of any size: heads are not in every file, nor are final norms."""
    rules = (
        dataclasses.replace(rule, optional=str(rule.names).startswith(("norm.", "layernorm.")))
        for rule in table.rules
    )
    classifier = optional(rule for rule in head.rules if rule not in table.rules)
    return Table((*rules, *classifier), (*table.drops, *MASK_TOKEN.drops), table.derived)


def on_mean(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the code of every library has: a head reads the mean token."""
    del tensors
    return {"pooling": "mean"}


IN_MEMORY = (
    (r"\.attention\.q_proj\.", ".attention.self.query."),
    (r"\.attention\.k_proj\.", ".attention.self.key."),
    (r"\.attention\.v_proj\.", ".attention.self.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.attention\.relative_position_bias\.", ".attention.self."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
STYLES = (
    Style(
        "timm_swin",
        "timm's SwinTransformer",
        "swin",
        {"": any_size(_table(TIMM_MERGING), TIMM_HEAD)},
        (*TIMM_MARKS, _FIRST_TABLE),
        unlike=("layers.0.downsample.*",),
        code=on_mean,
    ),
    Style(
        "microsoft_swin",
        "Microsoft's SwinTransformer",
        "swin",
        {"": any_size(TABLE, HEAD)},
        (*MICROSOFT_MARKS, _FIRST_TABLE),
        code=on_mean,
    ),
    Style(
        "hf_swin",
        "transformers' SwinModel",
        "swin",
        {"": any_size(HUGGINGFACE, Table(linear("../classifier", "head")))},
        (
            "embeddings.patch_embeddings.projection.weight",
            "encoder.layers.0.blocks.0.attention.self.relative_position_bias_table",
        ),
        bases=("swin.",),
        configs=("swin",),
        renames=IN_MEMORY,
        code=on_mean,
    ),
)


def arch(size: str, image_size: int, window: int) -> dict[str, Any]:
    """Architecture of a published network."""
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


_DINO_HEADS = Table(
    (), tuple(Drop(f"{name}.*", "EsViT's projection heads") for name in ("head", "head_dense"))
)
ESVIT = Part(
    TABLE + _DINO_HEADS, ModelSpec("swin", arch("B", 224, 14)), ("student/",), ("module.",)
)


def _classifier(table: Table, arch: Mapping[str, Any], strip: tuple[str, ...] = ()):
    return {"classifier": Part(table, ModelSpec("swin", dict(arch), pooling="mean"), strip=strip)}


_ORACLE = "transformers SwinForImageClassification"
TIMM_NOTE = "names of timm from 0.8.12 on, where a merging belongs to the stage after it"

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
    Source(
        "swin_base_patch4_window7_224_hf",
        "microsoft/swin-base-patch4-window7-224 model.safetensors",
        _classifier(HUGGINGFACE + OPTIONAL_HEAD, arch("B", 224, 7), ("swin.",)),
        _ORACLE,
        hf=True,
        style="hf_swin",
    ),
    Source(
        "timm_swin_base_patch4_window7_224",
        "timm/swin_base_patch4_window7_224.ms_in1k model.safetensors",
        _classifier(TIMM, arch("B", 224, 7)),
        _ORACLE,
        TIMM_NOTE,
        style="timm_swin",
    ),
)


def huggingface_fields(spec: ModelSpec) -> dict[str, Any]:
    """What config.json says of a network of either version."""
    arch = spec.arch
    return {
        "embed_dim": arch["embed_width"],
        "depths": arch["depths"],
        "num_heads": arch["heads"],
        "window_size": arch["window"],
        "mlp_ratio": float(arch["mlp_ratio"]),
        "qkv_bias": True,
        "use_absolute_embeddings": False,
        "drop_path_rate": 0.0,
        "encoder_stride": arch["patch_size"] << len(arch["depths"]) - 1,
    }


def timm_arguments(spec: ModelSpec, variant: str, parts: Set[str]) -> Arguments:
    """The arguments of timm's classes of both versions."""
    del variant, parts
    arch = spec.arch
    return {
        "img_size": arch["image_size"],
        "patch_size": arch["patch_size"],
        "embed_dim": arch["embed_width"],
        "depths": arch["depths"],
        "num_heads": arch["heads"],
        "window_size": arch["window"],
        "mlp_ratio": arch["mlp_ratio"],
        "qkv_bias": True,
        "always_partition": False,
        "strict_img_size": True,
    }


# Its norms of patches and mergings have torch's own epsilon, whatever the config says.
_NEEDS = (FINAL_NORM, EPSILON_1E5, network.GRIDS_HOLD_WINDOWS)
LAYOUTS = (
    Timm(
        "SwinTransformer",
        "swin",
        TIMM,
        (FINAL_NORM, EXACT_GELU, EPSILON_1E5),
        style=STYLES[0],
        parts=head_on("mean"),
        arguments=timm_arguments,
        base=lambda spec, parts: "swin_base_patch4_window7_224",
        last="head.fc",
    ),
    HuggingFace(
        "SwinModel", "swin", HUGGINGFACE, _NEEDS, model_type="swin", fields=huggingface_fields
    ),
    HuggingFace(
        "SwinForImageClassification",
        "swin",
        prefixed(HUGGINGFACE, "swin.") + HUGGINGFACE_HEAD,
        (*_NEEDS, HAS_HEAD_ON_MEAN),
        model_type="swin",
        fields=huggingface_fields,
    ),
)

FAMILY = Family("swin", SOURCES, LAYOUTS, styles=STYLES)
