"""Networks of toy size that are written for timm, one for each class of timm and each switch in it.

`benchmarks.coverage --opened` writes the folders of all of them, opens each with timm, and stores
what timm made of it in `opened/`; the tests repeat it without timm.
"""

import zlib

import numpy as np

from fd_jax.convert import networks
from fd_jax.convert.trees import flat
from fd_jax.models.spec import ModelSpec

STATISTICS = {"mean": (0.5, 0.4, 0.6), "std": (0.2, 0.3, 0.25)}
PLAIN = {
    "image_size": 12,
    "patch_size": 4,
    "width": 32,
    "depth": 2,
    "heads": 4,
    "mlp_width": 96,
    "position": "ape",
    "cls_token": True,
    "registers": 0,
    "ln_pre": False,
    "final_norm": True,
    "activation": "gelu_erf",
    "norm_eps": 1e-6,
    "layer_scale": None,
    "qkv_bias": "qkv",
    "patch_bias": True,
}
STUDENT = {**PLAIN, "position": "shared_rpb", "qkv_bias": "qv", "layer_scale": 0.1}
TURNED = {"rope_theta": 10000.0, "rope_pairs": "neighbours"}
EVA02 = {**PLAIN, **TURNED, "position": "ape_rope", "rope_reference": 3, "qkv_bias": "qv"}
GATED = {"gated_mlp": True, "activation": "silu", "mlp_width": 40}
DINOV3 = {
    **PLAIN,
    "position": "rope",
    "rope_theta": 100.0,
    "registers": 2,
    "layer_scale": 1.0,
    "norm_eps": 1e-5,
    "qkv_bias": "qv",
}
SWIN = {
    "image_size": 64,
    "patch_size": 4,
    "embed_width": 16,
    "depths": [2, 1, 1, 1],
    "heads": [2, 2, 4, 4],
    "window": 4,
    "mlp_ratio": 2,
    "activation": "gelu_erf",
    "norm_eps": 1e-5,
    "final_norm": True,
}
SWIN_V2 = {
    **SWIN,
    "position": "rpb",
    "pretrained_windows": [6, 6, 6, 3],
    "residual_scale": 0.0,
    "extra_norm_every": 0,
}
CONVNEXT = {
    "image_size": 64,
    "patch_size": 4,
    "widths": [8, 12, 16, 20],
    "depths": [1, 1, 2, 1],
    "kernel_size": 7,
    "grn": False,
    "layer_scale": 1e-6,
    "activation": "gelu_erf",
    "norm_eps": 1e-6,
    "final_norm": False,
    "final_norm_eps": None,
}
RESNET = {
    "image_size": 64,
    "patch_size": 4,
    "stem_widths": [64],
    "widths": [16, 24, 32, 40],
    "inner_widths": [4, 6, 8, 10],
    "depths": [1, 2, 1, 1],
    "bottleneck": True,
    "stride_at": "second",
    "shortcut": "strided",
    "activation": "relu",
    "norm_eps": 1e-5,
}
RESNET_D = {**RESNET, "stem_widths": [6, 8, 16], "shortcut": "pooled", "activation": "silu"}
RESNET_D |= {"bottleneck": False, "inner_widths": RESNET["widths"], "stride_at": "first"}
POOL = {"kind": "attention", "heads": 4, "mlp_width": 96}
SIGLIP = {**PLAIN, "cls_token": False, "activation": "gelu_tanh"}
CLIP = {**PLAIN, "ln_pre": True, "patch_bias": False, "activation": "quick_gelu", "norm_eps": 1e-5}
PE = {**EVA02, "rope_offset": 1.0, "rope_axes": "xy", "qkv_bias": "qkv", "norm_eps": 1e-5}
PE |= {"ln_pre": True, "patch_bias": False}

