"""Facts of a network that come from several places: each says where it is from, none is assumed.

The shapes of tensors tell the widths of a network, and not how many heads it has, which activation,
or which pixels it expects. Files beside the weights claim these, and so do the tables of published
networks. `settle` puts the claims together and refuses those that contradict each other.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import math
import types
from typing import Any

from fd_jax.errors import ConversionError
from fd_jax.models.spec import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD

TENSORS = "the tensors"
STATED_BY = "--fact"  # how the user states a fact
_AGAINST = "stated by the user, against "
# Facts that the same argument of a library sets: who is wrong about the first knows no other.
TIED: Mapping[str, tuple[str, ...]] = types.MappingProxyType({"gated_mlp": ("activation",)})


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement about a network.

    Attributes:
      fact: name of a field of `ModelSpec` or of its `arch`.
      value: as that field holds it.
      origin: where it is from, for people: "config.json: num_attention_heads".
    """

    fact: str
    value: Any
    origin: str

    def __str__(self) -> str:
        return f"{self.fact} is {show(self.value)} ({self.origin})"


def claims(values: Mapping[str, Any], origin: str) -> list[Claim]:
    """One claim for each value, all from the same place."""
    return [Claim(fact, value, origin) for fact, value in values.items()]


def settle(given: Iterable[Claim]) -> dict[str, Claim]:
    """The claims by fact; of equal ones the first.

    Raises:
      ConversionError: two of them differ; the message has all pairs that do, with their origins.
    """
    found: dict[str, Claim] = {}
    conflicts = []
    for claim in given:
        first = found.setdefault(claim.fact, claim)
        if not same(first.value, claim.value):
            conflicts.append(f"{first}, but {show(claim.value)} ({claim.origin})")
    if conflicts:
        raise ConversionError(
            "what the file and the files beside it say of the network does not agree: "
            f"{'; '.join(conflicts)}. Correct what is wrong, or name the file that belongs to "
            f"them; {STATED_BY}=NAME=VALUE overrules all but tensors, where a network was made "
            "otherwise than its files say"
        )
    return found


def overruled(stated: Sequence[Claim], said: Sequence[Claim]) -> tuple[list[Claim], list[Claim]]:
    """Lets stated facts take the place of what files and published names say.

    Args:
      stated: the claims of the user.
      said: the claims of files and published names.

    Returns:
      The stated claims, with the values that they stand against in their origins, and what is left
      of the others. What is tied to a fact they are wrong about does not count either: who does not
      know of a gate names the activation of a plain MLP.
    """
    found, silent = [], {claim.fact for claim in stated}
    for claim in stated:
        against = [o for o in said if o.fact == claim.fact and not same(o.value, claim.value)]
        if against:
            listed = ", ".join(f"{show(other.value)} ({other.origin})" for other in against)
            claim = dataclasses.replace(claim, origin=f"{_AGAINST}{listed}")
            silent.update(TIED.get(claim.fact, ()))
        found.append(claim)
    return found, [claim for claim in said if claim.fact not in silent]


def is_stated(origin: str) -> bool:
    """Whether a fact is from the user, by its origin."""
    return origin == STATED_BY or origin.startswith(_AGAINST)


def same(one: Any, other: Any) -> bool:
    """Whether two values of a fact are equal; numbers within the rounding of float32."""
    if isinstance(one, Sequence) and isinstance(other, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other or math.isclose(one, other, rel_tol=1e-6)
    return one == other


def show(value: Any) -> str:
    """A value for people: numbers of floats are short."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return " x ".join(map(show, value)) if len(value) == 2 else f"({_joined(value)})"
    return str(value)


def _joined(values: Sequence[Any]) -> str:
    return ", ".join(map(show, values))


STATISTICS: Mapping[tuple[Any, Any], str] = types.MappingProxyType(
    {
        (IMAGENET_MEAN, IMAGENET_STD): "ImageNet",
        (CLIP_MEAN, CLIP_STD): "CLIP",
        ((0.5,) * 3, (0.5,) * 3): "0.5 / 0.5",
    }
)


def _number(text: str) -> float:
    return float(text)


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == "none" else read(text)


def _list_of_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _whole_numbers(text: str) -> int | list[int]:
    numbers = [int(part) for part in text.split(",")]
    return numbers[0] if len(numbers) == 1 else numbers


def _flag(text: str) -> bool:
    return {"yes": True, "no": False}[text]


# What can be stated on a command line, and how its text is read.
STATED = types.MappingProxyType(
    {
        "image_size": _whole_numbers,
        "heads": _whole_numbers,
        "activation": str,
        "norm_eps": _number,
        "final_norm_eps": _number,
        "mean": _numbers,
        "std": _numbers,
        "pixel_scale": _number,
        "position_resize": str,
        "pooling": str,
        "window": int,
        "stride_at": str,
        "shortcut": str,
        "pretrained_windows": _list_of_numbers,
        "rope_theta": _or_none(_number),  # "none": no rotary positions
        "rope_pairs": str,
        "rope_reference": _or_none(int),
        "rope_offset": _number,
        "rope_axes": str,
        "cls_token": _flag,
        "registers": int,
        "ln_pre": _flag,
        "final_norm": _flag,
        "patch_bias": _flag,
        "qkv_bias": str,
        "mlp_width": int,
        "gated_mlp": _flag,
        "mlp_norm": _flag,
        "attn_norm": _flag,
    }
)


def stated(texts: Iterable[str]) -> list[Claim]:
    """The claims of `--fact NAME=VALUE`.

    Raises:
      ConversionError: a text has no such form, no such name, or a value that cannot be read.
    """
    found = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in STATED:
            raise ConversionError(
                f"--fact {text!r}: expected NAME=VALUE with a name of {', '.join(STATED)}; several "
                "numbers are separated by commas, as in mean=0.5,0.5,0.5"
            )
        try:
            found.append(Claim(name, STATED[name](value), STATED_BY))
        except (KeyError, ValueError) as error:
            expected = "; expected yes or no" if STATED[name] is _flag else ""
            raise ConversionError(f"--fact {text!r}: {value!r} is no {name}{expected}") from error
    return found
