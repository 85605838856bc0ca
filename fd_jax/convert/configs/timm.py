"""timm's config.json: the name of an architecture, and what one file of its weights expects."""

from collections.abc import Mapping
import types
from typing import Any

from fd_jax.convert import published
from fd_jax.convert.configs import classes, huggingface
from fd_jax.convert.facts import Claim
from fd_jax.errors import ConversionError

FILE = "config.json"
STYLES = "timm_"  # how the names of styles begin whose networks it describes
# Arguments of timm's models that change no feature.
_HARMLESS = frozenset(
    (
        "num_classes dynamic_img_size dynamic_img_pad strict_img_size drop_rate drop_path_rate "
        "attn_drop_rate proj_drop_rate pos_drop_rate patch_drop_rate weight_init fix_init "
        "head_init_scale global_pool pool_size"
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
        "init_values": ("layer_scale",),
        "ls_init_value": ("layer_scale",),
        "qkv_bias": (),
        "mlp_layer": ("gated_mlp", "activation"),
        "swiglu_mlp": ("gated_mlp", "activation"),
        "scale_mlp": ("mlp_norm",),
        "scale_attn_inner": ("attn_norm",),
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
        "ref_feat_shape": "rope_reference",
        "rope_temperature": "rope_theta",
        "rope_grid_offset": "rope_offset",
    }
)
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
    found += _pooling(config, given, tensors)
    known = {claim.fact for claim in found}
    facts = published.whole(facts)
    if "pool" in facts:
        facts["pool"] = _pool(facts, given)
    known.update(fact for argument in given for fact in _SHOWN.get(argument, ()))
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
    width = int(given.get("embed_dim", facts["width"]) * ratio)
    alike = pool["heads"] == facts["heads"]
    heads = given.get("num_heads", pool["heads"]) if alike else pool["heads"]
    return {**pool, "mlp_width": width, "heads": heads}


def _said(pretrained: Mapping[str, Any], changed: list[Claim]) -> bool:
    """Whether the size of the input is that of the config's own weights."""
    return bool(pretrained.get("input_size")) and not any(c.fact == "image_size" for c in changed)


def _arguments(given: Mapping[str, Any]) -> list[Claim]:
    found = []
    for argument, value in given.items():
        where = f"{FILE}: model_args.{argument}"
        if argument in _ARGUMENTS:
            found.append(Claim(_ARGUMENTS[argument], _size(value), where))
        elif argument == "act_layer" and str(value) in _ACTIVATIONS:
            found.append(Claim("activation", _ACTIVATIONS[value], where))
        elif argument not in _HARMLESS and argument not in _SHOWN:
            raise ConversionError(
                f"{where} is {value!r:.60}, which changes the network in a way that is not known "
                "here. Name the network by --arch and take the config away if it changes nothing"
            )
    return found


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


def _size(value: Any) -> Any:
    """One number for a square."""
    pair = isinstance(value, list) and len(value) == 2
    return value[0] if pair and value[0] == value[1] else value
