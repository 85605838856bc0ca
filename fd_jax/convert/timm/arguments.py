"""The arguments of timm's VisionTransformer, Beit, ConvNeXt and ResNet, and their parts.

The functions are those that `Timm` asks for; `families/` says which class takes which.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from fd_jax.convert.layout import need
from fd_jax.convert.networks.resnet import base_width, expansion
from fd_jax.convert.networks.vit import (
    ALL_ROWS,
    ALL_ROWS_NO_CLASS,
    CLASS_ROW,
    NO_ROW,
    PACKED,
    is_pool_of_blocks,
)
from fd_jax.convert.style import variant_name
from fd_jax.convert.timm import ACTIVATIONS, Arguments, ratio, scale
from fd_jax.models.spec import ModelSpec

CONVOLVED = "convolved"  # word of variants whose MLPs are stored as 1x1 convolutions
# Words of the variants of a ResNet.
DEEP_STEM, POOLED_SHORTCUT = "deep_stem", "pooled_shortcut"


def vit_variant(spec: ModelSpec) -> str:
    """The names of a network of another library: registers have rows of zeros in the table."""
    arch = spec.arch
    rows = ALL_ROWS if arch["registers"] and arch["cls_token"] else CLASS_ROW
    return variant_name(rows, PACKED if arch.get("gated_mlp") else "")


def vit_arguments(spec: ModelSpec, variant: str, parts: Set[str]) -> Arguments:
    """The arguments of a VisionTransformer."""
    arch, words = spec.arch, variant.split("+")
    gated = bool(arch.get("gated_mlp"))
    return {
        "img_size": arch["image_size"],
        "patch_size": arch["patch_size"],
        "embed_dim": arch["width"],
        "depth": arch["depth"],
        "num_heads": arch["heads"],
        "mlp_ratio": ratio(arch["mlp_width"] * (1 + gated), arch["width"]),
        "act_layer": ACTIVATIONS[arch["activation"]],
        "qkv_bias": arch["qkv_bias"] == "qkv",
        "init_values": scale(spec),
        "class_token": arch["cls_token"],
        "reg_tokens": arch["registers"],
        "no_embed_class": NO_ROW in words or not (arch["cls_token"] or ALL_ROWS_NO_CLASS in words),
        "pre_norm": arch["ln_pre"],
        "final_norm": arch["final_norm"] or "fc_norm" in parts,
        "fc_norm": "fc_norm" in parts,
        "scale_attn_norm": bool(arch.get("attn_norm")),
        "scale_mlp_norm": bool(arch.get("mlp_norm")),
        "pool_include_prefix": False,
        "dynamic_img_size": False,
    }


def vit_parts(spec: ModelSpec, paths: Set[str]) -> set[str]:
    """The last norm is that of all tokens or that of their mean; a pool has the block's sizes."""
    found = {path.partition("/")[0] for path in paths}
    if spec.arch["final_norm"] or "norm_mean" in spec.pooling:
        found -= {"fc_norm"}
    normed = spec.pooling in ("mean_norm", "norm_mean")
    if normed != ("fc_norm" in found):
        found -= {"head"}
    pooled = is_pool_of_blocks(spec) and not spec.arch.get("gated_mlp")
    if "head" in found or not pooled or spec.arch["norm_eps"] != 1e-6:
        found -= {"pool"}
    return found & {"head", "fc_norm", "pool"}


def vit_base(spec: ModelSpec, parts: Set[str]) -> str:
    """An architecture with the epsilon, the gate and the pool of a network."""
    if spec.arch.get("gated_mlp"):
        return "vit_giant_patch14_dinov2"
    if "pool" in parts:
        return "vit_base_patch16_siglip_224"
    return "vit_base_patch16_224" if spec.arch["norm_eps"] == 1e-6 else "vit_base_patch16_clip_224"


def beit_arguments(spec: ModelSpec, variant: str, parts: Set[str]) -> Arguments:
    """The arguments of a Beit."""
    del variant
    arch, position = spec.arch, spec.arch["position"]
    return {
        "img_size": arch["image_size"],
        "patch_size": arch["patch_size"],
        "embed_dim": arch["width"],
        "depth": arch["depth"],
        "num_heads": arch["heads"],
        "mlp_ratio": ratio(arch["mlp_width"], arch["width"]),
        "qkv_bias": True,
        "init_values": scale(spec),
        "use_abs_pos_emb": position == "ape",
        "use_rel_pos_bias": position == "rpb",
        "use_shared_rel_pos_bias": position == "shared_rpb",
        "use_fc_norm": "fc_norm" in parts,
    }


