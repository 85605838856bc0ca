"""ResNets: parameter paths, what shapes tell, properties that other libraries assume."""

from collections.abc import Mapping, Sequence
import fnmatch
from typing import Any

from fd_jax.convert.containers.tensors import Tensor
from fd_jax.convert.layout import need
from fd_jax.convert.networks.network import (
    PIXELS,
    STAND_INS,
    Arch,
    Network,
    Settled,
    Shapes,
    shape_of,
)
from fd_jax.convert.rules.tables import Place
from fd_jax.errors import ConversionError
from fd_jax.models.resnet import PATCH, STEMS
from fd_jax.models.resnet_blocks import has_shortcut

BLOCK = "encoder/stages/{s}/blocks/{b}"
# What networks of these names may have in other libraries, and none here has.
_OTHERS = {
    "attnpool.*": "a pooling by attention, and means before its strides (CLIP's ResNet)",
    "*.se.*": "an attention of channels in its blocks (SE-ResNet, ECA-ResNet)",
    "*.convs.*": "convolutions on parts of the channels (Res2Net)",
    "*.conv2.conv.*": "convolutions that are split and weighed (ResNeSt, SK-ResNet)",
    "maxpool.*": "a convolution in place of the stem's pooling (ResNet-RS)",
}


def projects(arch: Arch, place: Place) -> bool:
    """Whether a block's shortcut is a convolution."""
    if place.block:
        return False
    before = arch["widths"][place.stage - 1] if place.stage else arch["stem_widths"][-1]
    return has_shortcut(before, arch["widths"][place.stage], 2 if place.stage else 1)


def is_bottleneck(arch: Arch, place: Place) -> bool:
    """Whether blocks have a third convolution."""
    del place
    return arch["bottleneck"]


def expansion(arch: Arch) -> int:
    """Channels of a stage for each plane, as the papers count them."""
    return 4 if arch["bottleneck"] else 1


def base_width(arch: Arch) -> int:
    """Inner channels for 64 planes; 64 in a plain ResNet, 128 in a Wide ResNet-50-2."""
    return arch["inner_widths"][0] * 64 * expansion(arch) // arch["widths"][0]


def _inner_widths(arch: Arch, base: int) -> list[int]:
    return [width // expansion(arch) * base // 64 for width in arch["widths"]]


PLAIN_STEM = need("a stem of one convolution", lambda arch: len(arch["stem_widths"]) == 1)
STRIDED_SHORTCUT = need("strided shortcuts", lambda arch: arch["shortcut"] == "strided")
WIDTHS_OF_4 = need(
    "bottlenecks of a quarter of the channels of their stage",
    lambda arch: _inner_widths(arch, 64) == list(arch["inner_widths"]),
)
ONE_BASE_WIDTH = need(
    "stages that widen their blocks alike",
    lambda arch: (
        all(width % expansion(arch) == 0 for width in arch["widths"])
        and _inner_widths(arch, base_width(arch)) == list(arch["inner_widths"])
        and (arch["bottleneck"] or base_width(arch) == 64)
    ),
)
STRIDES_IN_3X3 = need(
    "bottlenecks that halve the grid in their 3 x 3 convolution",
    lambda arch: not arch["bottleneck"] or arch["stride_at"] == "second",
)
RELU = need("ReLU", lambda arch: arch["activation"] == "relu")


def _told(shapes: Shapes, depths: Sequence[int], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    for pattern, words in _OTHERS.items():
        if found := fnmatch.filter(tensors, pattern):
            raise ConversionError(f"it has {words}, which no network here has: {found[0]}")
    firsts = [BLOCK.format(s=stage, b=0) for stage in range(len(depths))]
    bottleneck = f"{firsts[0]}/branch/2/conv/kernel" in shapes
    last = 2 if bottleneck else 1
    kernels = [
        [shape_of(shapes, f"{first}/branch/{i}/conv/kernel", 4) for i in range(last + 1)]
        for first in firsts
    ]
    _check_blocks(kernels, bottleneck)
    return {
        "patch_size": PATCH,
        "stem_widths": _stem(shapes),
        "widths": [each[-1][3] for each in kernels],
        "inner_widths": [each[0][3] for each in kernels],
        "depths": list(depths),
        "bottleneck": bottleneck,
        "pooling": "mean",
        **({} if bottleneck else {"stride_at": "first"}),
    }


def _check_blocks(kernels: Sequence[Sequence[tuple[int, ...]]], bottleneck: bool) -> None:
    """Refuses blocks of another form.

    Raises:
      ConversionError: their kernels have other sides, or read only some of the channels.
    """
    sides = [(1, 1), (3, 3), (1, 1)] if bottleneck else [(3, 3), (3, 3)]
    for each in kernels:
        if [kernel[:2] for kernel in each] != sides:
            found = " and ".join(f"{kernel[0]} x {kernel[1]}" for kernel in each)
            raise ConversionError(f"its blocks have kernels of {found}, which no network here has")
        for before, kernel in zip(each, each[1:], strict=False):
            if kernel[2] != before[3]:
                raise ConversionError(
                    f"its convolutions read {kernel[2]} of {before[3]} channels: groups of them "
                    "(ResNeXt), which no network here has"
                )
        if bottleneck and each[0][3] != each[1][3]:
            raise ConversionError(
                f"its bottlenecks have {each[0][3]} and then {each[1][3]} channels, which no "
                "network here has"
            )


def _stem(shapes: Shapes) -> list[int]:
    """The widths of the convolutions of the stem."""
    paths = ["encoder/patch_embed/kernel", "encoder/stem/0/conv/kernel"]
    paths.append("encoder/stem/1/conv/kernel")
    kernels = [shape_of(shapes, path, 4) for path in paths if path in shapes]
    side = STEMS.get(len(kernels), 0)
    if not kernels or any(kernel[:2] != (side, side) for kernel in kernels) or kernels[0][2] != 3:
        found = ", ".join(" x ".join(map(str, kernel[:3])) for kernel in kernels)
        raise ConversionError(
            f"its stem has kernels of {found or 'no'} pixels and channels; expected one of 7 x 7 x "
            "3, or three of 3 x 3 the first of which reads 3 channels"
        )
    return [kernel[3] for kernel in kernels]


def _asks(told: Mapping[str, Any]) -> tuple[str, ...]:
    stride = ("stride_at",) if told["bottleneck"] else ()
    return ("image_size", *stride, "shortcut", "activation", "norm_eps", *PIXELS)


def _arch(settled: Settled) -> tuple[dict[str, Any], list[str]]:
    fields = (
        "image_size patch_size stem_widths widths inner_widths depths bottleneck stride_at "
        "shortcut activation norm_eps"
    )
    return {name: settled[name].value for name in fields.split()}, []


def _stand_ins(told: Mapping[str, Any]) -> dict[str, Any]:
    more = {"stride_at": "first", "shortcut": "strided", "image_size": PATCH << len(told["depths"])}
    return {**STAND_INS, **more}


NETWORK = Network(
    depths=lambda arch: arch["depths"],
    width=lambda arch: arch["widths"][-1],
    positions=lambda arch: "convolutions",
    told=_told,
    asks=_asks,
    arch=_arch,
    stand_ins=_stand_ins,
)