# name -> family, architecture, fields of the spec
CASES = {
    "student": ("vit", STUDENT, {}),
    "student fine-tuned": (
        "vit",
        {**STUDENT, "position": "rpb", "final_norm": False},
        {"classes": 3, "pooling": "mean_norm", "class_names": ["cat", "dog", "owl"]},
    ),
    "student probed": ("vit", STUDENT, {"classes": 3, "pooling": "mean"}),
    "plain": ("vit", PLAIN, {"classes": 3}),
    "without biases": ("vit", {**PLAIN, "qkv_bias": "none", "layer_scale": 1.0}, {}),
    "oblong": ("vit", {**PLAIN, "image_size": [12, 16]}, {}),
    "cropped": ("vit", {**PLAIN, "image_size": 14, "partial_patches": "crop"}, {}),
    "without a last norm": ("vit", {**PLAIN, "final_norm": False}, {}),
    "registers": ("vit", {**PLAIN, "registers": 2, "layer_scale": 1.0}, {}),
    "register, no class": ("vit", {**PLAIN, "registers": 1, "cls_token": False}, {}),
    "inner norms": (
        "vit",
        {**PLAIN, "attn_norm": True, "mlp_norm": True, "norm_eps": 1e-5, "final_norm": False},
        {"classes": 3, "pooling": "mean_norm"},
    ),
    "gated": ("vit", {**PLAIN, **GATED}, {}),
    "CLIP": ("vit", CLIP, {}),
    "SigLIP": (
        "vit",
        SIGLIP,
        {"pool": {**POOL, "activation": "gelu_tanh", "norm_eps": 1e-6}},
    ),
    "EVA-02": (
        "vit",
        {**EVA02, **GATED, "mlp_norm": True, "final_norm": False},
        {"classes": 3, "pooling": "mean_norm"},
    ),
    "EVA-02 S": ("vit", {**EVA02, **GATED, "attn_norm": True}, {}),
    "Perception Encoder": (
        "vit",
        PE,
        {"pool": {**POOL, "heads": 2, "activation": "gelu_erf", "norm_eps": 1e-5}},
    ),
    "Perception Encoder, spatial": ("vit", {**PE, "final_norm": False}, {}),
    "DINOv3": ("vit", DINOV3, {}),
    "DINOv3, gated": ("vit", {**DINOV3, **GATED, "qkv_bias": "none"}, {}),
    "RoPE-ViT": (
        "vit",
        {**PLAIN, **TURNED, "position": "rope", "rope_reference": 0, "layer_scale": 1.0},
        {"classes": 3},
    ),
    "RoPE-ViT, 1e-5": (
        "vit",
        {**DINOV3, **TURNED, "rope_reference": 0, "registers": 0, "qkv_bias": "qkv"},
        {},
    ),
    "rotary with positions": ("vit", {**EVA02, "registers": 2}, {}),
    "Swin": ("swin", SWIN, {"classes": 3, "pooling": "mean"}),
    "Swin V2": ("swin_v2", {**SWIN_V2, "activation": "gelu_tanh"}, {}),
    "ConvNeXt": ("convnext", CONVNEXT, {"classes": 3, "pooling": "mean_norm"}),
    "ConvNeXt, features": ("convnext", CONVNEXT, {}),
    "ConvNeXt V2": (
        "convnext",
        {**CONVNEXT, "grn": True, "layer_scale": None, "kernel_size": 5, "norm_eps": 1e-4},
        {"classes": 3, "pooling": "mean_norm"},
    ),
    "ConvNeXt, DINOv3": (
        "convnext",
        {**CONVNEXT, "final_norm": True},
        {"classes": 3, "pooling": "mean"},
    ),
    "ResNet": ("resnet", RESNET, {"classes": 3, "pooling": "mean"}),
    "ResNet, wide": ("resnet", {**RESNET, "inner_widths": [8, 12, 16, 20]}, {}),
    "ResNet-D, oblong": ("resnet", {**RESNET_D, "image_size": [70, 100]}, {}),
}


def spec(name: str) -> ModelSpec:
    """The description of a case."""
    family, arch, fields = CASES[name]
    return ModelSpec(family, dict(arch), **STATISTICS, **fields, source="a run")


def params(made: ModelSpec) -> dict[str, np.ndarray]:
    """Weights by path, which follow from the paths; head, norm and pool where there are any."""
    shapes = {f"encoder/{path}": leaf.shape for path, leaf in flat(made.abstract()[1]).items()}
    width = networks.width(made)
    if made.classes:
        shapes |= {"head/kernel": (width, made.classes), "head/bias": (made.classes,)}
    if made.pooling == "mean_norm":
        shapes |= {"fc_norm/scale": (width,), "fc_norm/bias": (width,)}
    if made.pool is not None:
        pool = flat(made.abstract_pool()[1])
        shapes |= {f"pool/{path}": leaf.shape for path, leaf in pool.items()}
    return {path: _array(path, shape) for path, shape in shapes.items()}


def _array(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Small kernels and tokens, scales near 1, Swin V2's logit scales near their start."""
    noise = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape)
    last = path.rpartition("/")[2]
    if last == "var":  # near that of what enters, so that the epsilon counts
        return (1e-3 * (1 + 0.2 * noise)).astype(np.float32)
    start = {"scale": 1.0, "gamma": 1.0, "gamma_1": 1.0, "gamma_2": 1.0, "logit_scale": 2.3}
    size = 0.05 if last in ("cls_token", "register_tokens", "pos_embed") else 0.2
    if "patch_embed" in path:  # small, so that the epsilon of the first norm counts
        size = 0.02
    return (start.get(last, 0.0) + size * noise).astype(np.float32)
