"""open_clip_config.json: the vision tower and the pixels of open_clip's models."""

from collections.abc import Mapping
import types
from typing import Any

from fd_jax.convert import published
from fd_jax.convert.configs.huggingface import three_numbers
from fd_jax.convert.facts import Claim
from fd_jax.errors import ConversionError

FILE = "open_clip_config.json"
HEAD_WIDTH = 64  # open_clip's default
# What the head of a tower of timm reads.
_POOLINGS = {"token": "cls"}
# Fields of a tower that claims are made of, or the tensors tell, or that change no feature.
_KNOWN = frozenset(
    (
        "image_size layers width head_width patch_size mlp_ratio ls_init_value patch_dropout "
        "output_tokens no_ln_pre attentional_pool attn_pooler_queries attn_pooler_heads "
        "timm_model_name timm_model_pretrained timm_pool timm_proj timm_proj_bias timm_drop "
        "timm_drop_path"
    ).split()
)
# Others, with the only value that networks here have.
_ONLY = types.MappingProxyType({"pool_type": "tok", "pos_embed_type": "learnable"})


def is_of(style: str, prefix: str) -> bool:
    """Whether open_clip wrote tensors: in its own names, or in timm's as its vision tower."""
    return style == "openai_clip" or prefix.endswith("visual.trunk.")


def claims(config: Mapping[str, Any]) -> list[Claim]:
    """What an open_clip_config.json says of the vision tower.

    Raises:
      ConversionError: it has no vision tower, or one that networks here cannot represent.
    """
    model = config.get("model_cfg")
    vision = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vision, dict):
        raise ConversionError(f"{FILE} has no model_cfg.vision_cfg, which describes the tower")
    return _tower(model, vision) + _pixels(config.get("preprocess_cfg"))


def _tower(model: Mapping[str, Any], vision: Mapping[str, Any]) -> list[Claim]:
    _refuse(vision)
    where = f"{FILE}: model_cfg.vision_cfg."
    size = Claim("image_size", vision.get("image_size", 224), f"{where}image_size")
    if vision.get("timm_model_name"):
        return [size, *_of_timm(vision, where)]
    code = "the code of open_clip"
    quick = bool(model.get("quick_gelu"))
    heads = vision["width"] // (vision.get("head_width") or HEAD_WIDTH)
    return [
        size,
        Claim("width", vision["width"], f"{where}width"),
        Claim("depth", vision.get("layers"), f"{where}layers"),
        Claim("patch_size", vision.get("patch_size"), f"{where}patch_size"),
        Claim("heads", heads, f"{where}head_width"),
        Claim(
            "activation",
            "quick_gelu" if quick else "gelu_erf",
            f"{FILE}: model_cfg.quick_gelu" if quick else code,
        ),
        Claim("ln_pre", not vision.get("no_ln_pre"), f"{where}no_ln_pre"),
        # Its norm then comes after the pooling.
        Claim("final_norm", not vision.get("attentional_pool"), f"{where}attentional_pool"),
        Claim("norm_eps", 1e-5, code),
        Claim("position_resize", "antialias", code),
    ]


def _refuse(vision: Mapping[str, Any]) -> None:
    """Refuses a tower with fields that are not known here."""
    wrong = [
        f"{name} {value!r:.40}"
        for name, value in vision.items()
        if name not in _KNOWN and value not in (None, False, {}, _ONLY.get(name))
    ]
    if isinstance(pool := vision.get("attentional_pool"), str):  # two pools, of which it warns
        wrong.append(f"attentional_pool {pool!r:.40}")
    if wrong:
        raise ConversionError(f"{FILE} has {', '.join(wrong)}, which networks here do not have")


def _of_timm(vision: Mapping[str, Any], where: str) -> list[Claim]:
    facts, origin = published.architecture(vision["timm_model_name"], None)
    facts = published.whole(facts)
    taken = ("image_size", "mean", "std")
    found = [Claim(fact, value, origin) for fact, value in facts.items() if fact not in taken]
    pooling = _POOLINGS.get(str(vision.get("timm_pool")))
    return found + ([Claim("pooling", pooling, f"{where}timm_pool")] if pooling else [])


def _pixels(fields: Any) -> list[Claim]:
    if not isinstance(fields, dict):
        return []
    where = f"{FILE}: preprocess_cfg."
    return [
        Claim(name, three_numbers(fields[name], f"{where}{name}"), f"{where}{name}")
        for name in ("mean", "std")
        if fields.get(name) is not None
    ]
