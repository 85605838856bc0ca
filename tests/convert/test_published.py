"""The tables of published networks: what they say, and what becomes of names that they lack.

The expected facts are those of the publishers' papers and repositories, not read from the tables.
"""

import re

import pytest

from fd_jax.convert import published
from fd_jax.errors import ConversionError
from fd_jax.models import layers
from fd_jax.models.spec import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD

HALF = (0.5, 0.5, 0.5)
KNOWN = {
    "vit_base_patch16_224.augreg_in21k": {
        "width": 768,
        "depth": 12,
        "heads": 12,
        "mlp_width": 3072,
        "patch_size": 16,
        "image_size": 224,
        "activation": "gelu_erf",
        "norm_eps": 1e-6,
        "mean": HALF,
        "std": HALF,
        "pooling": "cls",
        "position_resize": "antialias",
    },
    "vit_base_patch16_224.dino": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "norm_eps": 1e-6},
    "beitv2_base_patch16_224.in1k_ft_in22k_in1k": {"mean": IMAGENET_MEAN, "pooling": "mean_norm"},
    "beit_base_patch16_224.in22k_ft_in22k_in1k": {"mean": HALF, "std": HALF},
    "vit_base_patch16_clip_224.openai": {"activation": "gelu_erf", "mean": CLIP_MEAN},
    "vit_base_patch16_clip_quickgelu_224.openai": {"activation": "quick_gelu", "norm_eps": 1e-5},
    "vit_giant_patch14_dinov2.lvd142m": {
        "gated_mlp": True,
        "activation": "silu",
        "heads": 24,
        "mlp_width": 4096,
        "image_size": 518,
    },
    "vit_base_patch14_reg4_dinov2.lvd142m": {"registers": 4, "norm_eps": 1e-6},
    "deit_base_distilled_patch16_224.fb_in1k": {"registers": 1},
    "vit_base_patch16_siglip_224.webli": {
        "activation": "gelu_erf",  # timm's choice; big_vision and transformers have the tanh one
        "pool": {
            "kind": "attention",
            "heads": 12,
            "mlp_width": 3072,
            "activation": "gelu_erf",
            "norm_eps": 1e-6,
        },
    },
    "eva02_base_patch14_224.mim_in22k": {
        "position": "ape_rope",
        "rope_theta": 10000.0,
        "rope_reference": 16,
        "rope_pairs": "neighbours",
        "gated_mlp": True,
    },
    "eva02_base_patch16_clip_224.merged2b": {"mlp_norm": True, "attn_norm": True},
    "beit3_base_patch16_224.in22k_ft_in1k": {"mlp_norm": True, "attn_norm": True},
    "vit_pe_core_large_patch14_336.fb": {"rope_offset": 1.0, "rope_reference": 24},
    "vit_base_patch16_dinov3.lvd1689m": {
        "position": "rope",
        "rope_theta": 100.0,
        "rope_pairs": "halves",
        "norm_eps": 1e-5,
        "registers": 4,
    },
    "swin_base_patch4_window12_384.ms_in22k_ft_in1k": {"window": 12, "heads": [4, 8, 16, 32]},
    "swinv2_base_window12to16_192to256.ms_in22k_ft_in1k": {
        "window": 16,
        "pretrained_windows": [12, 12, 12, 6],
        "image_size": 256,
    },
    "swinv2_base_window8_256.ms_in1k": {"window": 8, "pretrained_windows": [0, 0, 0, 0]},
    "convnextv2_base.fcmae_ft_in22k_in1k": {"grn": True, "widths": [128, 256, 512, 1024]},
    "ViT-L-14.openai": {"activation": "quick_gelu", "mean": CLIP_MEAN, "std": CLIP_STD},
    "ViT-L-14.laion2b_s32b_b82k": {"activation": "gelu_erf", "mean": HALF, "std": HALF},
    "ViT-L-14.laion400m_e31": {"activation": "gelu_erf", "mean": CLIP_MEAN},
    "ViT-L-14.datacomp_xl_s13b_b90k": {"activation": "gelu_erf", "mean": CLIP_MEAN, "heads": 16},
    "ViT-H-14-378-quickgelu.dfn5b": {"activation": "quick_gelu", "image_size": 378},
    "coca_ViT-L-14.laion2b_s13b_b90k": {"final_norm": False},
}


