"""config.json and preprocessor_config.json of transformers, as facts.

A field that config.json lacks has the default of the class, which is part of the format:
transformers leaves fields out that have it.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
import types
from typing import Any

from fd_jax.convert.facts import Claim
from fd_jax.convert.style import Style
from fd_jax.errors import ConversionError

FILE = "config.json"
PREPROCESSOR = "preprocessor_config.json"

# transformers' names of activations; its "gelu" is the erf one.
ACTIVATIONS = types.MappingProxyType(
    {
        "gelu": "gelu_erf",
        "quick_gelu": "quick_gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
        "silu": "silu",
        "swish": "silu",
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


_SIZED = {"position_resize": "size"}
_ON_CLASS_TOKEN = {**_SIZED, "pooling": "cls"}
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
        "ijepa": dataclasses.replace(_VITS, constants={**_SIZED, "pooling": "mean"}),
        "vit_msn": dataclasses.replace(_VITS, defaults={**_B16, "layer_norm_eps": 1e-6}),
        "beit": _BEIT,
        "data2vec-vision": _BEIT,
        "clip_vision_model": _CLIP,
        "metaclip_2_vision_model": _CLIP,
        "siglip_vision_model": _SIGLIP,
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
_TOWERS = {
    "clip": "clip_vision_model",
    "metaclip_2": "metaclip_2_vision_model",
    "siglip": "siglip_vision_model",
}


def claims(config: Mapping[str, Any], style: Style) -> list[Claim]:
    """What a config.json says of the network whose tensors have the names of a style.

    Raises:
      ConversionError: it describes a network of another class, or one that cannot be represented.
    """
    fields, name, nested = _vision(config)
    if name not in style.configs:
        raise ConversionError(
            f"{FILE} says model_type {name!r}, but the tensors have the names of "
            f"{' or '.join(style.configs)}"
        )
    kind = TYPES[name]
    wrong = [
        f"{FILE} says {field} {fields[field]!r}; networks here have {value!r}"
        for field, value in kind.refused.items()
        if fields.get(field, value) != value
    ]
    if wrong:
        raise ConversionError("; ".join(wrong))
    where = f"{FILE}: {nested}"
    found = [_claim(kind, fields, field, fact, where, name) for field, fact in kind.names.items()]
    changed = kind.more({**kind.defaults, **fields})
    found = [claim for claim in found if claim.fact not in changed]
    found += [Claim(fact, value, f"{FILE}: {nested}*") for fact, value in changed.items()]
    constant = f"the code of transformers' {name}"
    return [*found, *(Claim(fact, value, constant) for fact, value in kind.constants.items())]


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether it is the config of a class of transformers that is known here."""
    return str(config.get("model_type")) in (*TYPES, *_TOWERS)


def vision_type(config: Mapping[str, Any]) -> str:
    """The model_type of the network that sees; "None" if the config has none."""
    return _vision(config)[1]


def _vision(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str, str]:
    """The fields of the vision tower, its type, and where in the file they are."""
    name = str(config.get("model_type"))
    if name not in _TOWERS:
        return config, name, ""
    # Older files have the fields twice, and transformers lets the second place win.
    places = [config.get(place) for place in ("vision_config", "vision_config_dict")]
    fields = {k: v for place in places if isinstance(place, dict) for k, v in place.items()}
    return fields, _TOWERS[name], "vision_config."


def _claim(kind, fields, field: str, fact: str, where: str, name: str) -> Claim:
    if field not in fields:
        value, origin = kind.defaults[field], f"the default of transformers' {name}"
    else:
        value, origin = fields[field], f"{where}{field}"
    return Claim(fact, _value(fact, value, origin), origin)


def _value(fact: str, value: Any, origin: str) -> Any:
    if fact == "activation":
        return activation(value, origin)
    if fact == "mlp_ratio" and isinstance(value, float) and value.is_integer():
        return int(value)
    if fact in ("image_size", "patch_size") and isinstance(value, list):
        return value[0] if len(value) == 2 and value[0] == value[1] else value
    return value


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


def statistics(fields: Mapping[str, Any]) -> list[Claim]:
    """Mean, deviation and scale of pixels in a preprocessor_config.json.

    Raises:
      ConversionError: they are not three numbers each, or the deviation is not positive.
    """
    scale = fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 1.0
    if not isinstance(scale, int | float):
        raise ConversionError(
            f"{PREPROCESSOR} has the rescale_factor {scale!r:.60}; expected a number"
        )
    mean, std = fields.get("image_mean"), fields.get("image_std")
    if fields.get("do_normalize") is False:
        mean, std = [0.0] * 3, [1.0] * 3
    if mean is None or std is None:
        return []  # the class of the image processor has them in its code
    where = f"{PREPROCESSOR}: "
    return [
        Claim("mean", three_numbers(mean, f"{where}image_mean"), f"{where}image_mean"),
        Claim("std", three_numbers(std, f"{where}image_std"), f"{where}image_std"),
        Claim("pixel_scale", float(scale), f"{where}rescale_factor"),
    ]


def three_numbers(values: Any, origin: str) -> list[float]:
    """A value for each of the channels red, green and blue.

    Raises:
      ConversionError: they are not three numbers.
    """
    numbers = isinstance(values, list | tuple) and len(values) == 3
    if not numbers or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        raise ConversionError(f"{origin} is {values!r:.60}; expected three numbers")
    return [float(value) for value in values]
