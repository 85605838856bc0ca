"""The layouts that models are written in: names and shapes that other libraries read."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from fd_jax.convert.families import beit, clip, dinov2, dinov3, siglip2, swin, timm_vit
from fd_jax.convert.rules.tables import (
    Rule,
    Table,
    missing_paths,
    prefixed,
    summarize,
    target_paths,
)
from fd_jax.convert.rules.transforms import SPLIT_QKV
from fd_jax.convert.source import HF_ACTIVATIONS, conv, linear, norm
from fd_jax.errors import ConversionError
from fd_jax.models.spec import ModelSpec
from fd_jax.models.swin import grids as swin_grids

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
    """Names of timm: those of `Beit`, `VisionTransformer`, `SwinTransformer` or its V2."""
    if spec.family == "vit":
        return _TIMM_BEIT if is_beit(spec.arch) else _TIMM_VIT
    check_needs(spec.arch, ("a final norm",), "timm")
    return swin.TIMM_V2 if spec.family == "swin_v2" else swin.TIMM_V1


_OFFICIAL = {
    "vit": (
        beit.SHARED,
        (
            "a class token",
            "a final norm",
            "a bias of the patch embedding",
            "a shared relative position table",
            "biases of q and v alone",
            "the exact GELU",
            "norm epsilon 1e-6",
        ),
    ),
    "swin": (swin.V1, ("a final norm", "the exact GELU", "norm epsilon 1e-5")),
    "swin_v2": (
        swin.OFFICIAL_V2,
        (
            "a final norm",
            "a position bias per block",
            "coordinates scaled by the window itself",
            "the exact GELU",
            "norm epsilon 1e-5",
        ),
    ),
}


def official(spec: ModelSpec) -> Table:
    """Names of the original repository's distillation checkpoints.

    Raises:
      ConversionError: the original has no such network.
    """
    table, needs = _OFFICIAL[spec.family]
    check_needs(spec.arch, needs, "official")
    return prefixed(table, "encoder.")


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
    "norm epsilon 1e-5": lambda arch: arch["norm_eps"] == 1e-5,
    "an MLP whose width is a multiple": lambda arch: arch["mlp_width"] % arch["width"] == 0,
    "grids no smaller than the window": lambda arch: _last_grid(arch) >= arch["window"],
    "a position bias per block": lambda arch: arch["position"] == "rpb",
    "coordinates scaled by the window itself": lambda arch: not any(arch["pretrained_windows"]),
    "no norms on the main branch": lambda arch: not arch["extra_norm_every"],
}
_PLAIN = ("a class token", "a final norm", "a bias of the patch embedding")
_ABSOLUTE = ("a final norm", "absolute positions", "biases of q, k and v")


def _last_grid(arch: Mapping[str, Any]) -> int:
    return swin_grids(arch["image_size"], arch["patch_size"], len(arch["depths"]))[-1]


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


def _swin_config(spec: ModelSpec) -> dict[str, Any]:
    arch = spec.arch
    config = {
        "embed_dim": arch["embed_width"],
        "depths": arch["depths"],
        "num_heads": arch["heads"],
        "window_size": arch["window"],
        "mlp_ratio": float(arch["mlp_ratio"]),
        "qkv_bias": True,
        "use_absolute_embeddings": False,
        "drop_path_rate": 0.0,
        "encoder_stride": arch["patch_size"] << len(arch["depths"]) - 1,
    }
    if spec.family == "swin_v2":
        config["pretrained_window_sizes"] = arch["pretrained_windows"]
    return config


def huggingface(spec: ModelSpec, *, head: bool) -> HuggingFace:
    """The transformers class of a network; `head` asks for the image classifier.

    Raises:
      ConversionError: there is none.
    """
    if spec.family == "vit":
        layout = _nearest(spec.arch, head=head)
    else:
        # Their classifiers of this family read the mean token, no other.
        layout = _swin(spec.family, head=head and spec.pooling == "mean")
    check_needs(spec.arch, layout.needs, f"huggingface ({layout.architecture})")
    return layout


def _swin(family: str, *, head: bool) -> HuggingFace:
    # Their norms of patches and mergings have torch's own epsilon, whatever the config says.
    needs = ("a final norm", "norm epsilon 1e-5")
    if family == "swin":
        kind, name, trunk = "swin", "Swin", swin.HUGGINGFACE_V1
        needs = (*needs, "grids no smaller than the window")
    else:
        kind, name, trunk = "swinv2", "Swinv2", swin.HUGGINGFACE_V2
        needs = (*needs, "a position bias per block", "no norms on the main branch")
    if head:
        table = prefixed(trunk, f"{kind}.") + swin.HUGGINGFACE_HEAD
        return HuggingFace(kind, f"{name}ForImageClassification", table, _swin_config, needs)
    return HuggingFace(kind, f"{name}Model", trunk, _swin_config, needs)


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
        table = prefixed(trunk, "vit.") + Table(linear("classifier", "head"))
        return HuggingFace("vit", "ViTForImageClassification", table, _vit_config, needs)
    return HuggingFace("vit", "ViTModel", trunk, _vit_config, needs)


def _beit(*, head: bool) -> HuggingFace:
    needs = ("a class token", "a bias of the patch embedding")
    trunk = Table(_VIT_TRUNK + _BEIT_EXTRA + _BEIT_POOLER)
    if head:
        table = prefixed(trunk, "beit.") + Table(linear("classifier", "head"))
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
        "image_size": arch["image_size"],
        "patch_size": arch["patch_size"],
        "num_channels": 3,
        "layer_norm_eps": arch["norm_eps"],
        "hidden_act": activations[arch["activation"]],
        **(_vit_sizes(arch) if spec.family == "vit" else {}),
        **layout.config(spec),
    }
    if spec.classes:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(spec.classes)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(spec.classes)}
    return config


def _vit_sizes(arch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": arch["width"],
        "num_hidden_layers": arch["depth"],
        "num_attention_heads": arch["heads"],
        "intermediate_size": arch["mlp_width"],
    }
