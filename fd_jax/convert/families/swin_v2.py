"""Swin V2 in the names of Microsoft (also the original's students), timm and Hugging Face.

A block has a small network for position biases (`cpb_mlp`, in the original's code `rpe_mlp`),
biases of q and v, and a logit scale.
"""

from collections.abc import Mapping, Set
from typing import Any

from fd_jax.convert.families import swin
from fd_jax.convert.families.swin import HEAD, HUGGINGFACE_SELF, MERGING, TIMM_MERGING
from fd_jax.convert.family import Family
from fd_jax.convert.huggingface import HAS_HEAD_ON_MEAN, HuggingFace
from fd_jax.convert.layout import EPSILON_1E5, FINAL_NORM
from fd_jax.convert.networks import swin as network
from fd_jax.convert.networks.swin import BLOCK
from fd_jax.convert.rules.tables import Derived, Rule, Table, linear, norm, only_where, prefixed
from fd_jax.convert.rules.transforms import LINEAR, PER_HEAD
from fd_jax.convert.source import Part, Source
from fd_jax.convert.style import Style
from fd_jax.convert.timm import ACTIVATIONS, Arguments, Timm, head_on
from fd_jax.models.spec import ModelSpec


def _bias_network(name: str) -> tuple[Rule, ...]:
    path = f"{BLOCK}/attn/rel_pos_bias"
    return (
        *linear(f"{name}.0", f"{path}/fc1"),
        Rule(f"{name}.2.weight", f"{path}/fc2/kernel", LINEAR),
    )


def _coordinates(name: str) -> Derived:
    # Computed in float32 there.
    return Derived(f"{name}.relative_coords_table", network.coordinates, tolerance=1e-5)


def _table(merging: str, bias_network: str) -> Table:
    attn = "layers.{s}.blocks.{b}.attn"
    return swin.trunk(merging) + Table(
        (
            Rule(f"{attn}.q_bias", f"{BLOCK}/attn/q_bias"),
            Rule(f"{attn}.v_bias", f"{BLOCK}/attn/v_bias"),
            Rule(f"{attn}.logit_scale", f"{BLOCK}/attn/logit_scale", PER_HEAD),
            *_bias_network(f"{attn}.{bias_network}"),
        ),
        (),
        (_coordinates(attn),),
    )


_EXTRA_NORM = Table(
    only_where(norm("layers.{s}.blocks.{b}.enorm", f"{BLOCK}/extra_norm"), network.ends_with_norm)
)
OFFICIAL = _table(MERGING, "rpe_mlp") + _EXTRA_NORM
_MICROSOFT = _table(MERGING, "cpb_mlp")
_TIMM = _table(TIMM_MERGING, "cpb_mlp") + swin.TIMM_HEAD
_HUGGINGFACE = swin.HUGGINGFACE_TRUNK + Table(
    (
        Rule(f"{HUGGINGFACE_SELF}.logit_scale", f"{BLOCK}/attn/logit_scale", PER_HEAD),
        *_bias_network(f"{HUGGINGFACE_SELF}.continuous_position_bias_mlp"),
    ),
    (),
    (_coordinates(HUGGINGFACE_SELF),),
)


# --- networks of any size

_FIRST_SCALE = "layers.0.blocks.0.attn.logit_scale"
STYLES = (
    Style(
        "timm_swin_v2",
        "timm's SwinTransformerV2",
        "swin_v2",
        {"": swin.any_size(_table(TIMM_MERGING, "cpb_mlp"), swin.TIMM_HEAD)},
        (*swin.TIMM_MARKS, _FIRST_SCALE),
        unlike=("layers.0.downsample.*",),
        code=swin.on_mean,
    ),
    Style(
        "microsoft_swin_v2",
        "Microsoft's SwinTransformerV2",
        "swin_v2",
        {"": swin.any_size(_MICROSOFT, HEAD)},
        (*swin.MICROSOFT_MARKS, _FIRST_SCALE),
        unlike=("*.rpe_mlp.*",),
        code=swin.on_mean,
    ),
    Style(
        "hf_swinv2",
        "transformers' Swinv2Model",
        "swin_v2",
        {"": swin.any_size(_HUGGINGFACE, Table(linear("../classifier", "head")))},
        (
            "embeddings.patch_embeddings.projection.weight",
            "encoder.layers.0.blocks.0.attention.self.logit_scale",
        ),
        bases=("swinv2.",),
        configs=("swinv2",),
        # Decided when the network is made, and kept for inputs of other sizes.
        code=lambda tensors: {**swin.on_mean(tensors), "fixed_windows": True},
    ),
)


