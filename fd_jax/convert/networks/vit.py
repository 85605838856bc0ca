"""Vision transformers: parameter paths, published sizes, what other libraries take for granted."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from fd_jax.convert.layout import FINAL_NORM, need
from fd_jax.convert.networks.network import Network
from fd_jax.models import vit
from fd_jax.models.rotary import Rope

NETWORK = Network(
    depths=lambda arch: [arch["depth"]],
    width=lambda arch: arch["width"],
    positions=lambda arch: arch["position"],
)


def _is_dinov3s(arch: Mapping[str, Any]) -> bool:
    others = (field for field in dataclasses.fields(Rope) if field.name != "theta")
    given = (arch.get(f"rope_{field.name}", field.default) == field.default for field in others)
    return arch["position"] == "rope" and all(given)


BLOCK = "encoder/blocks/{i}"
QKV = f"{BLOCK}/attn/qkv/kernel"
QKV_BIASES = (f"{BLOCK}/attn/q_bias", f"{BLOCK}/attn/k_bias", f"{BLOCK}/attn/v_bias")

SIZES = {
    "S": {"width": 384, "depth": 12, "heads": 6, "mlp_width": 1536},
    "B": {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072},
    "L": {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096},
}

CLASS_TOKEN = need("a class token", lambda arch: arch["cls_token"])
NO_CLASS_TOKEN = need("no class token", lambda arch: not arch["cls_token"])
REGISTERS = need("register tokens", lambda arch: arch["registers"] > 0)
PATCH_BIAS = need("a bias of the patch embedding", lambda arch: arch["patch_bias"])
NORM_BEFORE_BLOCKS = need("a norm before the blocks", lambda arch: arch["ln_pre"])
ABSOLUTE = need("absolute positions", lambda arch: arch["position"] == "ape")
SHARED_TABLE = need(
    "a shared relative position table", lambda arch: arch["position"] == "shared_rpb"
)
ROTARY = need("DINOv3's rotary positions", _is_dinov3s)
NOT_ROTARY = need("positions that are not rotary", lambda arch: arch["position"] not in vit.ROTARY)
BIASES_QKV = need("biases of q, k and v", lambda arch: arch["qkv_bias"] == "qkv")
BIASES_QV = need("biases of q and v alone", lambda arch: arch["qkv_bias"] == "qv")
LAYER_SCALE = need("layer scale", lambda arch: arch["layer_scale"] is not None)
WHOLE_MLP_RATIO = need(
    "an MLP whose width is a multiple of the network's",
    lambda arch: arch["mlp_width"] % arch["width"] == 0,
)

# What most classes of vision transformers share.
PLAIN = (CLASS_TOKEN, FINAL_NORM, PATCH_BIAS, ABSOLUTE, BIASES_QKV)
