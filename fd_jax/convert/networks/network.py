"""What conversion asks about a network, whatever its class."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

from fd_jax.convert.containers.tensors import Tensor
from fd_jax.convert.facts import Claim
from fd_jax.errors import ConversionError

Arch = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
Settled = Mapping[str, Claim]

# What every network needs to know of its pixels.
PIXELS = ("mean", "std")
# Facts on which no tensor depends, see `Network.stand_ins`.
STAND_INS = {
    "activation": "gelu_erf",
    "norm_eps": 1e-6,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "position_resize": "size",
    "pooling": "cls",
}


@dataclasses.dataclass(frozen=True)
class Network:
    """Answers about the networks of one family of `models.spec.FAMILIES`.

    Attributes:
      depths: (architecture) -> blocks of each stage; a network without stages has one.
      width: (architecture) -> channels of the feature map.
      positions: (architecture) -> how the network knows where a token is, in one word.
      told: (shapes of parameters by path, blocks of each stage, tensors by name) -> the facts that
        these tell: fields of the architecture, and what `arch` makes others of.
      asks: (facts that are told, by name) -> names of the facts that have to come from elsewhere.
      arch: (facts, settled) -> the architecture, and remarks for people.
      stand_ins: (facts that are told) -> values of the facts in `asks` with which a network has the
        tensors of a file, so that these can be checked before anything is asked.
    """

    depths: Callable[[Arch], Sequence[int]]
    width: Callable[[Arch], int]
    positions: Callable[[Arch], str]
    told: Callable[[Shapes, Sequence[int], Mapping[str, Tensor]], dict[str, Any]]
    asks: Callable[[Mapping[str, Any]], tuple[str, ...]]
    arch: Callable[[Settled], tuple[dict[str, Any], list[str]]]
    stand_ins: Callable[[Mapping[str, Any]], dict[str, Any]]


def shape_of(shapes: Shapes, path: str, axes: int) -> tuple[int, ...]:
    """The shape of a parameter that every network of the family has.

    Raises:
      ConversionError: the file has none, or one with another number of axes.
    """
    if path not in shapes:
        raise ConversionError(f"no tensor gives the parameter {path}")
    if len(shapes[path]) != axes:
        raise ConversionError(f"{path} would have the shape {list(shapes[path])}")
    return shapes[path]


def patches(shapes: Shapes) -> tuple[int, int]:
    """Side and width of the patch embedding.

    Raises:
      ConversionError: patches are not square, or of other than three channels.
    """
    height, width, channels, out = shape_of(shapes, "encoder/patch_embed/kernel", 4)
    if height != width or channels != 3:
        raise ConversionError(
            f"its patches are {height} x {width} pixels of {channels} channels; expected square "
            "patches of RGB pixels"
        )
    return height, out
