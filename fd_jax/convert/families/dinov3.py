"""DINOv3 in the names of the hub and of Hugging Face: rotary positions, registers, no k bias."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import numpy as np

from fd_jax.convert.containers.tensors import Tensor
from fd_jax.convert.family import Family
from fd_jax.convert.huggingface import HuggingFace, vit_fields
from fd_jax.convert.layout import FINAL_NORM
from fd_jax.convert.networks.vit import (
    BLOCK,
    CLASS_TOKEN,
    LAYER_SCALE,
    PATCH_BIAS,
    QKV,
    REGISTERS,
    ROTARY,
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
    sometimes,
)
from fd_jax.convert.rules.transforms import CONV, FUSED_QKV, MASKED_QKV_BIAS, SPLIT_QKV
from fd_jax.convert.source import Part, Source
from fd_jax.convert.style import Style
from fd_jax.models.spec import ModelSpec

_MASK = "only masked-image training uses it"


def _periods(arch: Mapping[str, Any], place: Place) -> np.ndarray:
    """Rotary periods of one axis. [d / 4]"""
    del place
    count = arch["width"] // arch["heads"] // 4
    return (arch["rope_theta"] ** (np.arange(count) / count)).astype(np.float32)


def _bias_mask(arch: Mapping[str, Any], place: Place) -> np.ndarray:
    """What the hub multiplies on the fused bias: 1 for q and v, 0 for k. [3D]"""
    del place
    return np.repeat(np.array([1, 0, 1], np.float32), arch["width"])


HUB = Table(
    (
        Rule("cls_token", "encoder/cls_token"),
        Rule("storage_tokens", "encoder/register_tokens"),
        *conv("patch_embed.proj", "encoder/patch_embed"),
        *norm("blocks.{i}.norm1", f"{BLOCK}/norm1"),
        Rule("blocks.{i}.attn.qkv.weight", QKV, FUSED_QKV),
        Rule(
            "blocks.{i}.attn.qkv.bias",
            (f"{BLOCK}/attn/q_bias", f"{BLOCK}/attn/v_bias"),
            MASKED_QKV_BIAS,
        ),
        *linear("blocks.{i}.attn.proj", f"{BLOCK}/attn/proj"),
        Rule("blocks.{i}.ls1.gamma", f"{BLOCK}/gamma_1"),
        *norm("blocks.{i}.norm2", f"{BLOCK}/norm2"),
        *linear("blocks.{i}.mlp.fc1", f"{BLOCK}/mlp/fc1"),
        *linear("blocks.{i}.mlp.fc2", f"{BLOCK}/mlp/fc2"),
        Rule("blocks.{i}.ls2.gamma", f"{BLOCK}/gamma_2"),
        *norm("norm", "encoder/norm"),
    ),
    (Drop("mask_token", _MASK),),
    (
        # Files may hold the periods rounded to bfloat16.
        Derived("rope_embed.periods", _periods, tolerance=2**-7),
        # The class leaves NaN here until it is initialised: such a file holds no weights.
        Derived("blocks.{i}.attn.qkv.bias_mask", _bias_mask, optional=False),
    ),
)

_LAYER = "layer.{i}"
_ATTENTION = f"{_LAYER}.attention"
HUGGINGFACE = Table(
    (
        Rule("embeddings.cls_token", "encoder/cls_token"),
        Rule("embeddings.register_tokens", "encoder/register_tokens"),
        Rule("embeddings.patch_embeddings.weight", "encoder/patch_embed/kernel", CONV),
        Rule("embeddings.patch_embeddings.bias", "encoder/patch_embed/bias"),
        *norm(f"{_LAYER}.norm1", f"{BLOCK}/norm1"),
        Rule(
            tuple(f"{_ATTENTION}.{p}_proj.weight" for p in "qkv"),
            QKV,
            SPLIT_QKV,
        ),
        Rule(f"{_ATTENTION}.q_proj.bias", f"{BLOCK}/attn/q_bias"),
        Rule(f"{_ATTENTION}.v_proj.bias", f"{BLOCK}/attn/v_bias"),
        *linear(f"{_ATTENTION}.o_proj", f"{BLOCK}/attn/proj"),
        Rule(f"{_LAYER}.layer_scale1.lambda1", f"{BLOCK}/gamma_1"),
        *norm(f"{_LAYER}.norm2", f"{BLOCK}/norm2"),
        *linear(f"{_LAYER}.mlp.up_proj", f"{BLOCK}/mlp/fc1"),
        *linear(f"{_LAYER}.mlp.down_proj", f"{BLOCK}/mlp/fc2"),
        Rule(f"{_LAYER}.layer_scale2.lambda1", f"{BLOCK}/gamma_2"),
        *norm("norm", "encoder/norm"),
    ),
    (Drop("embeddings.mask_token", _MASK),),
)

# --- networks of any size

_HUB_MORE = (
    *linear("blocks.{i}.mlp.w1", f"{BLOCK}/mlp/gate"),
    *linear("blocks.{i}.mlp.w2", f"{BLOCK}/mlp/fc1"),
    *linear("blocks.{i}.mlp.w3", f"{BLOCK}/mlp/fc2"),
)
_HUB_DROPS = (
    Drop("local_cls_norm.*", "the norm of local crops, which only training uses"),
    Drop("*_head.*", "the heads of DINO and iBOT"),
)
_HUB_GATED = "blocks.0.mlp.w1.weight"


def _hub_code(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    found = {
        "activation": "silu" if _HUB_GATED in tensors else "gelu_erf",
        "norm_eps": 1e-5,
        "rope_theta": 100.0,
    }
    periods, weight = (
        tensors.get(name) for name in ("rope_embed.periods", "blocks.0.attn.proj.weight")
    )
    if periods is not None and weight is not None and math.prod(periods.shape):
        # A head has a period for each quarter of its channels.
        found["heads"] = weight.shape[0] // (4 * math.prod(periods.shape))
    return found


def _optional_where(table: Table, words: tuple[str, ...], more: tuple[Rule, ...]) -> Table:
    """The table with rules that networks may lack, those with one of the words in their names."""
    return Table((*sometimes(table.rules, words), *optional(more)), table.drops, table.derived)


_hub_table = _optional_where(HUB, ("mlp", "storage_tokens"), _HUB_MORE)
HUB_STYLE = Style(
    "dinov3_hub",
    "DINOv3's hub",
    "vit",
    {"": dataclasses.replace(_hub_table, drops=(*_hub_table.drops, *_HUB_DROPS))},
    (
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.qkv.bias_mask",
        "storage_tokens",
    ),
    one_of=(("blocks.0.mlp.fc1.weight", _HUB_GATED),),
    code=_hub_code,
)

_HF_MORE = (
    Rule(f"{_ATTENTION}.k_proj.bias", f"{BLOCK}/attn/k_bias"),
    *linear(f"{_LAYER}.mlp.gate_proj", f"{BLOCK}/mlp/gate"),
)
HUGGINGFACE_STYLE = Style(
    "hf_dinov3",
    "transformers' DINOv3ViTModel",
    "vit",
    {"": _optional_where(HUGGINGFACE, ("register_tokens", "q_proj.bias", "v_proj.bias"), _HF_MORE)},
    (
        "embeddings.patch_embeddings.weight",
        "layer.0.attention.q_proj.weight",
        "layer.0.layer_scale1.lambda1",
    ),
    configs=("dinov3_vit",),
    renames=((r"(^|\.)model\.layer\.", r"\1layer."),),
)

_ARCH = {
    "image_size": 224,
    "patch_size": 16,
    "position": "rope",
    "cls_token": True,
    "registers": 4,
    "ln_pre": False,
    "final_norm": True,
    "activation": "gelu_erf",
    "norm_eps": 1e-5,
    "layer_scale": 1.0,
    "qkv_bias": "qv",
    "patch_bias": True,
    "rope_theta": 100.0,
}
_HASHES = {"S": "08c60483", "B": "73cec8be"}
_ORACLE = "transformers DINOv3ViTModel"


def _spec(size: str) -> ModelSpec:
    return ModelSpec("vit", {**_ARCH, **SIZES[size]})


def _hub(size: str) -> Source:
    letter = size.lower()
    return Source(
        f"dinov3_vit{letter}16",
        f"dinov3_vit{letter}16_pretrain_lvd1689m-{_HASHES[size]}.pth",
        {"backbone": Part(HUB, _spec(size))},
        _ORACLE,
        "k biases are masked out; a mask of NaN (never initialised) is refused; gated licence",
        published=_HASHES[size],
        style="dinov3_hub",
    )


def _huggingface(size: str) -> Source:
    letter = size.lower()
    return Source(
        f"dinov3_vit{letter}16_hf",
        f"facebook/dinov3-vit{letter}16-pretrain-lvd1689m model.safetensors",
        {"backbone": Part(HUGGINGFACE, _spec(size))},
        _ORACLE,
        "no k bias; gated licence",
        hf=True,
        style="hf_dinov3",
    )


SOURCES = (*map(_hub, _HASHES), *map(_huggingface, _HASHES))


def _fields(spec: ModelSpec) -> dict[str, Any]:
    return {
        **vit_fields(spec),
        "layerscale_value": spec.arch["layer_scale"],
        "num_register_tokens": spec.arch["registers"],
        "rope_theta": spec.arch.get("rope_theta", 100.0),
        "query_bias": spec.arch["qkv_bias"] != "none",
        "key_bias": spec.arch["qkv_bias"] == "qkv",
        "value_bias": spec.arch["qkv_bias"] != "none",
        "use_gated_mlp": bool(spec.arch.get("gated_mlp")),
    }


def _mask_token(spec: ModelSpec) -> dict[str, np.ndarray]:
    return {"embeddings.mask_token": np.zeros((1, 1, spec.arch["width"]), np.float32)}


LAYOUTS = (
    HuggingFace(
        "DINOv3ViTModel",
        "vit",
        HUGGINGFACE_STYLE.tables[""],
        (CLASS_TOKEN, FINAL_NORM, PATCH_BIAS, ROTARY, LAYER_SCALE, REGISTERS),
        model_type="dinov3_vit",
        fields=_fields,
        extra=_mask_token,
    ),
)

FAMILY = Family("dinov3", SOURCES, LAYOUTS, styles=(HUB_STYLE, HUGGINGFACE_STYLE))
