"""The published backbones that are tried, and what each lacked in the converter of November 2026.

A kind of "" says that it was read then; "names" that only its size, patch, head or names were
unknown. Networks are made with two blocks (stages with one or two) of their real width.
"""

from typing import Any

NAMES = "names"
PREFIX = "prefix positions"
GATED = "gated MLP"
CONVNEXT = "ConvNeXt"
ROPE = "rotary positions of EVA"
EVA02 = "EVA-02 and BEiT-3"
CROP = "image side that the patch does not divide"
HIERA = "Hiera"
HYBRID = "another mixer or stem"
RESNET = "ResNet"
NAFLEX = "linear patches"
SAM = "SAM's windows"
AIM = "RMSNorm"
MIXED = "learned rotary frequencies"

TIMM: dict[str, tuple[str, ...]] = {
    "": (
        "beit_base_patch16_224.in22k_ft_in22k_in1k",
        "beitv2_base_patch16_224.in1k_ft_in22k_in1k",
        "swin_base_patch4_window7_224.ms_in22k",
        "swinv2_base_window12to16_192to256.ms_in22k_ft_in1k",
        "swinv2_base_window16_256.ms_in1k",
        "swinv2_base_window8_256.ms_in1k",
        "vit_base_patch14_dinov2.lvd142m",
        "vit_base_patch16_224.dino",
        "vit_base_patch16_224.mae",
        "vit_large_patch14_dinov2.lvd142m",
        "vit_small_patch14_dinov2.lvd142m",
    ),
    NAMES: (
        "beit_base_patch16_384.in22k_ft_in22k_in1k",
        "beit_large_patch16_224.in22k_ft_in22k_in1k",
        "beitv2_large_patch16_224.in1k_ft_in22k_in1k",
        "deit_base_patch16_224.fb_in1k",
        "deit_small_patch16_224.fb_in1k",
        "deit_tiny_patch16_224.fb_in1k",
        "eva_giant_patch14_224.clip_ft_in1k",
        "eva_large_patch14_336.in22k_ft_in22k_in1k",
        "swin_base_patch4_window12_384.ms_in22k_ft_in1k",
        "swin_large_patch4_window7_224.ms_in22k",
        "swin_small_patch4_window7_224.ms_in1k",
        "swin_tiny_patch4_window7_224.ms_in1k",
        "swinv2_large_window12_192.ms_in22k",
        "swinv2_tiny_window8_256.ms_in1k",
        "vit_base_patch16_224.augreg2_in21k_ft_in1k",
        "vit_base_patch16_384.augreg_in21k_ft_in1k",
        "vit_base_patch16_clip_224.openai",
        "vit_base_patch16_dinov3_qkvb.lvd1689m",
        "vit_base_patch16_lingbot.robbyant",
        "vit_base_patch16_siglip_224.webli",
        "vit_base_patch16_siglip_512.v2_webli",
        "vit_base_patch16_siglip_gap_224.v2_webli",
        "vit_base_patch32_224.augreg_in21k",
        "vit_base_patch32_clip_224.laion2b",
        "vit_base_patch8_224.augreg_in21k",
        "vit_base_patch8_224.dino",
        "vit_gigantic_patch14_clip_224.laion2b",
        "vit_huge_patch14_224.mae",
        "vit_huge_patch14_clip_224.laion2b",
        "vit_intern300m_patch14_448.ogvl_2pt5",
        "vit_large_patch14_clip_224.datacompxl",
        "vit_large_patch14_clip_336.openai",
        "vit_large_patch14_clip_quickgelu_224.metaclip_400m",
        "vit_large_patch16_224.augreg_in21k",
        "vit_large_patch16_224.mae",
        "vit_large_patch16_dinov3.lvd1689m",
        "vit_large_patch32_384.orig_in21k_ft_in1k",
        "vit_small_patch16_224.augreg_in21k",
        "vit_small_patch16_224.dino",
        "vit_small_patch16_dinov3.lvd1689m",
        "vit_small_patch8_224.dino",
        "vit_so400m_patch14_siglip_gap_448.pali2_3b_pt",
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    ),
    PREFIX: (
        "deit3_base_patch16_224.fb_in22k_ft_in1k",
        "deit3_small_patch16_224.fb_in22k_ft_in1k",
        "deit_base_distilled_patch16_224.fb_in1k",
        "vit_base_patch14_reg4_dinov2.lvd142m",
        "vit_base_patch16_radio_v3.c_radio",
        "vit_huge_patch16_radio_v4.c_radio",
        "vit_large_patch14_reg4_dinov2.lvd142m",
        "vit_small_patch14_reg4_dinov2.lvd142m",
        "vit_so150m2_patch16_reg1_gap_256.sbb_e200_in12k",
    ),
    GATED: (
        "vit_giant_patch14_dinov2.lvd142m",
        "vit_giant_patch14_reg4_dinov2.lvd142m",
        "vit_huge_plus_patch16_dinov3.lvd1689m",
    ),
    CONVNEXT: (
        "convnext_base.dinov3_lvd1689m",
        "convnext_base.fb_in22k",
        "convnextv2_base.fcmae_ft_in22k_in1k",
    ),
    ROPE: (
        "vit_base_patch16_rope_reg1_gap_256.sbb_in1k",
        "vit_pe_core_large_patch14_336.fb",
        "vit_pe_lang_large_patch14_448.fb",
        "vit_pe_spatial_large_patch14_448.fb",
    ),
    EVA02: (
        "beit3_base_patch16_224.in22k_ft_in1k",
        "eva02_base_patch14_224.mim_in22k",
        "eva02_base_patch16_clip_224.merged2b",
        "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k",
    ),
    CROP: ("vit_so400m_patch14_siglip_384.webli",),
    HIERA: ("hiera_base_224.mae", "sam2_hiera_base_plus.fb_r896_2pt1"),
    HYBRID: (
        "vit_base_r50_s16_384.orig_in21k_ft_in1k",
        "vitamin_large_224.datacomp1b_clip",
        "xcit_small_12_p16_224.fb_in1k",
    ),
    RESNET: ("resnet50.a1_in1k", "resnet50_clip.openai"),
    NAFLEX: ("naflexvit_base_patch16_siglip.v2_webli",),
    SAM: ("samvit_base_patch16.sa1b",),
    AIM: ("aimv2_large_patch14_224.apple_pt",),
    MIXED: ("vit_base_patch16_rope_mixed_ape_224.naver_in1k",),
}

