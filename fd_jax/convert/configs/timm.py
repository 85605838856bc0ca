"""timm's config.json: the name of an architecture, and what one file of its weights expects."""

from collections.abc import Mapping
import dataclasses
import types
from typing import Any

from fd_jax.convert import published
from fd_jax.convert.configs import classes, huggingface
from fd_jax.convert.facts import Claim
from fd_jax.convert.facts import claims as facts_of
from fd_jax.errors import ConversionError
from fd_jax.models.rotary import Rope

FILE = "config.json"
STYLES = "timm_"  # how the names of styles begin whose networks it describes
# Arguments of timm's models that change no feature.
_HARMLESS = frozenset(
    (
        "num_classes dynamic_img_size dynamic_img_pad strict_img_size drop_rate drop_path_rate "
        "attn_drop_rate proj_drop_rate pos_drop_rate patch_drop_rate weight_init fix_init "
        "head_init_scale global_pool pool_size swiglu_align_to attn_type qkv_fused conv_mlp "
        "zero_init_last"
    ).split()
)
# Those whose effect the tensors show, and the facts of the architecture that no longer hold.
_SHOWN = types.MappingProxyType(
    {
        "embed_dim": ("width", "embed_width", "mlp_width"),
        "depth": ("depth",),
        "depths": ("depths",),
        "dims": ("widths",),
        "mlp_ratio": ("mlp_width", "mlp_ratio"),
        "patch_size": ("patch_size",),
        "in_chans": (),
        "no_embed_class": (),
        "qkv_bias": (),
        "mlp_layer": ("gated_mlp", "activation"),
        "scale_mlp": ("mlp_norm",),
        "scale_mlp_norm": ("mlp_norm",),
        "scale_attn_inner": ("attn_norm",),
        "scale_attn_norm": ("attn_norm",),
        "pre_norm": ("ln_pre", "patch_bias"),
        "use_pre_transformer_norm": ("ln_pre", "patch_bias"),
        "final_norm": ("final_norm",),
        "use_post_transformer_norm": ("final_norm",),
        "fc_norm": (),
        "use_fc_norm": (),
        "use_abs_pos_emb": ("position",),
        "use_rel_pos_bias": (),
        "use_shared_rel_pos_bias": (),
        "use_rot_pos_emb": ("position",),
        "attn_pool_num_heads": (),
        "attn_pool_mlp_ratio": (),
        "kernel_sizes": (),
        "use_grn": ("grn",),
        "head_norm_first": (),
        "head_hidden_size": (),
        "ref_feat_shape": (),
        "layers": ("depths",),
        "channels": ("widths", "inner_widths"),
        "base_width": ("inner_widths",),
        "cardinality": (),
        "stem_width": ("stem_widths",),
        "stem_type": ("stem_widths",),
        "avg_down": ("shortcut",),
    }
)
# Those of which networks here have one value.
_ONLY = types.MappingProxyType(
    {
        "pool_include_prefix": False,
        "always_partition": False,
        "output_stride": 32,
        "replace_stem_pool": False,
    }
)
# Others, as facts.
_ARGUMENTS = types.MappingProxyType(
    {
        "img_size": "image_size",
        "num_heads": "heads",
        "class_token": "cls_token",
        "reg_tokens": "registers",
        "num_reg_tokens": "registers",
        "window_size": "window",
        "pretrained_window_sizes": "pretrained_windows",
        "rope_temperature": "rope_theta",
        "rope_grid_offset": "rope_offset",
        "init_values": "layer_scale",
        "ls_init_value": "layer_scale",
        "norm_eps": "norm_eps",
    }
)
# Others, as facts of their values.
_VALUES: Mapping[str, Mapping[Any, Mapping[str, Any]]] = types.MappingProxyType(
    {
        "swiglu_mlp": {
            True: {"gated_mlp": True, "activation": "silu"},
            False: {"gated_mlp": False, "activation": "gelu_erf"},
        },
        "rope_rotate_half": {
            True: {"rope_pairs": "halves"},
            False: {"rope_pairs": "neighbours"},
        },
        "rope_grid_indexing": {"ij": {"rope_axes": "yx"}, "xy": {"rope_axes": "xy"}},
        "rope_type": {"dinov3": {}, "cat": {}},  # see `_reference`
    }
)
_TURNED = tuple(f"rope_{field.name}" for field in dataclasses.fields(Rope))
_ACTIVATIONS = types.MappingProxyType(
    {**classes.ACTIVATIONS, "gelu_tanh": "gelu_tanh", "quickgelu": "quick_gelu"}
)


