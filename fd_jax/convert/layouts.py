"""The layouts that models are written in: names and shapes that other libraries read."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from fd_jax.convert import beit, clip, dinov2, dinov3, siglip2, timm_vit
from fd_jax.convert.rules import Rule, Table, missing_paths, summarize, target_paths
from fd_jax.convert.source import HF_ACTIVATIONS, conv, linear, norm
from fd_jax.convert.transforms import SPLIT_QKV
from fd_jax.errors import ConversionError
from fd_jax.models.spec import ModelSpec

_BLOCK = "encoder/blocks/{i}"
_BIASES = (f"{_BLOCK}/attn/q_bias", f"{_BLOCK}/attn/k_bias", f"{_BLOCK}/attn/v_bias")
_HEAD = Table(linear("head", "head"))


def for_model(table: Table, paths: set[str], arch: Mapping[str, Any], layout: str) -> Table:
    """The rules of a layout that concern a model; refuses a model the layout cannot hold.

    Args:
      table: every rule of the layout, also for parts this model may not have.
      paths: the model's parameters; those beside the encoder may be left out of a layout.
      arch: the architecture keywords.
      layout: its name in errors.
    """
    rules = tuple(r for r in table.rules if not missing_paths(r, paths, arch))
    kept = dataclasses.replace(table, rules=rules)
    homeless = {path for path in paths if path.startswith("encoder/")} - target_paths(kept, arch)
    if homeless:
        names = "; ".join(summarize(sorted(homeless)))
        raise ConversionError(
            f"the layout {layout} has no place for {names}; export as safetensors instead"
        )
    return kept


def check_family(spec: ModelSpec, layout: str) -> None:
    """Refuses a network of a family that no table of a layout describes."""
    if spec.family != "vit":
        raise ConversionError(
            f"the layout {layout} has no names for the family {spec.family}; export as safetensors "
            "or stablehlo instead"
        )


def is_beit(arch: Mapping[str, Any]) -> bool:
    """Whether a network is of BEiT's kind, as our students are: no k bias, no rotary positions."""
    return arch["qkv_bias"] == "qv" and arch["position"] != "rope"


# timm.models.vision_transformer and timm.models.beit; their index buffers are not persistent.
_TIMM_VIT = (
    timm_vit.TABLE
    + Table(
        (
            *norm("norm_pre", "encoder/ln_pre"),
            Rule("blocks.{i}.ls1.gamma", f"{_BLOCK}/gamma_1"),
            Rule("blocks.{i}.ls2.gamma", f"{_BLOCK}/gamma_2"),
        )
    )
    + _HEAD
)
_POS_EMBED = Table((Rule("pos_embed", "encoder/pos_embed"),))
_TIMM_BEIT = Table(
    tuple(dict.fromkeys(beit.SHARED.rules + beit.PER_BLOCK.rules + _POS_EMBED.rules))
)


def timm(spec: ModelSpec) -> Table:
    """Names of timm: Beit's for students of that kind, VisionTransformer's for the rest."""
    check_family(spec, "timm")
    return _TIMM_BEIT if is_beit(spec.arch) else _TIMM_VIT


OFFICIAL = beit.prefixed(beit.SHARED, "encoder.")
OFFICIAL_NEEDS = (
    "a class token",
    "a final norm",
    "a bias of the patch embedding",
    "a shared relative position table",
    "biases of q and v alone",
    "the exact GELU",
    "norm epsilon 1e-6",
)


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """A model class of transformers.

    Attributes:
      model_type: as in config.json.
      architecture: class name as in config.json.
      table: rules of its files.
      config: (spec) -> fields of config.json beyond the common ones.
      needs: what the class always has; without it transformers would make it up.
    """

    model_type: str
    architecture: str
    table: Table
    config: Callable[[ModelSpec], dict[str, Any]]
    needs: tuple[str, ...]


