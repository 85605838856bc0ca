"""Networks of toy size with what the public ones beside the plain ViT have, and their reference."""

import torch

from tests import tiny
from tests.reference import eva

_EVA02 = {
    "position": "ape_rope",
    "rope_theta": 10000.0,
    "rope_pairs": "neighbours",
    "rope_reference": 3,
    "qkv_bias": "qv",
    "gated_mlp": True,
    "activation": "silu",
}
# One for each kind of network; the sizes are those of `tiny.TEACHER` (4 heads of 12 channels).
ARCHITECTURES = {
    "EVA-02-S": _EVA02,
    "EVA-02-B": {**_EVA02, "mlp_norm": True},
    "EVA-02-CLIP": {**_EVA02, "mlp_norm": True, "attn_norm": True},
    "BEiT-3": {"mlp_norm": True, "attn_norm": True, "norm_eps": 1e-5},
    "Perception Encoder": {
        **{name: value for name, value in _EVA02.items() if name.startswith("rope")},
        "position": "ape_rope",
        "rope_offset": 1.0,
        "rope_axes": "xy",
        "ln_pre": True,
        "patch_bias": False,
        "layer_scale": 0.1,
        "norm_eps": 1e-5,
    },
    "RoPE-ViT": {
        "position": "rope",
        "rope_theta": 100.0,
        "rope_pairs": "neighbours",
        "rope_reference": 0,
        "rope_axes": "xy",
        "layer_scale": 0.1,
    },
    "rotary with a register": {
        "position": "rope",
        "rope_theta": 10000.0,
        "rope_pairs": "neighbours",
        "rope_reference": 3,
        "qkv_bias": "none",
        "cls_token": False,
        "registers": 1,
        "layer_scale": 0.1,
    },
}


def spec(name, **arch):
    return tiny.teacher_spec(**{**ARCHITECTURES[name], **arch})


def names(arch):
    """From our paths to those of the reference."""
    return eva.GATED if arch.get("gated_mlp") else eva.PLAIN


def reference(arch, tensors):
    """The reference network of an architecture; tensors are float64 by its names."""
    turns = None
    if "rope" in arch["position"]:
        turns = eva.Turns(
            arch["rope_theta"],
            arch["rope_reference"] or None,
            arch.get("rope_offset", 0.0),
            columns_first=arch.get("rope_axes") == "xy",
            neighbours=arch["rope_pairs"] == "neighbours",
        )
    return eva.Network(
        tensors, arch["patch_size"], arch["heads"], arch["norm_eps"], arch["activation"], turns
    )


def wide(tensors):
    """Arrays by name in torch's float64, of which gradients can be taken."""
    return {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in tensors.items()}
