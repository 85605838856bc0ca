"""Small networks of timm and open_clip, and what they make of a picture: tests/convert/outputs.

Their weights follow from names and shapes, so only the outputs are stored; the tests repeat them
without the libraries. There is a network for every style, and for what switches its arithmetic.
"""

import json
from pathlib import Path
import tempfile
from typing import Any

import numpy as np
import torch

from benchmarks.coverage import making
from tests.convert import seeded

OUTPUT = Path("tests/convert/outputs")
_VIT = {"depth": 2, "img_size": 32, "patch_size": 8}
_SWIN = {"depths": [2, 1, 1, 1], "img_size": 64, "embed_dim": 24, "window_size": 4}

# name -> network of timm and the arguments that make it small; head widths are 4, 8 or 16
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_small_patch16_224.augreg_in21k", {"embed_dim": 48, **_VIT}),
    "vit_mean": ("vit_base_patch16_siglip_gap_224.v2_webli", {"embed_dim": 48, **_VIT}),
    "vit_map": ("vit_base_patch16_siglip_224.v2_webli", {"embed_dim": 48, **_VIT}),
    "vit_crop": (
        "vit_base_patch16_siglip_224.webli",
        {"embed_dim": 48, **_VIT, "img_size": 30},
    ),
    "vit_registers": (
        "vit_small_patch14_reg4_dinov2.lvd142m",
        {"embed_dim": 48, **_VIT},
    ),
    "vit_prefix_positions": (
        "vit_so150m2_patch16_reg1_gap_256.sbb_e200_in12k",
        {"embed_dim": 52, **_VIT},
    ),
    "vit_distilled": ("deit_tiny_distilled_patch16_224.fb_in1k", {"embed_dim": 48, **_VIT}),
    "vit_deit3": ("deit3_small_patch16_224.fb_in22k_ft_in1k", {"embed_dim": 48, **_VIT}),
    "vit_gated": (
        "vit_giant_patch14_dinov2.lvd142m",
        {"embed_dim": 96, **_VIT},
    ),
    "vit_clip": ("vit_base_patch16_clip_224.laion2b", {"embed_dim": 48, **_VIT}),
    "vit_quick_gelu": (
        "vit_base_patch16_clip_quickgelu_224.metaclip_400m",
        {"embed_dim": 48, **_VIT},
    ),
    "vit_beit3": ("beit3_base_patch16_224.in22k_ft_in1k", {"embed_dim": 48, **_VIT}),
    "beit": ("beit_base_patch16_224.in22k_ft_in22k_in1k", {"embed_dim": 48, **_VIT}),
    "eva": ("eva_large_patch14_196.in22k_ft_in22k_in1k", {"embed_dim": 64, **_VIT}),
    "eva02": ("eva02_tiny_patch14_224.mim_in22k", {"embed_dim": 48, **_VIT}),
    "eva02_clip": ("eva02_base_patch16_clip_224.merged2b", {"embed_dim": 96, **_VIT}),
    "eva_pe_core": ("vit_pe_core_tiny_patch16_384.fb", {"embed_dim": 48, **_VIT}),
    "eva_pe_spatial": ("vit_pe_spatial_tiny_patch16_512.fb", {"embed_dim": 48, **_VIT}),
    "eva_rope": ("vit_medium_patch16_rope_reg1_gap_256.sbb_in1k", {"embed_dim": 64, **_VIT}),
    "eva_dinov3": ("vit_small_patch16_dinov3.lvd1689m", {"embed_dim": 48, **_VIT}),
    "eva_dinov3_qkvb": ("vit_small_patch16_dinov3_qkvb.lvd1689m", {"embed_dim": 48, **_VIT}),
    "eva_dinov3_gated": ("vit_small_plus_patch16_dinov3.lvd1689m", {"embed_dim": 48, **_VIT}),
    "swin": ("swin_tiny_patch4_window7_224.ms_in1k", _SWIN),
    "swin_v2": ("swinv2_tiny_window8_256.ms_in1k", _SWIN),
    "swin_v2_trained": (
        "swinv2_base_window12to16_192to256.ms_in22k_ft_in1k",
        {**_SWIN, "embed_dim": 32},
    ),
    "convnext": (
        "convnext_tiny.fb_in22k",
        {"depths": [1, 1, 2, 1], "dims": [8, 16, 32, 64]},
    ),
    "convnext_v2": (
        "convnextv2_tiny.fcmae_ft_in22k_in1k",
        {"depths": [1, 1, 2, 1], "dims": [8, 16, 32, 64]},
    ),
    "resnet": ("resnet50.a1_in1k", {"layers": [1, 2, 1, 1], "channels": [4, 6, 8, 12]}),
    "resnet_d": (
        "resnet18d.ra2_in1k",
        {"layers": [1, 2, 1, 1], "channels": [16, 20, 24, 32], "stem_width": 8},
    ),
}
# name -> model and tag of open_clip
OPEN_CLIP = {
    "clip_quick_gelu": "ViT-B-32-quickgelu.openai",
    "clip_gelu": "ViT-L-14.laion2b_s32b_b82k",
    "clip_coca": "coca_ViT-L-14.laion2b_s13b_b90k",
}


