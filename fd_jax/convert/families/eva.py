"""EVA, Perception Encoder and DINOv3 in the names of timm's Eva: rotary positions and gates."""

from collections.abc import Mapping
import itertools

from fd_jax.convert.containers.tensors import Tensor
from fd_jax.convert.family import Family
from fd_jax.convert.networks.vit import (
    BLOCK,
    PACKED,
    POOL_HEAD,
    QKV,
    QKV_BIASES,
    ROWS,
    is_packed,
    packed_mlp,
    position_rows,
    position_rules,
    timm_pool,
)
from fd_jax.convert.rules.tables import Drop, Rule, Table, linear, norm, optional
from fd_jax.convert.rules.transforms import CONV, FUSED_QKV, FUSED_QKV_BIAS, SPLIT_QKV
from fd_jax.convert.style import Style, variant_name

_BLOCK = "blocks.{i}"
_ATTENTION = f"{_BLOCK}.attn"
_MLP = f"{_BLOCK}.mlp"
_BRANCHES = tuple(f"{_ATTENTION}.{name}_proj" for name in "qkv")

_ALWAYS = (
    Rule("patch_embed.proj.weight", "encoder/patch_embed/kernel", CONV),
    *norm(f"{_BLOCK}.norm1", f"{BLOCK}/norm1"),
    *linear(f"{_ATTENTION}.proj", f"{BLOCK}/attn/proj"),
    *norm(f"{_BLOCK}.norm2", f"{BLOCK}/norm2"),
    *linear(f"{_MLP}.fc2", f"{BLOCK}/mlp/fc2"),
)
_SOMETIMES = (
    Rule("patch_embed.proj.bias", "encoder/patch_embed/bias"),
    Rule("cls_token", "encoder/cls_token"),
    *norm("norm_pre", "encoder/ln_pre"),
    *norm(f"{_ATTENTION}.norm", f"{BLOCK}/attn/norm"),
    Rule(f"{_BLOCK}.gamma_1", f"{BLOCK}/gamma_1"),
    Rule(f"{_BLOCK}.gamma_2", f"{BLOCK}/gamma_2"),
    *norm(f"{_MLP}.norm", f"{BLOCK}/mlp/norm"),
    *norm("norm", "encoder/norm"),
    *norm("fc_norm", "fc_norm"),
    *linear("head", "head"),
    *timm_pool("attn_pool"),
)
_DROPS = (
    Drop("attn_pool.*", POOL_HEAD),
    Drop("mask_token", "only masked-image training uses it"),
)
_FUSED = Rule(f"{_ATTENTION}.qkv.weight", QKV, FUSED_QKV)
# How a file holds queries, keys and values, and their biases, by the word for the variant.
_QKV = {
    "": (
        _FUSED,
        *(
            Rule(f"{_ATTENTION}.{name}_bias", bias, optional=True)
            for name, bias in zip("qkv", QKV_BIASES, strict=True)
        ),
    ),
    "one bias": (_FUSED, Rule(f"{_ATTENTION}.qkv.bias", QKV_BIASES, FUSED_QKV_BIAS)),
    "split": (
        Rule(tuple(f"{name}.weight" for name in _BRANCHES), QKV, SPLIT_QKV),
        *(
            Rule(f"{name}.bias", bias, optional=True)
            for name, bias in zip(_BRANCHES, QKV_BIASES, strict=True)
        ),
    ),
}
# How a file holds the first layer of the MLP.
_HIDDEN = {
    "": linear(f"{_MLP}.fc1", f"{BLOCK}/mlp/fc1"),
    PACKED: packed_mlp(f"{_MLP}.fc1"),
    "gated": (
        *linear(f"{_MLP}.fc1_g", f"{BLOCK}/mlp/gate"),
        *linear(f"{_MLP}.fc1_x", f"{BLOCK}/mlp/fc1"),
    ),
}


def _variant(rows: str, qkv: str, hidden: str) -> Table:
    positions = optional(position_rules("pos_embed", rows, "reg_token"))
    own = (*positions, *_QKV[qkv], *_HIDDEN[hidden])
    return Table((*_ALWAYS, *own, *optional(_SOMETIMES)), _DROPS)


def _pick(tensors: Mapping[str, Tensor]) -> str:
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    table = tensors.get("pos_embed")
    rows = position_rows(table, cls="cls_token" in tensors, registers=registers)
    hidden = "gated" if "blocks.0.mlp.fc1_g.weight" in tensors else ""
    if is_packed(tensors, "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"):
        hidden = PACKED
    qkv = "one bias" if "blocks.0.attn.qkv.bias" in tensors else ""
    qkv = "split" if "blocks.0.attn.q_proj.weight" in tensors else qkv
    return variant_name(rows, qkv, hidden)


STYLE = Style(
    "timm_eva",
    "timm's Eva",
    "vit",
    {variant_name(*case): _variant(*case) for case in itertools.product(ROWS, _QKV, _HIDDEN)},
    ("patch_embed.proj.weight", "blocks.0.attn.proj.weight", "blocks.0.mlp.fc2.weight"),
    unlike=("storage_tokens", "*relative_position_bias_table", "blocks.*.ls1.gamma"),
    norms=("norm.weight", "fc_norm.weight"),
    one_of=(
        ("blocks.0.attn.qkv.weight", "blocks.0.attn.q_proj.weight"),
        ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1_g.weight"),
    ),
    pick=_pick,
    asks=("rope_theta",),
)

FAMILY = Family("eva", styles=(STYLE,))
