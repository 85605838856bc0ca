"""ConvNeXt V1, V2 and DINOv3's in the names of timm, Hugging Face and Meta.

The libraries agree in the network and not in what its features are. The last norm of V1 and V2
follows the mean over the map, so it belongs to the head (`fc_norm`); DINOv3's is that of tokens. A
file of timm has the first form whatever it was made of.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from fd_jax.convert.containers.tensors import Tensor
from fd_jax.convert.family import Family
from fd_jax.convert.huggingface import HuggingFace
from fd_jax.convert.layout import EPSILON_1E6, FINAL_NORM, Need
from fd_jax.convert.networks.convnext import (
    BLOCK,
    FOUR_STAGES,
    KERNELS_OF_7,
    LAYER_SCALE,
    NO_FINAL_NORM,
    NO_LAYER_SCALE,
    NO_RESPONSE_NORM,
    ONE_EPSILON,
    PATCHES_OF_4,
    RESPONSE_NORM,
    STAGE,
    follows_a_stage,
)
from fd_jax.convert.rules.tables import (
    Drop,
    Rule,
    Table,
    conv,
    linear,
    norm,
    only_where,
    optional,
    prefixed,
)
from fd_jax.convert.rules.transforms import CONV_1X1_2D, VECTOR_OF_FOUR_AXES
from fd_jax.convert.style import Style
from fd_jax.convert.timm import Timm, arguments
from fd_jax.convert.timm.arguments import CONVOLVED
from fd_jax.models.spec import ModelSpec


def _halving(name: str) -> tuple[Rule, ...]:
    """The norm and the convolution between stages."""
    rules = (
        *norm(f"{name}.0", f"{STAGE}/downsample/norm"),
        *conv(f"{name}.1", f"{STAGE}/downsample/conv"),
    )
    return only_where(rules, follows_a_stage)


def _block(at: str, *, kernel: str, norm_: str, layers: tuple[str, str]) -> tuple[Rule, ...]:
    """What all blocks have: `at` is where a block is, the rest are names in it."""
    first, second = layers
    return (
        *conv(f"{at}.{kernel}", f"{BLOCK}/dwconv"),
        *norm(f"{at}.{norm_}", f"{BLOCK}/norm"),
        *linear(f"{at}.{first}", f"{BLOCK}/mlp/fc1"),
        *linear(f"{at}.{second}", f"{BLOCK}/mlp/fc2"),
    )


_GRN = f"{BLOCK}/mlp/grn"

# --- timm

_AT = "stages.{s}.blocks.{b}"
_TIMM = Table(
    (
        *conv("stem.0", "encoder/patch_embed"),
        *norm("stem.1", "encoder/patch_norm"),
        *_halving("stages.{s}.downsample"),
        *_block(_AT, kernel="conv_dw", norm_="norm", layers=("mlp.fc1", "mlp.fc2")),
        *optional(
            (
                Rule(f"{_AT}.gamma", f"{BLOCK}/gamma"),
                Rule(f"{_AT}.mlp.grn.weight", f"{_GRN}/scale"),
                Rule(f"{_AT}.mlp.grn.bias", f"{_GRN}/bias"),
                *norm("norm_pre", "encoder/norm"),
                *norm("head.norm", "fc_norm"),
            )
        ),
    )
)
_HEAD = Table(optional(linear("head.fc", "head")))
_HIDDEN = Table((), (Drop("head.*", "a head with a hidden layer"),))
# Variants of timm's class: whether the layers of its MLPs are stored as 1x1 convolutions, and
# whether its head has a hidden layer.
_DEEP = "deep_head"


def _as_convolutions(table: Table) -> Table:
    """The same names where the layers of the MLPs are stored as 1x1 convolutions."""
    layers = ("mlp.fc1.weight", "mlp.fc2.weight")
    rules = (
        dataclasses.replace(rule, transform=CONV_1X1_2D)
        if str(rule.names).endswith(layers)
        else rule
        for rule in table.rules
    )
    return dataclasses.replace(table, rules=tuple(rules))


def _timm_pick(tensors: Mapping[str, Tensor]) -> str:
    convolved = len(tensors["stages.0.blocks.0.mlp.fc1.weight"].shape) == 4
    deep = "head.pre_logits.fc.weight" in tensors
    return "+".join([name for name, holds in ((CONVOLVED, convolved), (_DEEP, deep)) if holds])


TIMM_STYLE = Style(
    "timm_convnext",
    "timm's ConvNeXt",
    "convnext",
    {
        "": _TIMM + _HEAD,
        CONVOLVED: _as_convolutions(_TIMM) + _HEAD,
        _DEEP: _TIMM + _HIDDEN,
        f"{CONVOLVED}+{_DEEP}": _as_convolutions(_TIMM) + _HIDDEN,
    },
    (
        "stem.0.weight",
        "stem.1.weight",
        "stages.0.blocks.0.conv_dw.weight",
        "stages.0.blocks.0.mlp.fc1.weight",
    ),
    unlike=("stem.2.*", "stem.3.*"),  # stems that overlap
    pick=_timm_pick,
)

# --- Hugging Face

_STAGES = "encoder.stages.{s}"
_LAYER = f"{_STAGES}.layers.{{b}}"
_HF = Table(
    (
        *conv("embeddings.patch_embeddings", "encoder/patch_embed"),
        *norm("embeddings.layernorm", "encoder/patch_norm"),
        *_halving(f"{_STAGES}.downsampling_layer"),
        *_block(_LAYER, kernel="dwconv", norm_="layernorm", layers=("pwconv1", "pwconv2")),
    )
)
_SCALE = Table((Rule(f"{_LAYER}.layer_scale_parameter", f"{BLOCK}/gamma"),))
_RESPONSES = Table(
    (
        Rule(f"{_LAYER}.grn.weight", f"{_GRN}/scale", VECTOR_OF_FOUR_AXES),
        Rule(f"{_LAYER}.grn.bias", f"{_GRN}/bias", VECTOR_OF_FOUR_AXES),
    )
)
_POOLED_NORM = Table(norm("layernorm", "fc_norm"))
_MORE = Table(optional((*_POOLED_NORM.rules, *linear("../classifier", "head"))))
_MARKS = ("embeddings.patch_embeddings.weight", f"{_LAYER}.dwconv.weight".format(s=0, b=0))
_FIRST_RESPONSE = f"{_LAYER}.grn.weight".format(s=0, b=0)

_DINOV3_AT = "stages.{s}.layers.{b}"
_FIRST = "stages.0.downsample_layers"
DINOV3 = Table(
    (
        *conv(f"{_FIRST}.0", "encoder/patch_embed"),
        *norm(f"{_FIRST}.1", "encoder/patch_norm"),
        *_halving("stages.{s}.downsample_layers"),
        *_block(
            _DINOV3_AT,
            kernel="depthwise_conv",
            norm_="layer_norm",
            layers=("pointwise_conv1", "pointwise_conv2"),
        ),
        Rule(f"{_DINOV3_AT}.gamma", f"{BLOCK}/gamma"),
        *norm("layer_norm", "encoder/norm"),
    )
)

# --- Meta's own code, of which DINOv3's hub is a part

_META_AT = "stages.{s}.{b}"
_META = Table(
    (
        *conv("downsample_layers.0.0", "encoder/patch_embed"),
        *norm("downsample_layers.0.1", "encoder/patch_norm"),
        *_halving("downsample_layers.{s}"),
        *_block(_META_AT, kernel="dwconv", norm_="norm", layers=("pwconv1", "pwconv2")),
        *optional(
            (
                Rule(f"{_META_AT}.gamma", f"{BLOCK}/gamma"),
                Rule(f"{_META_AT}.grn.gamma", f"{_GRN}/scale", VECTOR_OF_FOUR_AXES),
                Rule(f"{_META_AT}.grn.beta", f"{_GRN}/bias", VECTOR_OF_FOUR_AXES),
            )
        ),
    )
)
_HUB = "dinov3"


def _meta_pick(tensors: Mapping[str, Tensor]) -> str:
    return _HUB if "norms.3.weight" in tensors else ""


def _meta_code(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    del tensors
    return {"activation": "gelu_erf", "norm_eps": 1e-6}


STYLES = (
    TIMM_STYLE,
    Style(
        "hf_convnext",
        "transformers' ConvNextModel",
        "convnext",
        {"": _HF + Table(optional(_SCALE.rules)) + _MORE},
        _MARKS,
        unlike=(_FIRST_RESPONSE,),
        bases=("convnext.",),
        configs=("convnext",),
    ),
    Style(
        "hf_convnextv2",
        "transformers' ConvNextV2Model",
        "convnext",
        {"": _HF + _RESPONSES + _MORE},
        (*_MARKS, _FIRST_RESPONSE),
        bases=("convnextv2.",),
        configs=("convnextv2",),
    ),
    Style(
        "hf_dinov3_convnext",
        "transformers' DINOv3ConvNextModel",
        "convnext",
        {"": DINOV3},
        (f"{_FIRST}.0.weight", f"{_DINOV3_AT}.depthwise_conv.weight".format(s=0, b=0)),
        configs=("dinov3_convnext",),
        renames=((r"(^|\.)model\.stages\.", r"\1stages."),),  # in memory
    ),
    Style(
        "meta_convnext",
        "Meta's ConvNeXt",
        "convnext",
        {
            "": _META + Table(optional((*norm("norm", "fc_norm"), *linear("head", "head")))),
            _HUB: _META
            + Table(
                norm("norm", "encoder/norm"), (Drop("norms.3.*", "a second name of the norm"),)
            ),
        },
        (
            "downsample_layers.0.0.weight",
            "downsample_layers.0.1.weight",
            f"{_META_AT}.dwconv.weight".format(s=0, b=0),
        ),
        pick=_meta_pick,
        code=_meta_code,
    ),
)

# --- classes of other libraries that networks can be written for

_SAME_NORMS = Need(
    "a head whose norm has the epsilon of all others",
    lambda spec, paths: "head/kernel" not in paths or spec.head_norm_eps == spec.arch["norm_eps"],
)
_TOKEN_EPSILON = Need(
    "the same epsilon in a norm of all tokens as in all others",
    lambda spec, paths: not spec.arch["final_norm"] or ONE_EPSILON.holds(spec, paths),
)
_POOLS = Need(
    "a norm of the mean token before the head",
    lambda spec, paths: "fc_norm/scale" in paths,
)
_CLASSIFIES = Need(
    "a classifier head on the normalised mean token",
    lambda spec, paths: "head/kernel" in paths and spec.pooling == "mean_norm",
)


def _blocks(model: Any) -> list[Any]:
    trunk = model.encoder if hasattr(model, "encoder") else model.model
    return [block for stage in trunk.stages for block in stage.layers]


def _patches(model: Any, tokens: Any) -> Any:
    """DINOv3's tokens without the first one, the normalised mean of the map."""
    del model
    return tokens[:, 1:]