# Networks of timm's classes on the hub of Hugging Face, with the arguments of their config.json.
# Virchow2's model card passes two more in code, see `making.IN_CODE`.
HUB: dict[str, tuple[str, str, dict[str, Any]]] = {
    "MahmoodLab/UNI": (
        NAMES,
        "vit_large_patch16_224",
        {"img_size": 224, "init_values": 1.0, "num_classes": 0, "dynamic_img_size": True},
    ),
    "bioptimus/H-optimus-0": (
        GATED,
        "vit_giant_patch14_reg4_dinov2",
        {"img_size": 224, "init_values": 1e-5, "num_classes": 0, "global_pool": ""},
    ),
    "paige-ai/Virchow2": (
        GATED,
        "vit_huge_patch14_224",
        {
            "img_size": 224,
            "init_values": 1e-5,
            "num_classes": 0,
            "reg_tokens": 4,
            "mlp_ratio": 5.3375,
            "global_pool": "",
            "dynamic_img_size": True,
        },
    ),
}

_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
_BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
_HUGE = {"hidden_size": 1280, "num_attention_heads": 16, "intermediate_size": 5120}
_SO400M = {"hidden_size": 1152, "num_attention_heads": 16, "intermediate_size": 4304}
_DINOV2 = {"image_size": 518, "patch_size": 14, "layer_norm_eps": 1e-6}
_QUICK = {"hidden_act": "quick_gelu"}
_SWIN = {"embed_dim": 128, "depths": [1, 1, 2, 2], "num_heads": [4, 8, 16, 32]}
_SWIN_LARGE = {"embed_dim": 192, "depths": [1, 1, 2, 2], "num_heads": [6, 12, 24, 48]}
_BEIT = {"use_relative_position_bias": True, "use_mask_token": False, "layer_scale_init_value": 0.1}
_GELU_TANH = {"hidden_act": "gelu_pytorch_tanh"}

