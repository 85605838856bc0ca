"""open_clip_config.json: the vision tower and the pixels of open_clip's models."""

from collections.abc import Mapping
from typing import Any

from fd_jax.convert import published
from fd_jax.convert.facts import Claim
from fd_jax.errors import ConversionError

FILE = "open_clip_config.json"
HEAD_WIDTH = 64  # open_clip's default
# What the head of a tower of timm reads.
_POOLINGS = {"token": "cls"}
# Fields of a tower that change features in ways that networks here do not know.
_REFUSED = ("attentional_pool", "attn_pooler_queries", "norm_kwargs", "act_kwargs", "patch_dropout")


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
    where = f"{FILE}: model_cfg.vision_cfg."
    size = Claim("image_size", vision.get("image_size", 224), f"{where}image_size")
    if "timm_model_name" in vision:
        facts, origin = published.architecture(vision["timm_model_name"], None)
        taken = ("image_size", "mean", "std")
        rest = [Claim(fact, v, origin) for fact, v in facts.items() if fact not in taken]
        pooling = _POOLINGS.get(vision.get("timm_pool"))
        read = [Claim("pooling", pooling, f"{where}timm_pool")] if pooling else []
        return [size, *rest, *read]
    if wrong := [f"{name} {vision[name]!r:.40}" for name in _REFUSED if vision.get(name)]:
        raise ConversionError(f"{FILE} has {', '.join(wrong)}, which networks here do not have")
    code = "the code of open_clip"
    quick = model.get("quick_gelu", False)
    width = vision.get("width")
    heads = width // vision.get("head_width", HEAD_WIDTH) if isinstance(width, int) else None
    return [
        size,
        Claim("width", width, f"{where}width"),
        Claim("depth", vision.get("layers"), f"{where}layers"),
        Claim("patch_size", vision.get("patch_size"), f"{where}patch_size"),
        Claim("heads", heads, f"{where}head_width"),
        Claim(
            "activation",
            "quick_gelu" if quick else "gelu_erf",
            f"{FILE}: model_cfg.quick_gelu" if quick else code,
        ),
        Claim("norm_eps", 1e-5, code),
        Claim("position_resize", "antialias", code),
    ]


def _pixels(fields: Any) -> list[Claim]:
    if not isinstance(fields, dict):
        return []
    return [
        Claim(name, list(map(float, fields[name])), f"{FILE}: preprocess_cfg.{name}")
        for name in ("mean", "std")
        if name in fields
    ]