def arch(size: str, image_size: int, window: int, **changes: Any) -> dict[str, Any]:
    """Architecture of a published network, Microsoft's unless changed."""
    return {
        **swin.arch(size, image_size, window),
        "position": "rpb",
        "pretrained_windows": [0, 0, 0, 0],
        "residual_scale": 0.0,
        "extra_norm_every": 0,
        **changes,
    }


_ORACLE = "transformers Swinv2ForImageClassification"


def _classifier(table: Table, arch: Mapping[str, Any], **where: tuple[str, ...]):
    return {"classifier": Part(table, ModelSpec("swin_v2", dict(arch), pooling="mean"), **where)}


def _microsoft(size: str, name: str, image_size: int, window: int, **changes: Any) -> Source:
    network = arch(size, image_size, window, **changes)
    parts = _classifier(_MICROSOFT + HEAD, network, under=("model/", ""))
    return Source(name, f"{name}.pth", parts, _ORACLE, style="microsoft_swin_v2")


SOURCES = (
    _microsoft("B", "swinv2_base_patch4_window8_256", 256, 8),
    _microsoft("L", "swinv2_large_patch4_window12_192_22k", 192, 12),
    _microsoft(
        "L",
        "swinv2_large_patch4_window12to16_192to256_22kto1k_ft",
        256,
        16,
        pretrained_windows=[12, 12, 12, 6],
    ),
    Source(
        "swinv2_giant",
        "none: SwinV2-G was never released; names as the original's class gives them",
        {
            "encoder": Part(
                OFFICIAL,
                ModelSpec("swin_v2", arch("G", 256, 16, residual_scale=1e-5, extra_norm_every=6)),
                ("model/", ""),
            )
        },
        "Swin V2 in plain torch (transformers' has no norms on the main branch)",
        "heads, window and size are assumed: its authors give channels, depths and the norm after "
        "every sixth block",
        certain=True,
    ),
    Source(
        "swinv2_base_patch4_window8_256_hf",
        "microsoft/swinv2-base-patch4-window8-256 model.safetensors",
        _classifier(
            _HUGGINGFACE + swin.OPTIONAL_HEAD,
            arch("B", 256, 8, windows_at=256),
            strip=("swinv2.",),
        ),
        _ORACLE,
        hf=True,
        style="hf_swinv2",
    ),
    Source(
        "timm_swinv2_base_window8_256",
        "timm/swinv2_base_window8_256.ms_in1k model.safetensors",
        _classifier(_TIMM, arch("B", 256, 8)),
        _ORACLE,
        swin.TIMM_NOTE,
        style="timm_swin_v2",
    ),
)


def _fields(spec: ModelSpec) -> dict[str, Any]:
    return {
        **swin.huggingface_fields(spec),
        "pretrained_window_sizes": spec.arch["pretrained_windows"],
        # The class makes its windows for this size, and takes images of others as well.
        "image_size": spec.arch.get("windows_at", spec.arch["image_size"]),
    }


def _timm_arguments(spec: ModelSpec, variant: str, parts: Set[str]) -> Arguments:
    return {
        **swin.timm_arguments(spec, variant, parts),
        "act_layer": ACTIVATIONS[spec.arch["activation"]],
        "pretrained_window_sizes": spec.arch["pretrained_windows"],
    }


# As in V1, some epsilons are torch's own, whatever the config says.
_NEEDS = (FINAL_NORM, EPSILON_1E5, network.BIAS_PER_BLOCK, network.NO_EXTRA_NORMS)
LAYOUTS = (
    Timm(
        "SwinTransformerV2",
        "swin_v2",
        _TIMM,
        (*_NEEDS, network.FREE_WINDOWS),
        style=STYLES[0],
        parts=head_on("mean"),
        arguments=_timm_arguments,
        base=lambda spec, parts: "swinv2_base_window8_256",
        last="head.fc",
    ),
    HuggingFace(
        "Swinv2Model", "swin_v2", _HUGGINGFACE, _NEEDS, model_type="swinv2", fields=_fields
    ),
    HuggingFace(
        "Swinv2ForImageClassification",
        "swin_v2",
        prefixed(_HUGGINGFACE, "swinv2.") + swin.HUGGINGFACE_HEAD,
        (*_NEEDS, HAS_HEAD_ON_MEAN),
        model_type="swinv2",
        fields=_fields,
    ),
)

FAMILY = Family("swin_v2", SOURCES, LAYOUTS, styles=STYLES)