# Properties that a foreign class takes for granted: words for people -> whether a network has it.
_NEEDS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "a class token": lambda arch: arch["cls_token"],
    "a final norm": lambda arch: arch["final_norm"],
    "a bias of the patch embedding": lambda arch: arch["patch_bias"],
    "absolute positions": lambda arch: arch["position"] == "ape",
    "a shared relative position table": lambda arch: arch["position"] == "shared_rpb",
    "biases of q, k and v": lambda arch: arch["qkv_bias"] == "qkv",
    "biases of q and v alone": lambda arch: arch["qkv_bias"] == "qv",
    "layer scale": lambda arch: arch["layer_scale"] is not None,
    "register tokens": lambda arch: arch["registers"] > 0,
    "the exact GELU": lambda arch: arch["activation"] == "gelu_erf",
    "norm epsilon 1e-6": lambda arch: arch["norm_eps"] == 1e-6,
    "an MLP whose width is a multiple": lambda arch: arch["mlp_width"] % arch["width"] == 0,
}
_PLAIN = ("a class token", "a final norm", "a bias of the patch embedding")
_ABSOLUTE = ("a final norm", "absolute positions", "biases of q, k and v")


def check_needs(arch: Mapping[str, Any], needs: tuple[str, ...], layout: str) -> None:
    """Refuses a network that lacks what a layout takes for granted."""
    if lacking := [need for need in needs if not _NEEDS[need](arch)]:
        raise ConversionError(
            f"the layout {layout} asks for {', '.join(lacking)}, which this network does not have; "
            "export as safetensors instead"
        )


_VIT_LAYER = "encoder.layer.{i}"
_QKV = tuple(f"{_VIT_LAYER}.attention.attention.{p}" for p in ("query", "key", "value"))
# What ViTModel and BeitModel call alike.
_VIT_TRUNK = (
    Rule("embeddings.cls_token", "encoder/cls_token"),
    Rule("embeddings.position_embeddings", "encoder/pos_embed"),
    *conv("embeddings.patch_embeddings.projection", "encoder/patch_embed"),
    *norm(f"{_VIT_LAYER}.layernorm_before", f"{_BLOCK}/norm1"),
    Rule(tuple(f"{p}.weight" for p in _QKV), f"{_BLOCK}/attn/qkv/kernel", SPLIT_QKV),
    *(Rule(f"{p}.bias", bias) for p, bias in zip(_QKV, _BIASES, strict=True)),
    *linear(f"{_VIT_LAYER}.attention.output.dense", f"{_BLOCK}/attn/proj"),
    *norm(f"{_VIT_LAYER}.layernorm_after", f"{_BLOCK}/norm2"),
    *linear(f"{_VIT_LAYER}.intermediate.dense", f"{_BLOCK}/mlp/fc1"),
    *linear(f"{_VIT_LAYER}.output.dense", f"{_BLOCK}/mlp/fc2"),
    *norm("layernorm", "encoder/norm"),
)
_BEIT_EXTRA = (
    Rule(f"{_VIT_LAYER}.lambda_1", f"{_BLOCK}/gamma_1"),
    Rule(f"{_VIT_LAYER}.lambda_2", f"{_BLOCK}/gamma_2"),
    Rule(
        "encoder.relative_position_bias.relative_position_bias_table", "encoder/rel_pos_bias/table"
    ),
    Rule(
        f"{_VIT_LAYER}.attention.attention.relative_position_bias.relative_position_bias_table",
        f"{_BLOCK}/attn/rel_pos_bias/table",
    ),
)
_BEIT_POOLER = norm("pooler.layernorm", "fc_norm")


def _vit_config(spec: ModelSpec) -> dict[str, Any]:
    return {"qkv_bias": True, "encoder_stride": spec.arch["patch_size"]}


def _beit_config(spec: ModelSpec) -> dict[str, Any]:
    position = spec.arch["position"]
    return {
        "use_absolute_position_embeddings": position == "ape",
        "use_relative_position_bias": position == "rpb",
        "use_shared_relative_position_bias": position == "shared_rpb",
        "use_mean_pooling": not spec.arch["final_norm"],
        "use_mask_token": False,
        "layer_scale_init_value": spec.arch["layer_scale"] or 0.0,
    }


