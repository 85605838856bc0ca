"""config.json and preprocessor_config.json of transformers, as facts."""

from collections.abc import Mapping
import math
from typing import Any

from fd_jax.convert.configs.classes import FILE, TOWERS, TYPES, activation
from fd_jax.convert.facts import Claim
from fd_jax.convert.style import Style
from fd_jax.errors import ConversionError

PREPROCESSOR = "preprocessor_config.json"


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
    return str(config.get("model_type")) in (*TYPES, *TOWERS)


def vision_type(config: Mapping[str, Any]) -> str:
    """The model_type of the network that sees; "None" if the config has none."""
    return _vision(config)[1]


def _vision(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str, str]:
    """The fields of the vision tower, its type, and where in the file they are."""
    name = str(config.get("model_type"))
    if name not in TOWERS:
        return config, name, ""
    # Older files have the fields twice, and transformers lets the second place win.
    places = [config.get(place) for place in ("vision_config", "vision_config_dict")]
    fields = {k: v for place in places if isinstance(place, dict) for k, v in place.items()}
    return fields, TOWERS[name], "vision_config."


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


def size(fields: Mapping[str, Any]) -> list[Claim]:
    """The size of pictures in a preprocessor_config.json, where their short side is their side.

    An image processor of ConvNeXts, which ResNets have as well, resizes to more and crops, below
    384 pixels; "shortest_edge" is what is left.
    """
    given = fields.get("size")
    edge = given.get("shortest_edge") if isinstance(given, dict) else given
    if isinstance(given, dict) and edge is None and given.get("height") == given.get("width"):
        edge = given.get("height")
    return [Claim("image_size", edge, f"{PREPROCESSOR}: size")] if isinstance(edge, int) else []


def three_numbers(values: Any, origin: str) -> list[float]:
    """A value for each of the channels red, green and blue.

    Raises:
      ConversionError: they are not three numbers.
    """
    numbers = isinstance(values, list | tuple) and len(values) == 3
    if not numbers or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        raise ConversionError(f"{origin} is {values!r:.60}; expected three numbers")
    return [float(value) for value in values]