def plain(value):
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", KNOWN)
def test_facts_are_those_of_the_publishers(name):
    facts, origin = published.network(name)
    expected = {fact: plain(value) for fact, value in KNOWN[name].items()}
    assert {fact: facts.get(fact) for fact in expected} == expected
    assert re.fullmatch(r"(timm|open_clip) \d+\.\d+\.\d+", origin)


def everything():
    for library in published.LIBRARIES:
        for name, tags in published.table(library)["networks"].items():
            for tag in tags:
                if "lacks" not in published.table(library)["architectures"][name]:
                    yield published.network(f"{name}.{tag}")[0]


def test_every_network_has_all_that_no_tensor_tells():
    count = 0
    for facts in everything():
        assert facts["activation"] in {*layers.ACTIVATIONS, "silu"}
        assert 0 < facts["norm_eps"] < 1e-3
        assert len(facts["mean"]) == len(facts["std"]) == 3
        assert facts["image_size"] and facts["pixel_scale"] == 1 / 255
        if "width" in facts:
            assert facts["width"] % facts["heads"] == 0
        elif "window" in facts:
            assert len(facts["heads"]) == len(facts["depths"])
        count += 1
    assert count > 600


def test_open_clip_names_are_taken_as_people_write_them():
    expected = published.network("ViT-L-14.laion2b_s32b_b82k")
    assert published.network("ViT-L-14/laion2b_s32b_b82k") == expected
    assert published.network("ViT-L-14,laion2b_s32b_b82k") == expected
    assert published.network("laion/CLIP-ViT-L-14-laion2B-s32B-b82K") == expected
    assert published.network("hf-hub:laion/CLIP-ViT-L-14-laion2B-s32B-b82K") == expected


def test_a_repository_of_timm_has_the_name_of_its_network():
    name = "vit_base_patch16_224.augreg_in21k"
    assert published.network(f"timm/{name}") == published.network(f"hf_hub:timm/{name}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit_base_patch16_224.augreg_in21", "vit_base_patch16_224.augreg_in21k"),
        ("vit_base_patch16_224", "several weights.*vit_base_patch16_224.augreg_in21k"),
        ("ViT-L-14", "several weights.*ViT-L-14.openai"),
        ("ViT-L-14.laion2b", "ViT-L-14.laion2b_s32b_b82k"),
        ("resnetv2_50.a1h_in1k", "a resnetv2 of timm, which no network here can hold"),
        ("resnext50_32x4d.a1_in1k", "has convolutions of groups of channels, which no network"),
        ("aimv2_large_patch14_224.apple_pt", "has RMSNorm, which no network here has"),
        ("qqqq", "no name comes near"),
        ("", "no name comes near"),
        ("..", "no name comes near"),
    ],
)
def test_names_that_cannot_be_had_are_explained(name, said):
    with pytest.raises(ConversionError, match=said):
        published.network(name)


def test_an_architecture_without_weights_says_nothing_of_pixels():
    facts, _ = published.architecture("vit_base_patch16_224", None)
    assert facts["heads"] == 12
    assert not facts.keys() & {"mean", "std", "image_size", "pooling", "style"}
    assert published.architecture("vit_base_patch16_224", "my_own_weights")[0] == facts
    tagged, _ = published.architecture("vit_base_patch16_224", "dino")
    assert tagged == published.network("vit_base_patch16_224.dino")[0]
    with pytest.raises(ConversionError, match="vit_base_patch16_224"):
        published.architecture("vit_bas_patch16_224", None)


def test_shapes_leave_candidates_with_other_facts():
    shapes = {"width": 1024, "depth": 24, "patch_size": 14, "image_size": 224}
    names = published.matching("openai_clip", shapes)
    assert {"ViT-L-14.openai", "ViT-L-14.laion2b_s32b_b82k"} <= set(names)
    assert "ViT-L-14-336.openai" not in names and "ViT-B-16.openai" not in names
    activations = {published.network(name)[0]["activation"] for name in names}
    assert activations == {"quick_gelu", "gelu_erf"}


def test_shapes_that_a_network_does_not_state_have_to_be_absent():
    shapes = {"width": 768, "depth": 12, "patch_size": 14}
    plain, with_registers = (
        published.matching("timm_vit", {**shapes, "registers": count}) for count in (0, 4)
    )
    assert "vit_base_patch14_dinov2.lvd142m" in plain
    assert with_registers == ["vit_base_patch14_reg4_dinov2.lvd142m"]
    swins = published.matching("timm_swin", {"depths": (2, 2, 18, 2), "embed_width": 128})
    assert "swin_base_patch4_window12_384.ms_in22k" in swins
    assert published.matching("no_style", {}) == []
