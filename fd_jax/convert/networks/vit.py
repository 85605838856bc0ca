"""Vision transformers: parameter paths, published sizes, what shapes tell of them."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from fd_jax.convert.containers.tensors import Tensor
from fd_jax.convert.layout import FINAL_NORM, need
from fd_jax.convert.networks.network import (
    PIXELS,
    STAND_INS,
    Network,
    Settled,
    Shapes,
    patches,
    shape_of,
)
from fd_jax.convert.rules.tables import Rule, linear, norm, optional
from fd_jax.convert.rules.transforms import (
    HALVES,
    PACKED_GATE,
    PATCH_POSITIONS,
    QUERY_AND_KEY_VALUE,
    SAME,
    folded_positions,
)
from fd_jax.errors import ConversionError
from fd_jax.models import sizes, vit
from fd_jax.models.rotary import Rope
from fd_jax.models.spec import ModelSpec


def _is_dinov3s(arch: Mapping[str, Any]) -> bool:
    others = (field for field in dataclasses.fields(Rope) if field.name != "theta")
    given = (arch.get(f"rope_{field.name}", field.default) == field.default for field in others)
    return arch["position"] == "rope" and all(given)


BLOCK = "encoder/blocks/{i}"
QKV = f"{BLOCK}/attn/qkv/kernel"
QKV_BIASES = (f"{BLOCK}/attn/q_bias", f"{BLOCK}/attn/k_bias", f"{BLOCK}/attn/v_bias")

POOL = "pool"
POOL_HEAD = "the attention pooling head"  # why its tensors are dropped
PROJECTION = f"{POOL}/projection/kernel"

SIZES = {
    "S": {"width": 384, "depth": 12, "heads": 6, "mlp_width": 1536},
    "B": {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072},
    "L": {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096},
}

# Variants of a position table, by the tokens that have a row before those of the patches.
CLASS_ROW = ""
NO_ROW = "patches"
ALL_ROWS = "registers"
ALL_ROWS_NO_CLASS = "registers without class"
ROWS = (CLASS_ROW, NO_ROW, ALL_ROWS, ALL_ROWS_NO_CLASS)
PACKED = "packed"  # variant of a gated MLP whose two branches are one tensor

_FIRST = BLOCK.format(i=0)
_BIASES = {"qkv": "qkv", "qv": "qv", "": "none"}
_SHARED_TABLE = "encoder/rel_pos_bias/table"
_BLOCK_TABLE = f"{_FIRST}/attn/rel_pos_bias/table"
# The start value of gamma in a network with fresh weights; a file has the trained ones.
_SCALE_START = 1.0
# Fields that plain networks do not have, by the parameter that shows them.
EXTRAS = {
    "gated_mlp": f"{_FIRST}/mlp/gate/kernel",
    "mlp_norm": f"{_FIRST}/mlp/norm/scale",
    "attn_norm": f"{_FIRST}/attn/norm/scale",
}
ROPE = {f"rope_{field.name}": field.default for field in dataclasses.fields(Rope)}
_POSITION_TABLES = ("encoder/pos_embed", _SHARED_TABLE, _BLOCK_TABLE)


def _told(shapes: Shapes, depths: Sequence[int], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    del tensors
    patch_size, width = patches(shapes)
    biases = "".join(name for name in "qkv" if f"{_FIRST}/attn/{name}_bias" in shapes)
    if biases not in _BIASES:
        raise ConversionError(f"of q, k and v only {biases} has a bias")
    registers = shapes.get("encoder/register_tokens", (1, 0, width))
    found = {
        "patch_size": patch_size,
        "width": width,
        "depth": depths[0],
        "mlp_width": shape_of(shapes, f"{_FIRST}/mlp/fc2/kernel", 2)[0],
        "cls_token": "encoder/cls_token" in shapes,
        "registers": registers[1],
        "ln_pre": "encoder/ln_pre/scale" in shapes,
        "final_norm": "encoder/norm/scale" in shapes,
        "scaled": f"{_FIRST}/gamma_1" in shapes,
        "qkv_bias": _BIASES[biases],
        "patch_bias": "encoder/patch_embed/bias" in shapes,
        **{name: path in shapes for name, path in EXTRAS.items()},
    }
    return found | _positions(shapes, int(found["cls_token"])) | _pool(shapes)


def _pool(shapes: Shapes) -> dict[str, Any]:
    """The projection of the class token, if that is how one vector is made of a picture.

    Of a pool with a learned query the shapes tell the width of its MLP alone.
    """
    if f"{POOL}/latent" in shapes:
        return {"pool_mlp_width": shape_of(shapes, f"{POOL}/mlp/fc1/kernel", 2)[1]}
    if PROJECTION not in shapes:
        return {}
    return {"pool": {"kind": "projection", "width": shapes[PROJECTION][1]}}


def _positions(shapes: Shapes, cls: int) -> dict[str, Any]:
    """The kind of the position table, and for how many patches it is."""
    tables = [path for path in _POSITION_TABLES if path in shapes]
    if not tables:
        return {"table": None}
    if len(tables) > 1:
        raise ConversionError(f"it has several position tables: {', '.join(tables)}")
    shape = shapes[tables[0]]
    if tables[0] == "encoder/pos_embed":
        return {"table": "ape", "patches": shape[1] - cls}
    offsets = math.isqrt(shape[0] - 3 * cls)
    if offsets**2 + 3 * cls != shape[0] or offsets % 2 == 0:
        raise ConversionError(f"{tables[0]} has {shape[0]} rows: not the offsets of a square grid")
    kind = "shared_rpb" if tables[0] == _SHARED_TABLE else "rpb"
    return {"table": kind, "patches": ((offsets + 1) // 2) ** 2, "heads": shape[1]}


def _asks(told: Mapping[str, Any]) -> tuple[str, ...]:
    asked = ["heads", "activation", "norm_eps", *PIXELS]
    if told["table"] == "ape":
        asked.append("position_resize")
    if told["table"] is None:
        asked += ["rope_theta", "image_size"]
    elif math.isqrt(told["patches"]) ** 2 != told["patches"]:
        asked.append("image_size")
    return tuple(asked)


_PLAIN = (
    "patch_size width depth heads mlp_width cls_token registers ln_pre final_norm activation "
    "norm_eps qkv_bias patch_bias"
).split()
_KINDS = {
    (None, True): "rope",
    ("ape", True): "ape_rope",
    ("ape", False): "ape",
    ("rpb", False): "rpb",
    ("shared_rpb", False): "shared_rpb",
}


def _arch(settled: Settled) -> tuple[dict[str, Any], list[str]]:
    facts = {name: claim.value for name, claim in settled.items()}
    turned = facts.get("rope_theta") is not None
    given = {name: facts.get(name, usual) for name, usual in ROPE.items()} if turned else {}
    rotary = {name: value for name, value in given.items() if value != ROPE[name]}
    kind = facts["table"], turned
    if kind not in _KINDS:
        raise ConversionError("it has rotary positions beside a table of relative ones")
    size, remarks = _image_size(settled)
    arch = {name: facts[name] for name in _PLAIN}
    arch["layer_scale"] = facts.get("layer_scale", _SCALE_START) if facts["scaled"] else None
    arch |= {"image_size": sizes.plain(size), "position": _KINDS[kind], **rotary}
    arch |= {name: True for name in EXTRAS if facts.get(name)}
    if any(side % facts["patch_size"] for side in sizes.sides(size)):
        arch["partial_patches"] = "crop"
    return arch, remarks


def _image_size(settled: Settled) -> tuple[sizes.ImageSize, list[str]]:
    """The size that the position table is for, and a remark if it is said to be another."""
    claim, patch_size = settled.get("image_size"), settled["patch_size"].value
    if settled["table"].value is None:
        assert claim is not None
        return claim.value, []
    count = settled["patches"].value
    if claim is not None and math.prod(sizes.patch_grid(claim.value, patch_size)) == count:
        return claim.value, []
    if claim is not None and len(set(sizes.sides(claim.value))) > 1:
        raise ConversionError(f"its {count} positions are not those of the image: {claim}")
    side = math.isqrt(count)
    if side**2 != count:
        said = "" if claim is None else f", not of {claim}"
        raise ConversionError(f"its {count} positions are not those of a square image{said}")
    if claim is None:
        return side * patch_size, []
    remark = f"positions are those of {side * patch_size} px; {claim.origin} says {claim.value} px"
    return side * patch_size, [remark]


def position_rows(table: Tensor | None, *, cls: bool, registers: int) -> str:
    """For which tokens beside the patches a position table [1, rows, D] has rows.

    The patches of a square image are a square number, which decides it in all published networks.

    Args:
      table: the table, if there is one.
      cls: whether the network has a class token.
      registers: how many registers it has; a distillation token counts as one.

    Returns:
      One of ROWS; a network without class token and registers has CLASS_ROW.

    Raises:
      ConversionError: the rows can be read in several ways.
    """
    if table is None or len(table.shape) != 3:
        return CLASS_ROW
    rows = table.shape[1]
    choices = [(CLASS_ROW, int(cls))]
    choices += [(NO_ROW, 0)] if cls else []
    choices += [(ALL_ROWS if cls else ALL_ROWS_NO_CLASS, cls + registers)] if registers else []
    squares = [name for name, before in choices if _is_square(rows - before)]
    if len(squares) > 1:
        raise ConversionError(
            f"a position table of {rows} rows can be one with rows for class token and registers "
            "or one without; convert the network in its own library to one without registers"
        )
    return squares[0] if squares else CLASS_ROW


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def position_rules(name: str, rows: str, registers: str) -> tuple[Rule, ...]:
    """Rules of a position table, and of the registers whose positions may be in it.

    Args:
      name: of the table.
      rows: what `position_rows` finds.
      registers: name of the registers.
    """
    table, tokens = "encoder/pos_embed", "encoder/register_tokens"
    if rows in (ALL_ROWS, ALL_ROWS_NO_CLASS):
        change = folded_positions(int(rows == ALL_ROWS))
        return (Rule((registers, name), (tokens, table), change),)
    change = PATCH_POSITIONS if rows == NO_ROW else SAME
    return (Rule(name, table, change), Rule(registers, tokens, optional=True))


def timm_pool(name: str) -> tuple[Rule, ...]:
    """Rules of timm's pool with a learned query, which few networks have."""
    return optional(
        (
            Rule(f"{name}.latent", f"{POOL}/latent"),
            Rule((f"{name}.q.weight", f"{name}.kv.weight"), POOL_QKV, QUERY_AND_KEY_VALUE),
            Rule(f"{name}.q.bias", POOL_BIASES[0]),
            Rule(f"{name}.kv.bias", POOL_BIASES[1:], HALVES),
            *linear(f"{name}.proj", f"{POOL}/attn/proj"),
            *norm(f"{name}.norm", f"{POOL}/norm"),
            *linear(f"{name}.mlp.fc1", f"{POOL}/mlp/fc1"),
            *linear(f"{name}.mlp.fc2", f"{POOL}/mlp/fc2"),
        )
    )