# name -> what it lacked, class of transformers, fields of config.json or of its vision_config,
# pixel statistics.
HUGGING_FACE: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "google/vit-base-patch16-224-in21k": (NAMES, "ViTModel", _BASE, "half"),
    "google/vit-base-patch16-224": (NAMES, "ViTForImageClassification", _BASE, "half"),
    "google/vit-large-patch16-384": (
        NAMES,
        "ViTForImageClassification",
        {**_LARGE, "image_size": 384},
        "half",
    ),
    "google/vit-huge-patch14-224-in21k": (NAMES, "ViTModel", {**_HUGE, "patch_size": 14}, "half"),
    "facebook/dino-vitb16": ("", "ViTModel", _BASE, "imagenet"),
    "facebook/dino-vits8": (NAMES, "ViTModel", {**_SMALL, "patch_size": 8}, "imagenet"),
    "facebook/deit-base-patch16-224": (NAMES, "ViTForImageClassification", _BASE, "imagenet"),
    "facebook/deit-base-distilled-patch16-224": (
        PREFIX,
        "DeiTForImageClassificationWithTeacher",
        _BASE,
        "imagenet",
    ),
    "facebook/vit-msn-base": (NAMES, "ViTMSNModel", {**_BASE, "layer_norm_eps": 1e-6}, "imagenet"),
    "facebook/vit-mae-base": (
        NAMES,
        "ViTMAEForPreTraining",
        {**_BASE, "decoder_num_hidden_layers": 1},
        "imagenet",
    ),
    "facebook/dinov2-small": ("", "Dinov2Model", {**_SMALL, **_DINOV2}, "imagenet"),
    "facebook/dinov2-base": ("", "Dinov2Model", {**_BASE, **_DINOV2}, "imagenet"),
    "facebook/dinov2-large": ("", "Dinov2Model", {**_LARGE, **_DINOV2}, "imagenet"),
    "facebook/dinov2-giant": (
        GATED,
        "Dinov2Model",
        {"hidden_size": 1536, "num_attention_heads": 24, "use_swiglu_ffn": True, **_DINOV2},
        "imagenet",
    ),
    "facebook/dinov2-base-imagenet1k-1-layer": (
        "",
        "Dinov2ForImageClassification",
        {**_BASE, **_DINOV2},
        "imagenet",
    ),
    "facebook/dinov2-with-registers-small": (
        "",
        "Dinov2WithRegistersModel",
        {**_SMALL, **_DINOV2, "num_register_tokens": 4},
        "imagenet",
    ),
    "facebook/dinov2-with-registers-base": (
        "",
        "Dinov2WithRegistersModel",
        {**_BASE, **_DINOV2, "num_register_tokens": 4},
        "imagenet",
    ),
    "facebook/dinov2-with-registers-giant": (
        GATED,
        "Dinov2WithRegistersModel",
        {
            "hidden_size": 1536,
            "num_attention_heads": 24,
            "use_swiglu_ffn": True,
            "num_register_tokens": 4,
            **_DINOV2,
        },
        "imagenet",
    ),
    "microsoft/rad-dino": ("", "Dinov2Model", {**_BASE, **_DINOV2}, "rad-dino"),
    "owkin/phikon-v2": (
        NAMES,
        "Dinov2Model",
        {**_LARGE, **_DINOV2, "image_size": 224, "patch_size": 16},
        "imagenet",
    ),
    "facebook/webssl-dino1b-full2b-224": (
        GATED,
        "Dinov2Model",
        {
            "hidden_size": 1536,
            "num_attention_heads": 24,
            "use_swiglu_ffn": True,
            **_DINOV2,
            "image_size": 224,
        },
        "imagenet",
    ),
    "facebook/webssl-dino2b-full2b-224": (
        GATED,
        "Dinov2Model",
        {
            "hidden_size": 2688,
            "num_attention_heads": 21,
            "use_swiglu_ffn": True,
            **_DINOV2,
            "image_size": 224,
        },
        "imagenet",
    ),
    "facebook/dinov3-vits16-pretrain-lvd1689m": (
        "",
        "DINOv3ViTModel",
        {**_SMALL, "num_register_tokens": 4},
        "imagenet",
    ),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": (
        "",
        "DINOv3ViTModel",
        {**_BASE, "num_register_tokens": 4},
        "imagenet",
    ),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": (
        NAMES,
        "DINOv3ViTModel",
        {**_LARGE, "num_register_tokens": 4},
        "imagenet",
    ),
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": (
        GATED,
        "DINOv3ViTModel",
        {
            "hidden_size": 1280,
            "num_attention_heads": 20,
            "intermediate_size": 5120,
            "use_gated_mlp": True,
            "hidden_act": "silu",
            "num_register_tokens": 4,
        },
        "imagenet",
    ),
    "facebook/dinov3-convnext-tiny-pretrain-lvd1689m": (
        CONVNEXT,
        "DINOv3ConvNextModel",
        {"hidden_sizes": [96, 192, 384, 768], "depths": [1, 1, 2, 1]},
        "imagenet",
    ),
    "openai/clip-vit-base-patch16": (
        "",
        "CLIPModel",
        {**_BASE, "patch_size": 16, **_QUICK},
        "clip",
    ),
    "openai/clip-vit-base-patch32": (
        NAMES,
        "CLIPModel",
        {**_BASE, "patch_size": 32, **_QUICK},
        "clip",
    ),
    "openai/clip-vit-large-patch14": (
        "",
        "CLIPModel",
        {**_LARGE, "patch_size": 14, **_QUICK},
        "clip",
    ),
    "openai/clip-vit-large-patch14-336": (
        NAMES,
        "CLIPModel",
        {**_LARGE, "patch_size": 14, "image_size": 336, **_QUICK},
        "clip",
    ),
    "laion/CLIP-ViT-B-16-laion2B-s34B-b88K": (
        NAMES,
        "CLIPModel",
        {**_BASE, "patch_size": 16, "hidden_act": "gelu"},
        "clip",
    ),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": (
        NAMES,
        "CLIPModel",
        {**_HUGE, "patch_size": 14, "hidden_act": "gelu"},
        "clip",
    ),
    "facebook/metaclip-2-worldwide-huge-quickgelu": (
        NAMES,
        "MetaClip2Model",
        {**_HUGE, "patch_size": 14, **_QUICK},
        "clip",
    ),
    "CLIPVisionModel, saved by transformers 5": (
        NAMES,
        "CLIPVisionModel",
        {**_BASE, "patch_size": 16, **_QUICK},
        "clip",
    ),
    "google/siglip-base-patch16-224": ("", "SiglipModel", {**_BASE, **_GELU_TANH}, "half"),
    "google/siglip2-base-patch16-224": ("", "SiglipModel", {**_BASE, **_GELU_TANH}, "half"),
    "google/siglip2-so400m-patch14-384": (
        CROP,
        "SiglipModel",
        {**_SO400M, "patch_size": 14, "image_size": 384, **_GELU_TANH},
        "half",
    ),
    "google/siglip-so400m-patch14-384": (
        CROP,
        "SiglipModel",
        {**_SO400M, "patch_size": 14, "image_size": 384, **_GELU_TANH},
        "half",
    ),
    "google/siglip2-base-patch16-naflex": (
        NAFLEX,
        "Siglip2Model",
        {**_BASE, "num_patches": 256, **_GELU_TANH},
        "half",
    ),
    "microsoft/beit-base-patch16-224-pt22k": (
        NAMES,
        "BeitForMaskedImageModeling",
        {
            **_BASE,
            "use_shared_relative_position_bias": True,
            "use_mask_token": True,
            "use_mean_pooling": False,
            "layer_scale_init_value": 0.1,
        },
        "half",
    ),
    "microsoft/beit-base-patch16-224": (
        NAMES,
        "BeitForImageClassification",
        {**_BASE, **_BEIT},
        "half",
    ),
    "facebook/data2vec-vision-base": (
        NAMES,
        "Data2VecVisionModel",
        {**_BASE, **_BEIT, "use_mask_token": True},
        "half",
    ),
    "microsoft/swin-base-patch4-window7-224": (
        "",
        "SwinForImageClassification",
        {**_SWIN, "window_size": 7},
        "imagenet",
    ),
    "microsoft/swin-base-patch4-window7-224-in22k": (
        "",
        "SwinForImageClassification",
        {**_SWIN, "window_size": 7},
        "imagenet",
    ),
    "microsoft/swin-large-patch4-window12-384": (
        NAMES,
        "SwinForImageClassification",
        {**_SWIN_LARGE, "window_size": 12, "image_size": 384},
        "imagenet",
    ),
    "microsoft/swinv2-base-patch4-window8-256": (
        "",
        "Swinv2ForImageClassification",
        {**_SWIN, "window_size": 8, "image_size": 256},
        "imagenet",
    ),
    "microsoft/swinv2-base-patch4-window12to16-192to256-22kto1k-ft": (
        NAMES,
        "Swinv2ForImageClassification",
        {
            **_SWIN,
            "window_size": 16,
            "image_size": 256,
            "pretrained_window_sizes": [12, 12, 12, 6],
        },
        "imagenet",
    ),
    "facebook/convnextv2-base-22k-224": (
        CONVNEXT,
        "ConvNextV2ForImageClassification",
        {"hidden_sizes": [128, 256, 512, 1024], "depths": [1, 1, 2, 1]},
        "imagenet",
    ),
    "facebook/convnext-base-224-22k": (
        CONVNEXT,
        "ConvNextForImageClassification",
        {"hidden_sizes": [128, 256, 512, 1024], "depths": [1, 1, 2, 1]},
        "imagenet",
    ),
    "apple/aimv2-large-patch14-224": (
        AIM,
        "Aimv2VisionModel",
        {
            "hidden_size": 1024,
            "num_attention_heads": 8,
            "intermediate_size": 2816,
            "image_size": 224,
            "patch_size": 14,
        },
        "clip",
    ),
    "facebook/hiera-base-224-hf": (HIERA, "HieraModel", {"depths": [1, 1, 1, 1]}, "imagenet"),
    "facebook/sam-vit-base": (SAM, "SamVisionModel", {"image_size": 256}, "imagenet"),
    "OpenGVLab/InternVL3 (vision)": (
        NAMES,
        "InternVLVisionModel",
        {**_LARGE, "image_size": 448, "patch_size": 14, "attention_bias": True},
        "imagenet",
    ),
    "microsoft/resnet-50": (RESNET, "ResNetModel", {}, "imagenet"),
}