def _dino_config(spec: ModelSpec) -> dict[str, Any]:
    return {
        "layerscale_value": spec.arch["layer_scale"],
        "mlp_ratio": spec.arch["mlp_width"] // spec.arch["width"],
        "num_register_tokens": spec.arch["registers"],
        "use_swiglu_ffn": False,
    }


def _dinov3_config(spec: ModelSpec) -> dict[str, Any]:
    return {
        "layerscale_value": spec.arch["layer_scale"],
        "num_register_tokens": spec.arch["registers"],
        "rope_theta": spec.arch["rope_theta"],
        "key_bias": False,
    }


def huggingface(spec: ModelSpec, *, head: bool) -> HuggingFace:
    """The transformers class of a network; `head` asks for the image classifier.

    Raises:
      ConversionError: there is none.
    """
    check_family(spec, "huggingface")
    layout = _nearest(spec.arch, head=head)
    check_needs(spec.arch, layout.needs, f"huggingface ({layout.architecture})")
    return layout


def _nearest(arch: Mapping[str, Any], *, head: bool) -> HuggingFace:
    if arch["position"] == "rope":
        needs = (*_PLAIN, "biases of q and v alone", "layer scale", "register tokens")
        table, name = dinov3.HUGGINGFACE, "DINOv3ViTModel"
        return HuggingFace("dinov3_vit", name, table, _dinov3_config, needs)
    if is_beit(arch):
        return _beit(head=head)
    if arch["ln_pre"]:
        needs = ("a class token", *_ABSOLUTE)
        table, name = clip.HUGGINGFACE, "CLIPVisionModel"
        return HuggingFace("clip_vision_model", name, table, lambda _: {}, needs)
    if not arch["cls_token"]:
        return HuggingFace(
            "siglip_vision_model",
            "SiglipVisionModel",
            siglip2.HUGGINGFACE,
            lambda _: {"vision_use_head": False},
            ("a bias of the patch embedding", *_ABSOLUTE),
        )
    needs = (*_PLAIN, "absolute positions", "biases of q, k and v")
    if arch["layer_scale"] is not None:
        needs = (*needs, "an MLP whose width is a multiple")
        if arch["registers"]:
            table = dinov2.HUGGINGFACE_REGISTERS
            name = "Dinov2WithRegistersModel"
            return HuggingFace("dinov2_with_registers", name, table, _dino_config, needs)
        return HuggingFace("dinov2", "Dinov2Model", dinov2.HUGGINGFACE, _dino_config, needs)
    trunk = Table(_VIT_TRUNK)
    if head:
        table = beit.prefixed(trunk, "vit.") + Table(linear("classifier", "head"))
        return HuggingFace("vit", "ViTForImageClassification", table, _vit_config, needs)
    return HuggingFace("vit", "ViTModel", trunk, _vit_config, needs)


def _beit(*, head: bool) -> HuggingFace:
    needs = ("a class token", "a bias of the patch embedding")
    trunk = Table(_VIT_TRUNK + _BEIT_EXTRA + _BEIT_POOLER)
    if head:
        table = beit.prefixed(trunk, "beit.") + Table(linear("classifier", "head"))
        return HuggingFace("beit", "BeitForImageClassification", table, _beit_config, needs)
    return HuggingFace("beit", "BeitModel", trunk, _beit_config, needs)


def huggingface_config(layout: HuggingFace, spec: ModelSpec) -> dict[str, Any]:
    """The contents of config.json."""
    arch = spec.arch
    activations = {ours: theirs for theirs, ours in reversed(HF_ACTIVATIONS.items())}
    config = {
        "model_type": layout.model_type,
        "architectures": [layout.architecture],
        "dtype": "float32",
        "hidden_size": arch["width"],
        "num_hidden_layers": arch["depth"],
        "num_attention_heads": arch["heads"],
        "intermediate_size": arch["mlp_width"],
        "image_size": arch["image_size"],
        "patch_size": arch["patch_size"],
        "num_channels": 3,
        "layer_norm_eps": arch["norm_eps"],
        "hidden_act": activations[arch["activation"]],
        **layout.config(spec),
    }
    if spec.classes:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(spec.classes)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(spec.classes)}
    return config