def is_pool_of_blocks(spec: ModelSpec) -> bool:
    """Whether a network has a pool with a learned query, of the sizes and facts of its blocks."""
    names = ("heads", "mlp_width", "activation", "norm_eps")
    return spec.pool == {"kind": "attention", **{name: spec.arch[name] for name in names}}


POOL_QKV = f"{POOL}/attn/qkv/kernel"
POOL_BIASES = tuple(f"{POOL}/attn/{name}_bias" for name in "qkv")


def is_packed(tensors: Mapping[str, Tensor], hidden: str, out: str) -> bool:
    """Whether the first layer of an MLP is twice as wide as its second one takes."""
    first, second = (tensors.get(f"{name}.weight") for name in (hidden, out))
    if first is None or second is None or not len(first.shape) == len(second.shape) == 2:
        return False
    return first.shape[0] == 2 * second.shape[1]


def packed_mlp(name: str) -> tuple[Rule, ...]:
    """Rules of the tensor that holds gate and value of a gated MLP, one below the other."""
    gate, value = f"{BLOCK}/mlp/gate", f"{BLOCK}/mlp/fc1"
    return (
        Rule(f"{name}.weight", (f"{gate}/kernel", f"{value}/kernel"), PACKED_GATE),
        Rule(f"{name}.bias", (f"{gate}/bias", f"{value}/bias"), HALVES),
    )