def _fields(spec: ModelSpec) -> dict[str, Any]:
    """What config.json says; `layer_norm_eps` is that of the last norm."""
    arch = spec.arch
    return {
        "hidden_sizes": arch["widths"],
        "depths": arch["depths"],
        "layer_norm_eps": spec.head_norm_eps,
        "drop_path_rate": 0.0,
    }


def _staged(spec: ModelSpec) -> dict[str, Any]:
    return {**_fields(spec), "num_stages": len(spec.arch["depths"])}


def _scaled(spec: ModelSpec) -> dict[str, Any]:
    # 0 is how the class says that there is none.
    return {**_staged(spec), "layer_scale_init_value": spec.arch["layer_scale"] or 0.0}


def _pooled_norm(spec: ModelSpec) -> dict[str, np.ndarray]:
    """The norm of the mean token, which no feature depends on, for networks that lack it."""
    ones = np.ones(spec.arch["widths"][-1], np.float32)
    return {"layernorm.weight": ones, "layernorm.bias": np.zeros_like(ones)}


_ASSUMED = (KERNELS_OF_7, EPSILON_1E6, NO_FINAL_NORM)
_V1, _V2 = (*_ASSUMED, NO_RESPONSE_NORM), (*_ASSUMED, RESPONSE_NORM, NO_LAYER_SCALE)
_NORMALISED = _HF + _POOLED_NORM
_HF_HEAD = Table(linear("classifier", "head"))