def write() -> None:
    """Writes all of them; says how large they are."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for name, (network, arguments) in TIMM.items():
        _write(name, _of_timm(network, arguments))
    for name, network in OPEN_CLIP.items():
        _write(name, _of_open_clip(network))
    files = list(OUTPUT.glob("*.*"))
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1000:.0f} kB")


def _write(name: str, made: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    about, arrays = made
    (OUTPUT / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
    np.savez_compressed(OUTPUT / f"{name}.npz", **arrays)


def _of_timm(name: str, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    import timm
    from timm.models import _hub

    model = timm.create_model(name, pretrained=False, num_classes=0, **arguments).eval()
    making.fill(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        _hub.save_config_for_hf(model, path, model_args={"num_classes": 0, **arguments})
        config = json.loads(path.read_text())
    size = arguments.get("img_size", 64)
    other = making.other_size(model, size)
    arrays = {}
    for side in (size, other):
        run = (
            model
            if side == size
            else making.timm_at(model, name, side, {**arguments, "num_classes": 0})
        )
        statistics = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
        pixels = making.pixels(seeded.images(side), *statistics)
        with torch.no_grad():
            found = run.forward_features(pixels)
            if side == size and getattr(model, "attn_pool", None) is not None:
                arrays["pooled"] = run.forward_head(found, pre_logits=True).numpy()
        channels_first = making.is_map(model)
        arrays[str(side)] = making.tokens(found, channels_first=channels_first)
    about = {
        "library": f"timm {timm.__version__}",
        "network": name,
        "arguments": arguments,
        "weights": "model.safetensors",
        "beside": {"config.json": config},
        "shapes": {key: list(value.shape) for key, value in model.state_dict().items()},
    }
    return about, arrays


def _small_open_clip(model_name: str) -> tuple[Any, dict[str, Any]]:
    """The class of a model of open_clip and its configuration, small."""
    import open_clip

    config = open_clip.get_model_config(model_name)
    config.pop("custom_text", None)
    config["embed_dim"] = 24
    config["vision_cfg"] |= {"width": 48, "head_width": 8, "layers": 2, "image_size": 32}
    config["vision_cfg"] |= {"patch_size": 8}
    text = {"width": 16, "heads": 2, "layers": 1}
    config["text_cfg"] = {**text, "vocab_size": 50}
    if "multimodal_cfg" not in config:
        return open_clip.CLIP, config
    config["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
    config["multimodal_cfg"] = {**text, "context_length": 5, "attn_pooler_heads": 2}
    return open_clip.CoCa, config


def _of_open_clip(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    import open_clip

    model_name, _, tag = name.partition(".")
    kind, config = _small_open_clip(model_name)
    weights = open_clip.get_pretrained_cfg(model_name, tag)
    model = kind(**config).eval()
    making.fill(model)
    arrays = {}
    for side in (32, 48):
        native = side == 32
        tower = model.visual if native else making.open_clip_at(model, kind, config, side)
        pixels = making.pixels(seeded.images(side), weights["mean"], weights["std"])
        with torch.no_grad():
            arrays[str(side)] = making.open_clip_tokens(tower, pixels)
            if native and tower.attn_pool is None:
                arrays["pooled"] = tower(pixels).numpy()
    preprocess = {key: weights[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    about = {
        "library": f"open_clip {open_clip.__version__}",
        "network": name,
        "arguments": {},
        "weights": "open_clip_model.safetensors",
        "beside": {"open_clip_config.json": {"model_cfg": config, "preprocess_cfg": preprocess}},
        "shapes": {key: list(value.shape) for key, value in model.state_dict().items()},
    }
    return about, arrays
