"""How the classes of transformers read their config.json: fields, defaults, what is in their code.

A field that config.json lacks has the default of the class, which is part of the format:
transformers leaves fields out that have it.
"""

from collections.abc import Callable, Mapping
import dataclasses
import types
from typing import Any

from fd_jax.errors import ConversionError

FILE = "config.json"

# transformers' names of activations; its "gelu" is the erf one.
ACTIVATIONS = types.MappingProxyType(
    {
        "gelu": "gelu_erf",
        "quick_gelu": "quick_gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
        "silu": "silu",
        "swish": "silu",
        "relu": "relu",
    }
)
_VIT = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_eps",
}
_SWIN = {
    "embed_dim": "embed_width",
    "depths": "depths",
    "num_heads": "heads",
    "window_size": "window",
    "mlp_ratio": "mlp_ratio",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_eps",
}
_B16 = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
}
_SWIN_T = {
    "image_size": 224,
    "patch_size": 4,
    "embed_dim": 96,
    "depths": [2, 2, 6, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
    "mlp_ratio": 4.0,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
# The epsilon in the config of V1 and V2 is that of the norm after pooling; all others have 1e-6.
_CONVNEXT = {
    "hidden_sizes": "widths",
    "depths": "depths",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_act": "activation",
    "layer_norm_eps": "final_norm_eps",
}
_CONVNEXT_T = {
    "hidden_sizes": [96, 192, 384, 768],
    "depths": [3, 3, 9, 3],
    "image_size": 224,
    "patch_size": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}


_RESNET = {"hidden_sizes": "widths", "depths": "depths"}
_RESNET_50 = {
    "hidden_sizes": [256, 512, 1024, 2048],
    "depths": [3, 4, 6, 3],
    "layer_type": "bottleneck",
    "downsample_in_bottleneck": False,
}


def _nothing(fields: Mapping[str, Any]) -> dict[str, Any]:
    del fields
    return {}


@dataclasses.dataclass(frozen=True)
class ModelType:
    """How a class of transformers reads its config.json.

    Attributes:
      defaults: of the fields that are facts, as the class has them.
      names: field -> fact.
      constants: facts that the class has in its code.
      refused: field -> the only value that networks here have.
      more: (fields with defaults) -> further facts.
    """

    defaults: Mapping[str, Any]
    names: Mapping[str, str]
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    more: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing


def _beit_pooling(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"pooling": "mean_norm" if fields.get("use_mean_pooling", True) else "cls"}


def _biases(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": "qkv" if fields.get("qkv_bias", True) else "none"}


def _dinov2(fields: Mapping[str, Any]) -> dict[str, Any]:
    gated = bool(fields.get("use_swiglu_ffn"))
    return {"gated_mlp": gated, **_biases(fields), **({"activation": "silu"} if gated else {})}


def _dinov3(fields: Mapping[str, Any]) -> dict[str, Any]:
    usual = {"query": True, "key": False, "value": True}
    given = "".join(name[0] for name, has in usual.items() if fields.get(f"{name}_bias", has))
    biases = {"qkv": "qkv", "qv": "qv", "": "none"}
    if given not in biases:
        raise ConversionError(f"{FILE} gives biases to {given} alone of q, k and v")
    return {"gated_mlp": bool(fields.get("use_gated_mlp")), "qkv_bias": biases[given]}


def _siglip_pool(fields: Mapping[str, Any]) -> dict[str, Any]:
    pool = {
        "kind": "attention",
        "heads": fields["num_attention_heads"],
        "mlp_width": fields["intermediate_size"],
        "activation": activation(fields["hidden_act"], f"{FILE}: hidden_act"),
        "norm_eps": fields["layer_norm_eps"],
    }
    return {"pool": pool} if fields.get("vision_use_head", True) else {}


def _internvl(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "qkv_bias": "qkv" if fields.get("attention_bias") else "none",
        "final_norm": not fields.get("use_mean_pooling", True),
    }


def _resnet(fields: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {"bottleneck": True, "basic": False}
    if fields["layer_type"] not in kinds:
        raise ConversionError(
            f"{FILE} says layer_type {fields['layer_type']!r:.40}; expected bottleneck or basic"
        )
    bottleneck = kinds[fields["layer_type"]]
    first = not bottleneck or fields["downsample_in_bottleneck"]
    # No field of the class, but this is where our export writes it.
    size = {"image_size": fields["image_size"]} if "image_size" in fields else {}
    return {"bottleneck": bottleneck, "stride_at": "first" if first else "second", **size}


_SIZED = {"position_resize": "size"}
_ON_CLASS_TOKEN = {**_SIZED, "cls_token": True, "pooling": "cls"}
_WITHOUT_CLASS_TOKEN = {**_SIZED, "cls_token": False, "pooling": "mean"}
_CLIP = ModelType(
    {**_B16, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_size": 32}, _VIT, _SIZED
)
_SIGLIP = ModelType(
    {**_B16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    _VIT,
    {**_SIZED, "pooling": "mean"},
    more=_siglip_pool,
)
_BEIT = ModelType(
    _B16,
    _VIT,
    {"position_resize": "bilinear"},
    {"use_absolute_position_embeddings": False},
    more=_beit_pooling,
)
_VITS = ModelType(_B16, _VIT, _ON_CLASS_TOKEN, more=_biases)
# The MLP of DINOv2 is a ratio, and two thirds of it where it is gated: its tensors tell.
_DINOV2_NAMES = {field: fact for field, fact in _VIT.items() if fact != "mlp_width"}
_DINOV2 = {**_B16, "layer_norm_eps": 1e-6, "patch_size": 14}
_INTERNVL = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": [448, 448],
    "patch_size": [14, 14],
}
# Their norms of patches and mergings have torch's epsilon, whatever the config says.
_CONVNEXTS = ModelType(_CONVNEXT_T, _CONVNEXT, {"norm_eps": 1e-6, "pooling": "mean_norm"})
_DINOV3_CONVNEXT = {**_CONVNEXT, "layer_norm_eps": "norm_eps"}
del _DINOV3_CONVNEXT["patch_size"]  # which its config lacks
_SWINS = {"use_absolute_embeddings": False, "layer_norm_eps": 1e-5}

TYPES: Mapping[str, ModelType] = types.MappingProxyType(
    {
        "vit": _VITS,
        "deit": _VITS,
        "vit_mae": _VITS,
        "ijepa": dataclasses.replace(_VITS, constants=_WITHOUT_CLASS_TOKEN),
        "vit_msn": dataclasses.replace(_VITS, defaults={**_B16, "layer_norm_eps": 1e-6}),
        "beit": _BEIT,
        "data2vec-vision": _BEIT,
        "clip_vision_model": _CLIP,
        "metaclip_2_vision_model": _CLIP,
        "siglip_vision_model": _SIGLIP,
        "internvl_vision": ModelType(
            _INTERNVL,
            _VIT,
            _SIZED,
            {
                "norm_type": "layer_norm",
                "use_qk_norm": False,
                "use_absolute_position_embeddings": True,
            },
            more=_internvl,
        ),
        "dinov2": ModelType(_DINOV2, _DINOV2_NAMES, _SIZED, more=_dinov2),
        "dinov2_with_registers": ModelType(
            {**_DINOV2, "patch_size": 16, "num_register_tokens": 4},
            {**_DINOV2_NAMES, "num_register_tokens": "registers"},
            {"position_resize": "antialias"},
            more=_dinov2,
        ),
        "dinov3_vit": ModelType(
            {
                **_B16,
                "hidden_size": 384,
                "intermediate_size": 1536,
                "num_attention_heads": 6,
                "layer_norm_eps": 1e-5,
                "num_register_tokens": 0,
                "rope_theta": 100.0,
            },
            {**_VIT, "num_register_tokens": "registers", "rope_theta": "rope_theta"},
            more=_dinov3,
        ),
        "convnext": _CONVNEXTS,
        "convnextv2": _CONVNEXTS,
        "dinov3_convnext": ModelType(
            {**_CONVNEXT_T, "layer_norm_eps": 1e-6}, _DINOV3_CONVNEXT, {"pooling": "mean"}
        ),
        # The activation in the config is that of the stem and of sums; inside of blocks it is ReLU.
        "resnet": ModelType(
            _RESNET_50,
            _RESNET,
            {"activation": "relu", "pooling": "mean"},
            {"hidden_act": "relu", "downsample_in_first_stage": False},
            more=_resnet,
        ),
        "swin": ModelType(_SWIN_T, _SWIN, {"pooling": "mean"}, _SWINS),
        "swinv2": ModelType(
            {**_SWIN_T, "pretrained_window_sizes": [0, 0, 0, 0]},
            {**_SWIN, "pretrained_window_sizes": "pretrained_windows"},
            {"pooling": "mean"},
            _SWINS,
        ),
    }
)
# Models of two towers, and the type of the one that sees.
TOWERS = {
    "clip": "clip_vision_model",
    "metaclip_2": "metaclip_2_vision_model",
    "siglip": "siglip_vision_model",
    "internvl": "internvl_vision",
}


def activation(name: Any, origin: str) -> str:
    """Our name of an activation.

    Raises:
      ConversionError: it has none.
    """
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ConversionError(
            f"{origin} is {name!r}; expected one of {', '.join(map(repr, ACTIVATIONS))}"
        )
    return ACTIVATIONS[name]