def _stand_ins(told: Mapping[str, Any]) -> dict[str, Any]:
    side = math.isqrt(told.get("patches") or 1) * told["patch_size"]
    theta = 100.0 if told["table"] is None else None
    return {
        **STAND_INS,
        **ROPE,
        "heads": told["width"] // 4,
        "rope_theta": theta,
        "image_size": side,
    }


NETWORK = Network(
    depths=lambda arch: [arch["depth"]],
    width=lambda arch: arch.get("last_width") or arch["width"],
    positions=lambda arch: arch["position"],
    told=_told,
    asks=_asks,
    arch=_arch,
    stand_ins=_stand_ins,
)

CLASS_TOKEN = need("a class token", lambda arch: arch["cls_token"])
NO_CLASS_TOKEN = need("no class token", lambda arch: not arch["cls_token"])
REGISTERS = need("register tokens", lambda arch: arch["registers"] > 0)
ONE_REGISTER = need("one register token", lambda arch: arch["registers"] == 1)
PATCH_BIAS = need("a bias of the patch embedding", lambda arch: arch["patch_bias"])
PATCH_BIAS_OR_NORM = need(
    "a bias of the patch embedding or a norm before the blocks, and not both",
    lambda arch: arch["patch_bias"] != arch["ln_pre"],
)
NORM_BEFORE_BLOCKS = need("a norm before the blocks", lambda arch: arch["ln_pre"])
ABSOLUTE = need("absolute positions", lambda arch: arch["position"] == "ape")
SHARED_TABLE = need(
    "a shared relative position table", lambda arch: arch["position"] == "shared_rpb"
)
ROTARY = need("DINOv3's rotary positions", _is_dinov3s)
TURNED = need("rotary positions", lambda arch: arch["position"] in vit.ROTARY)
ABSOLUTE_OR_TURNED = need(
    "absolute or rotary positions",
    lambda arch: arch["position"] in {*vit.ABSOLUTE, *vit.ROTARY},
)
NOT_ROTARY = need("positions that are not rotary", lambda arch: arch["position"] not in vit.ROTARY)
BIASES_QKV = need("biases of q, k and v", lambda arch: arch["qkv_bias"] == "qkv")
BIASES_ALL_OR_NONE = need(
    "biases of q, k and v, or of none", lambda arch: arch["qkv_bias"] in ("qkv", "none")
)
BIASES_QV = need("biases of q and v alone", lambda arch: arch["qkv_bias"] == "qv")
LAYER_SCALE = need("layer scale", lambda arch: arch["layer_scale"] is not None)
PLAIN_MLP = need("an MLP without a gate", lambda arch: not arch.get("gated_mlp"))
GATED_MLP = need("an MLP with a gate", lambda arch: bool(arch.get("gated_mlp")))
NO_INNER_NORMS = need(
    "no norms inside attention and MLP",
    lambda arch: not arch.get("attn_norm") and not arch.get("mlp_norm"),
)
WHOLE_MLP_RATIO = need(
    "an MLP whose width is a multiple of the network's",
    lambda arch: arch["mlp_width"] % arch["width"] == 0,
)

# What most classes of vision transformers share.
PLAIN = (CLASS_TOKEN, FINAL_NORM, PATCH_BIAS, ABSOLUTE, BIASES_QKV)