def beit_parts(spec: ModelSpec, paths: Set[str]) -> set[str]:
    """Either all tokens are normalised at the end or their mean."""
    mean = not spec.arch["final_norm"]
    reads = spec.pooling == "mean_norm" if mean else spec.pooling in ("cls", "mean")
    head = {"head"} if "head/kernel" in paths and reads else set()
    return head | ({"fc_norm"} if mean and "fc_norm/scale" in paths else set())


def convnext_arguments(spec: ModelSpec, variant: str, parts: Set[str]) -> Arguments:
    """The arguments of a ConvNeXt."""
    del parts
    arch = spec.arch
    scaled = {} if arch["layer_scale"] is None else {"ls_init_value": arch["layer_scale"]}
    return {
        "patch_size": arch["patch_size"],
        "depths": arch["depths"],
        "dims": arch["widths"],
        "kernel_sizes": arch["kernel_size"],
        **scaled,
        "use_grn": arch["grn"],
        "conv_mlp": CONVOLVED in variant.split("+"),
        "act_layer": ACTIVATIONS[arch["activation"]],
        "norm_eps": arch["norm_eps"],
        "head_norm_first": arch["final_norm"],
        "head_hidden_size": 0,
    }


def convnext_parts(spec: ModelSpec, paths: Set[str]) -> set[str]:
    """The last norm is that of all tokens or that of their mean."""
    normed = spec.arch["final_norm"]
    head = spec.pooling == ("mean" if normed else "mean_norm") and "head/kernel" in paths
    return ({"head"} if head else set()) | (set() if normed else {"fc_norm"})


def convnext_base(spec: ModelSpec, parts: Set[str]) -> str:
    """An architecture with or without a layer scale."""
    del parts
    return "convnextv2_base" if spec.arch["layer_scale"] is None else "convnext_base"


def convnext_alike(facts: Mapping[str, Any], spec: ModelSpec) -> bool:
    """Whether an architecture has a layer scale where the network has one."""
    return bool(facts.get("grn")) == (spec.arch["layer_scale"] is None)


def convnext_norm(spec: ModelSpec, paths: Set[str]) -> dict[str, np.ndarray]:
    """The norm of the mean token, which the class always has and no feature depends on."""
    if spec.arch["final_norm"] or "fc_norm/scale" in paths:
        return {}
    ones = np.ones(spec.arch["widths"][-1], np.float32)
    return {"head.norm.weight": ones, "head.norm.bias": np.zeros_like(ones)}


def resnet_variant(spec: ModelSpec) -> str:
    """The names of a network of another library."""
    deep, pooled = len(spec.arch["stem_widths"]) > 1, spec.arch["shortcut"] == "pooled"
    return variant_name(DEEP_STEM if deep else "", POOLED_SHORTCUT if pooled else "")


def resnet_arguments(spec: ModelSpec, variant: str, parts: Set[str]) -> Arguments:
    """The arguments of a ResNet; the class of its blocks is the architecture's."""
    del variant, parts
    arch = spec.arch
    return {
        "layers": arch["depths"],
        "channels": [width // expansion(arch) for width in arch["widths"]],
        "base_width": base_width(arch),
        **_resnet_stem(arch["stem_widths"]),
        "avg_down": arch["shortcut"] == "pooled",
        "act_layer": ACTIVATIONS[arch["activation"]],
    }


def _resnet_stem(widths: Sequence[int]) -> Arguments:
    """The arguments of a stem; the class makes a plain one of 64 channels and of no others."""
    if len(widths) == 1:
        return {"stem_type": "", "stem_width": 64}
    kind = "deep" if widths[0] == widths[1] else "deep_tiered"
    return {"stem_type": kind, "stem_width": widths[1]}


def _stem_of(arguments: Arguments) -> list[int]:
    """The widths that the class makes of such arguments."""
    kind, width = arguments["stem_type"], arguments["stem_width"]
    if not kind:
        return [64]
    return [3 * (width // 4) if "tiered" in kind else width, width, 2 * width]


KNOWN_STEM = need(
    "a stem of 64 channels, or of three widths as in ResNet-C or ResNet-T",
    lambda arch: _stem_of(_resnet_stem(arch["stem_widths"])) == list(arch["stem_widths"]),
)


def resnet_parts(spec: ModelSpec, paths: Set[str]) -> set[str]:
    """The classifier reads the mean of the map."""
    return {"head"} if "head/kernel" in paths and spec.pooling == "mean" else set()


def resnet_base(spec: ModelSpec, parts: Set[str]) -> str:
    """An architecture with the same blocks."""
    del parts
    return "resnet50" if spec.arch["bottleneck"] else "resnet18"


def resnet_alike(facts: Mapping[str, Any], spec: ModelSpec) -> bool:
    """Whether an architecture has the class of blocks, which no argument says."""
    return facts["bottleneck"] == spec.arch["bottleneck"]
