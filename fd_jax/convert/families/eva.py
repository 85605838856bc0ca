"""EVA, EVA-02, Perception Encoder and DINOv3 in the names of timm's Eva: rotary positions, gates."""

from collections.abc import Mapping
import itertools

from fd_jax.convert.containers.tensors import Tensor
from fd_jax.convert.family import Family
from fd_jax.convert.networks.vit import (
    BLOCK,
    PACKED,
    QKV,
    QKV_BIASES,
    ROWS,
    is_packed,
    packed_mlp,
    position_rows,
    position_rules,
)
from fd_jax.convert.rules.tables import Drop, Rule, Table, conv, linear, norm, optional
from fd_jax.convert.rules.transforms import FUSED_QKV, FUSED_QKV_BIAS, SPLIT_QKV
from fd_jax.convert.style import Style

_BLOCK = "blocks.{i}"
_ATTENTION = f"{_BLOCK}.attn"
_MLP = f"{_BLOCK}.mlp"
_BRANCHES = tuple(f"{_ATTENTION}.{name}_proj" for name in "qkv")
_WIDE = linear(f"{_MLP}.fc1", f"{BLOCK}/mlp/fc1")

_ALWAYS = (
    Rule("patch_embed.proj.weight", "encoder/patch_embed/kernel", conv("", "")[0].transform),
    *norm(f"{_BLOCK}.norm1", f"{BLOCK}/norm1"),
    *linear(f"{_ATTENTION}.proj", f"{BLOCK}/attn/proj"),
    *norm(f"{_BLOCK}.norm2", f"{BLOCK}/norm2"),
    *linear(f"{_MLP}.fc2", f"{BLOCK}/mlp/fc2"),
)
_SOMETIMES = (
    Rule("patch_embed.proj.bias", "encoder/patch_embed/bias"),
    Rule("cls_token", "encoder/cls_token"),
    *norm("norm_pre", "encoder/ln_pre"),
    Rule(f"{_ATTENTION}.qkv.weight", QKV, FUSED_QKV),
    Rule(f"{_ATTENTION}.qkv.bias", QKV_BIASES, FUSED_QKV_BIAS),
    *(
        Rule(f"{_ATTENTION}.{name}_bias", bias)
        for name, bias in zip("qkv", QKV_BIASES, strict=True)
    ),
    Rule(tuple(f"{name}.weight" for name in _BRANCHES), QKV, SPLIT_QKV),
    *(Rule(f"{name}.bias", bias) for name, bias in zip(_BRANCHES, QKV_BIASES, strict=True)),
    *norm(f"{_ATTENTION}.norm", f"{BLOCK}/attn/norm"),
    Rule(f"{_BLOCK}.gamma_1", f"{BLOCK}/gamma_1"),
    Rule(f"{_BLOCK}.gamma_2", f"{BLOCK}/gamma_2"),
    *linear(f"{_MLP}.fc1_g", f"{BLOCK}/mlp/gate"),
    *linear(f"{_MLP}.fc1_x", f"{BLOCK}/mlp/fc1"),
    *norm(f"{_MLP}.norm", f"{BLOCK}/mlp/norm"),
    *norm("norm", "encoder/norm"),
    *norm("fc_norm", "fc_norm"),
    *linear("head", "head"),
)
_DROPS = (
    Drop("attn_pool.*", "the attention pooling head"),
    Drop("rope.*", "rotary tables, which follow from the architecture"),
    Drop("mask_token", "only masked-image training uses it"),
)


def _variant(rows: str, packed: bool) -> Table:
    wide = packed_mlp(f"{_MLP}.fc1") if packed else _WIDE
    positions = position_rules("pos_embed", rows, "reg_token")
    return Table((*_ALWAYS, *optional((*positions, *wide, *_SOMETIMES))), _DROPS)


def _name(rows: str, packed: bool) -> str:
    return "+".join(filter(None, (rows, PACKED if packed else "")))


def _pick(tensors: Mapping[str, Tensor]) -> str:
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    table = tensors.get("pos_embed")
    rows = position_rows(table, cls="cls_token" in tensors, registers=registers)
    return _name(rows, is_packed(tensors, "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"))


STYLE = Style(
    "timm_eva",
    "timm's Eva",
    "vit",
    {_name(*case): _variant(*case) for case in itertools.product(ROWS, (False, True))},
    ("patch_embed.proj.weight", "blocks.0.attn.proj.weight", "blocks.0.mlp.fc2.weight"),
    unlike=("storage_tokens", "*relative_position_bias_table", "blocks.*.ls1.gamma"),
    one_of=(
        ("norm.weight", "fc_norm.weight"),
        ("blocks.0.attn.qkv.weight", "blocks.0.attn.q_proj.weight"),
        ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1_g.weight"),
    ),
    pick=_pick,
)

FAMILY = Family("eva", styles=(STYLE,))
