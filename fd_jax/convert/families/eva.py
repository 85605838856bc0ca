"""EVA, Perception Encoder and DINOv3 in the names of timm's Eva: rotary positions and gates."""

from collections.abc import Mapping, Set
import itertools
from typing import Any

from fd_jax.convert.containers.tensors import Tensor
from fd_jax.convert.family import Family
from fd_jax.convert.layout import EPSILON_1E6_OR_1E5, Need
from fd_jax.convert.networks.vit import (
    ABSOLUTE_OR_TURNED,
    ALL_ROWS,
    ALL_ROWS_NO_CLASS,
    BLOCK,
    CLASS_ROW,
    NO_ROW,
    PACKED,
    PATCH_BIAS_OR_NORM,
    POOL_HEAD,
    QKV,
    QKV_BIASES,
    ROWS,
    TURNED,
    is_packed,
    packed_mlp,
    position_rows,
    position_rules,
    timm_pool,
)
from fd_jax.convert.rules.tables import Drop, Rule, Table, linear, norm, optional
from fd_jax.convert.rules.transforms import CONV, FUSED_QKV, FUSED_QKV_BIAS, SPLIT_QKV
from fd_jax.convert.style import Style, variant_name
from fd_jax.convert.timm import Arguments, Timm, ratio
from fd_jax.models.rotary import Rope
from fd_jax.models.spec import ModelSpec
from fd_jax.models.vit import ABSOLUTE, ROTARY

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
_ONE_BIAS, _SPLIT, _GATED = "one bias", "split", "gated"  # words of variants
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
    _ONE_BIAS: (_FUSED, Rule(f"{_ATTENTION}.qkv.bias", QKV_BIASES, FUSED_QKV_BIAS)),
    _SPLIT: (
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
    _GATED: (
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
    hidden = _GATED if "blocks.0.mlp.fc1_g.weight" in tensors else ""
    if is_packed(tensors, "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"):
        hidden = PACKED
    qkv = _ONE_BIAS if "blocks.0.attn.qkv.bias" in tensors else ""
    qkv = _SPLIT if "blocks.0.attn.q_proj.weight" in tensors else qkv
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

# --- the class, made by arguments


def _rope(spec: ModelSpec) -> Rope | None:
    """How the network turns queries and keys; None if it does not."""
    if spec.arch["position"] not in ROTARY:
        return None
    given = {name: value for name, value in spec.arch.items() if name.startswith("rope_")}
    return Rope(**{"theta": 100.0, **{n.removeprefix("rope_"): v for n, v in given.items()}})


def _names(spec: ModelSpec) -> str:
    """The names of a network of another library: registers have rows of zeros in a table."""
    arch = spec.arch
    table = arch["position"] in ABSOLUTE and arch["registers"] and arch["cls_token"]
    hidden = ""
    if arch.get("gated_mlp"):
        hidden = _GATED if arch.get("mlp_norm") else PACKED
    qkv = _ONE_BIAS if arch["qkv_bias"] == "qkv" else ""
    return variant_name(ALL_ROWS if table else CLASS_ROW, qkv, hidden)


def _arguments(spec: ModelSpec, variant: str, parts: Set[str]) -> Arguments:
    arch, words = spec.arch, variant.split("+")
    gated, table = bool(arch.get("gated_mlp")), arch["position"] in ABSOLUTE
    scaled = {} if arch["layer_scale"] is None else {"init_values": arch["layer_scale"] or 1e-5}
    return {
        "img_size": arch["image_size"],
        "patch_size": arch["patch_size"],
        "embed_dim": arch["width"],
        "depth": arch["depth"],
        "num_heads": arch["heads"],
        "mlp_ratio": ratio(arch["mlp_width"], arch["width"]),
        "swiglu_mlp": gated,
        # Gate and value are one tensor unless a norm or an alignment, here of 1, keeps them apart.
        "swiglu_align_to": int(gated and PACKED not in words),
        "scale_mlp": bool(arch.get("mlp_norm")),
        "scale_attn_inner": bool(arch.get("attn_norm")),
        "attn_type": "rope" if arch["qkv_bias"] == "qkv" else "eva",  # eva has no bias of k
        "qkv_fused": _SPLIT not in words,
        "qkv_bias": arch["qkv_bias"] != "none",
        **scaled,
        "class_token": arch["cls_token"],
        "num_reg_tokens": arch["registers"],
        "no_embed_class": NO_ROW in words or not (arch["cls_token"] or ALL_ROWS_NO_CLASS in words),
        "use_abs_pos_emb": table,
        "use_pre_transformer_norm": arch["ln_pre"],
        "use_post_transformer_norm": arch["final_norm"],
        "use_fc_norm": "fc_norm" in parts,
        "dynamic_img_size": not table,
        **_rope_arguments(_rope(spec)),
        **_pool_arguments(spec, parts),
    }


def _rope_arguments(rope: Rope | None) -> Arguments:
    if rope is None:
        return {"use_rot_pos_emb": False}
    counted = rope.reference is not None
    return {
        "use_rot_pos_emb": True,
        "rope_type": "cat" if counted else "dinov3",
        "rope_temperature": rope.theta,
        "rope_rotate_half": rope.pairs == "halves",
        "rope_grid_indexing": "xy" if rope.axes == "xy" else "ij",
        "rope_grid_offset": rope.offset,
        **({"ref_feat_shape": rope.reference} if rope.reference else {}),
    }


def _pool_arguments(spec: ModelSpec, parts: Set[str]) -> Arguments:
    if "pool" not in parts:
        return {}
    pool: Any = spec.pool
    ratio_ = ratio(pool["mlp_width"], spec.arch["width"])
    return {"attn_pool_num_heads": pool["heads"], "attn_pool_mlp_ratio": ratio_}


def _parts(spec: ModelSpec, paths: Set[str]) -> set[str]:
    """The parts beside the encoder that the class has as well."""
    found = {path.partition("/")[0] for path in paths} & {"head", "fc_norm", "pool"}
    normed = spec.pooling in ("mean_norm", "norm_mean")
    if spec.pooling == "norm_mean" or normed != ("fc_norm" in found):
        found -= {"head"}
    if spec.pooling == "norm_mean":
        found -= {"fc_norm"}
    pool, eps = dict(spec.pool or {}), spec.arch["norm_eps"]
    given = {"kind": "attention", "activation": "gelu_erf", "norm_eps": 1e-5}
    rest = {name: value for name, value in pool.items() if name not in ("heads", "mlp_width")}
    if "head" in found or rest != given or eps != 1e-5:
        found -= {"pool"}
    return found


def _base(spec: ModelSpec, parts: Set[str]) -> str:
    """An architecture with the epsilon; without a reference grid and layer scale if need be."""
    del parts
    rope, coarse = _rope(spec), spec.arch["norm_eps"] == 1e-5
    if rope is not None and not rope.reference and spec.arch["layer_scale"] is not None:
        return "vit_base_patch16_dinov3" if coarse else "vit_base_patch16_rope_224"
    return "vit_pe_core_base_patch16_224" if coarse else "eva02_base_patch14_224"


_ACTIVATION = Need(
    "the exact GELU, or SiLU in a gated MLP",
    lambda spec, paths: (
        spec.arch["activation"] == ("silu" if spec.arch.get("gated_mlp") else "gelu_erf")
    ),
)
# No architecture without a layer scale counts patches so.
_SCALED = Need(
    "a layer scale beside rotary positions without a reference grid",
    lambda spec, paths: (
        (rope := _rope(spec)) is None or rope.reference != 0 or spec.arch["layer_scale"] is not None
    ),
)
LAYOUT = Timm(
    "Eva",
    "vit",
    STYLE.tables[""],
    (ABSOLUTE_OR_TURNED, PATCH_BIAS_OR_NORM, EPSILON_1E6_OR_1E5, _ACTIVATION, _SCALED),
    style=STYLE,
    variant=_names,
    apart=(TURNED,),
    parts=_parts,
    arguments=_arguments,
    base=_base,
)

FAMILY = Family("eva", layouts=(LAYOUT,), styles=(STYLE,))