def claims(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> list[Claim]:
    """What timm's config.json says, and timm itself of the architecture in it.

    Args:
      config: the file.
      tensors: of the network, by name.

    Raises:
      ConversionError: no network of timm has the architecture's name, or the config changes it in
        a way that is not known here.
    """
    pretrained = config.get("pretrained_cfg")
    pretrained = pretrained if isinstance(pretrained, dict) else {}
    facts, origin = published.architecture(str(config["architecture"]), pretrained.get("tag"))
    given = config.get("model_args") or {}
    if not isinstance(given, dict):
        raise ConversionError(f"{FILE}: model_args is {given!r:.60}; expected names and values")
    changed = _arguments(given)
    found = changed + _pretrained(pretrained, _said(pretrained, changed))
    facts = published.whole(facts)
    found += _pooling(config, given, tensors) + _reference(given, facts)
    known = {claim.fact for claim in found}
    if "pool" in facts:
        facts["pool"] = _pool(facts, given)
    known.update(fact for argument in given for fact in _SHOWN.get(argument, ()))
    if "use_rot_pos_emb" in given and given["use_rot_pos_emb"] != (facts["rope_theta"] is not None):
        known.update(_TURNED)  # of another network than the architecture's
    return found + [Claim(f, value, origin) for f, value in facts.items() if f not in known]


def _pooling(
    config: Mapping[str, Any], given: Mapping[str, Any], tensors: Mapping[str, Any]
) -> list[Claim]:
    """What a head reads, as the config of one file says it; it may be unlike the published one."""
    pool = given.get("global_pool", config.get("global_pool"))
    normed = any(name.startswith(("fc_norm.", "head.norm.")) for name in tensors)
    mean = "mean_norm" if normed else "mean"
    pooling = {"token": "cls", "avg": mean}.get(str(pool))
    return [] if pooling is None else [Claim("pooling", pooling, f"{FILE}: global_pool")]


def _pool(facts: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The pool of an architecture whose arguments are changed: timm makes it of the same ones."""
    pool = facts["pool"]
    ratio = given.get("mlp_ratio", pool["mlp_width"] / facts["width"])
    width = int(given.get("embed_dim", facts["width"]) * given.get("attn_pool_mlp_ratio", ratio))
    alike = pool["heads"] == facts["heads"]
    heads = given.get("num_heads", pool["heads"]) if alike else pool["heads"]
    activation = _ACTIVATIONS.get(str(given.get("act_layer")), pool["activation"])
    more = {"mlp_width": width, "heads": given.get("attn_pool_num_heads", heads)}
    return {**pool, **more, "activation": activation}


def _said(pretrained: Mapping[str, Any], changed: list[Claim]) -> bool:
    """Whether the size of the input is that of the config's own weights."""
    return bool(pretrained.get("input_size")) and not any(c.fact == "image_size" for c in changed)


def _arguments(given: Mapping[str, Any]) -> list[Claim]:
    found = []
    for argument, value in given.items():
        where = f"{FILE}: model_args.{argument}"
        if argument in _ARGUMENTS:
            found.append(Claim(_ARGUMENTS[argument], _plain(argument, value), where))
        elif argument == "act_layer" and str(value) in _ACTIVATIONS:
            found.append(Claim("activation", _ACTIVATIONS[value], where))
        elif argument in _VALUES and value in (known := _VALUES[argument]):
            found += facts_of(known[value], where)
        elif argument in _ONLY and value == _ONLY[argument]:
            continue
        elif argument not in _HARMLESS and argument not in _SHOWN:
            raise ConversionError(
                f"{where} is {value!r:.60}, which changes the network in a way that is not known "
                "here. Name the network by --arch and take the config away if it changes nothing"
            )
    return found + _combined(given)


def _combined(given: Mapping[str, Any]) -> list[Claim]:
    """What several arguments say together."""
    where = f"{FILE}: model_args"
    found = []
    bare = given.get("final_norm", True) is False
    norms = given.get("use_post_transformer_norm"), given.get("use_fc_norm")
    if bare or norms == (False, False):
        found.append(Claim("final_norm", False, where))
    if given.get("use_rot_pos_emb") is False:
        found.append(Claim("rope_theta", None, where))
    return found


def _reference(given: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Claim]:
    """What the patches of an axis measure, if arguments say otherwise than the architecture."""
    if facts.get("rope_theta") is None and "rope_type" not in given:
        return []
    usual = "dinov3" if facts.get("rope_reference") is None else "cat"
    where = f"{FILE}: model_args.ref_feat_shape"
    if given.get("rope_type", usual) == "dinov3":
        return [Claim("rope_reference", None, where)] if "rope_type" in given else []
    if "ref_feat_shape" in given:
        return [Claim("rope_reference", _size(given["ref_feat_shape"]) or 0, where)]
    return [] if usual == "cat" else [Claim("rope_reference", 0, f"{FILE}: model_args.rope_type")]


def _plain(argument: str, value: Any) -> Any:
    """The value of an argument as a fact has it."""
    return value or None if argument == "init_values" else _size(value)


def _pretrained(fields: Mapping[str, Any], sized: bool) -> list[Claim]:
    where = f"{FILE}: pretrained_cfg."
    found = [
        Claim(name, huggingface.three_numbers(fields[name], f"{where}{name}"), f"{where}{name}")
        for name in ("mean", "std")
        if fields.get(name) is not None
    ]
    if sized:
        found.append(Claim("image_size", _size(fields["input_size"][1:]), f"{where}input_size"))
    return found


def class_names(config: Mapping[str, Any], classes: int) -> list[str] | None:
    """The names of classes in a config; None if it has not one for each output of the head."""
    found = config.get("label_names")
    if not classes or not isinstance(found, list) or len(found) != classes:
        return None
    return list(found) if all(isinstance(name, str) for name in found) and any(found) else None


def _size(value: Any) -> Any:
    """One number for a square."""
    pair = isinstance(value, list) and len(value) == 2
    return value[0] if pair and value[0] == value[1] else value