def _hf_layouts(
    version: str, more: Table, needs: tuple[Need, ...], fields
) -> tuple[HuggingFace, ...]:
    """The classes for features and for classification of one version."""
    kind = version.lower()
    common = {"model_type": kind, "fields": fields, "blocks": _blocks}
    table = _NORMALISED + more
    name = version.replace("convnext", "ConvNext").replace("v2", "V2")
    return (
        HuggingFace(f"{name}Model", "convnext", table, needs, extra=_pooled_norm, **common),
        HuggingFace(
            f"{name}ForImageClassification",
            "convnext",
            prefixed(table, f"{kind}.") + _HF_HEAD,
            (*needs, _POOLS, _CLASSIFIES),
            **common,
        ),
    )


LAYOUTS = (
    Timm(
        "ConvNeXt",
        "convnext",
        _TIMM + _HEAD,
        (FOUR_STAGES, _SAME_NORMS, _TOKEN_EPSILON),
        style=TIMM_STYLE,
        parts=arguments.convnext_parts,
        arguments=arguments.convnext_arguments,
        base=arguments.convnext_base,
        alike=arguments.convnext_alike,
        extra=arguments.convnext_norm,
        first="stem.0",
        last="head.fc",
        sized=False,
    ),
    *_hf_layouts("convnext", _SCALE, _V1, _scaled),
    *_hf_layouts("convnextv2", _RESPONSES, _V2, _staged),
    HuggingFace(
        "DINOv3ConvNextModel",
        "convnext",
        DINOV3,
        (
            FINAL_NORM,
            LAYER_SCALE,
            NO_RESPONSE_NORM,
            KERNELS_OF_7,
            PATCHES_OF_4,
            ONE_EPSILON,
        ),
        model_type="dinov3_convnext",
        final_tokens=_patches,
        blocks=_blocks,
        fields=lambda spec: {**_fields(spec), "layer_scale_init_value": spec.arch["layer_scale"]},
    ),
)

FAMILY = Family("convnext", (), LAYOUTS, styles=STYLES)
