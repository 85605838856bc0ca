"""Loads our timm exports into timm's own classes, strictly, and compares the features.

    pip install timm && python -m tests.convert.timm_check

Apart from the test suite, whose packages do not include timm and its torchvision.
"""

from pathlib import Path
import tempfile

import jax
import numpy as np
from safetensors.torch import load_file

from fd_jax import inference
from fd_jax.convert import exporting, families, importing
from tests.convert import oracles, synthetic

TOLERANCE = 1e-5
SOURCES = (
    "dino_vitb16",
    "deit_base_patch16_224",
    "openai_clip_vit_b16",
    "open_clip_vit_b16_laion2b",
    "dinov2_vitb14",
    "siglip2_base_patch16_224_hf",
    "timm_beit_base_patch16_224",
    "fd_official_distilled_clip_vit_b",
    "fd_official_finetuned_clip_vit_b",
    "esvit_swin_base_w14",
    "timm_swin_base_patch4_window7_224",
    "swinv2_base_patch4_window8_256",
    "swinv2_large_patch4_window12to16_192to256_22kto1k_ft",
    "fd_official_distilled_esvit_swin_b",
)


def timm_model(arch, classes):
    """The timm class for a network, and the keywords that make it ours."""
    from timm.layers import LayerNorm
    from timm.models.beit import Beit
    from timm.models.vision_transformer import VisionTransformer
    import torch

    acts = {
        "gelu_erf": torch.nn.GELU,
        "gelu_tanh": lambda: torch.nn.GELU(approximate="tanh"),
        "quick_gelu": lambda: QuickGELU(),
    }

    class QuickGELU(torch.nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x)

    common = {
        "img_size": arch["image_size"],
        "patch_size": arch["patch_size"],
        "embed_dim": arch["width"],
        "depth": arch["depth"],
        "num_heads": arch["heads"],
        "mlp_ratio": arch["mlp_width"] / arch["width"],
        "num_classes": classes,
        "norm_layer": lambda dim, **_: LayerNorm(dim, eps=arch["norm_eps"]),
        "init_values": arch["layer_scale"],
    }
    if arch["qkv_bias"] == "qv":
        return Beit(
            **common,
            use_abs_pos_emb=False,
            use_rel_pos_bias=arch["position"] == "rpb",
            use_shared_rel_pos_bias=arch["position"] == "shared_rpb",
            global_pool="token" if arch["final_norm"] else "avg",
        )
    return VisionTransformer(
        **common,
        act_layer=lambda: acts[arch["activation"]](),
        class_token=arch["cls_token"],
        pre_norm=arch["ln_pre"],
        global_pool="token" if arch["cls_token"] else "avg",
        fc_norm=False,
    )


def timm_swin(arch, classes):
    """The same for a network with stages; timm's features keep the grid, [B, H, W, D]."""
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    common = {
        "img_size": arch["image_size"],
        "patch_size": arch["patch_size"],
        "embed_dim": arch["embed_width"],
        "depths": arch["depths"],
        "num_heads": arch["heads"],
        "window_size": arch["window"],
        "mlp_ratio": arch["mlp_ratio"],
        "num_classes": classes,
    }
    if "position" not in arch:
        return SwinTransformer(**common)
    return SwinTransformerV2(**common, pretrained_window_sizes=arch["pretrained_windows"])


def check(name, folder):
    """Largest difference of features (or logits), relative to the largest value."""
    given = synthetic.structure(name)
    path = synthetic.write(given, synthetic.values(given), folder)
    importing.import_file(name, path, folder / "model")
    exporting.export("timm", folder / "model", folder / "timm.safetensors")
    loaded = inference.load_model(folder / "model")
    arch = loaded.spec.arch
    theirs = (timm_model if loaded.spec.family == "vit" else timm_swin)(arch, loaded.spec.classes)
    theirs.load_state_dict(load_file(folder / "timm.safetensors"), strict=True)
    size = arch["image_size"]
    images = np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(loaded(images).tokens)
    expected = oracles.run(theirs.eval().forward_features, images).reshape(ours.shape)
    return np.abs(ours - expected).max() / np.abs(expected).max()


def main():
    """Prints one line per source; fails on a key too few or too many, or another feature."""
    for name in SOURCES:
        families.SOURCES[name] = synthetic.small_source(name)
        with tempfile.TemporaryDirectory() as folder:
            difference = check(name, Path(folder))
        print(f"{name:40} {difference:.1e}", flush=True)
        assert difference < TOLERANCE


if __name__ == "__main__":
    main()