# model and tag of open_clip -> what it lacked
OPEN_CLIP: dict[str, str] = {
    "EVA02-B-16.merged2b_s8b_b131k": EVA02,
    "EVA02-L-14-336.merged2b_s6b_b61k": EVA02,
    "ViT-B-16.laion2b_s34b_b88k": "",
    "ViT-B-16-SigLIP.webli": NAMES,
    "ViT-B-16-SigLIP2.webli": NAMES,
    "ViT-B-16-quickgelu.openai": "",
    "ViT-B-32-quickgelu.openai": NAMES,
    "ViT-B-32.laion2b_s34b_b79k": NAMES,
    "ViT-H-14.laion2b_s32b_b79k": NAMES,
    "ViT-H-14-378-quickgelu.dfn5b": NAMES,
    "ViT-L-14.datacomp_xl_s13b_b90k": "",
    "ViT-L-14.laion2b_s32b_b82k": "",
    "ViT-L-14-336-quickgelu.openai": "",
    "ViT-bigG-14.laion2b_s39b_b160k": NAMES,
    "coca_ViT-L-14.laion2b_s13b_b90k": NAMES,
}


def names() -> list[str]:
    """All names, in the order of the page."""
    timm = [name for names in TIMM.values() for name in names]
    return [*timm, *HUB, *HUGGING_FACE, *OPEN_CLIP]
