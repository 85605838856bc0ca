"""ConvNeXts: parameter paths, what shapes tell, properties that other libraries assume."""

from collections.abc import Mapping, Sequence
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
    patches,
    shape_of,
)
from fd_jax.convert.rules.tables import Place
from fd_jax.errors import ConversionError

STAGE = "encoder/stages/{s}"
BLOCK = f"{STAGE}/blocks/{{b}}"
# The start value of gamma in a network with fresh weights; a file has the trained ones.
_SCALE_START = 1e-6


def follows_a_stage(arch: Arch, place: Place) -> bool:
    """Whether the stage begins with a halving of the grid."""
    del arch
    return place.stage > 0


FOUR_STAGES = need("four stages", lambda arch: len(arch["depths"]) == 4)
KERNELS_OF_7 = need("depthwise kernels of 7 x 7", lambda arch: arch["kernel_size"] == 7)
PATCHES_OF_4 = need("patches of 4 x 4 pixels", lambda arch: arch["patch_size"] == 4)
LAYER_SCALE = need("a layer scale", lambda arch: arch["layer_scale"] is not None)
NO_LAYER_SCALE = need("no layer scale", lambda arch: arch["layer_scale"] is None)
RESPONSE_NORM = need("global response normalisation", lambda arch: arch["grn"])
NO_RESPONSE_NORM = need("no global response normalisation", lambda arch: not arch["grn"])
NO_FINAL_NORM = need(
    "tokens that are not normalised at the end", lambda arch: not arch["final_norm"]
)
ONE_EPSILON = need(
    "the same epsilon in the last norm as in all others",
    lambda arch: arch["final_norm_eps"] in (None, arch["norm_eps"]),
)


def _told(shapes: Shapes, depths: Sequence[int], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    del tensors
    firsts = [BLOCK.format(s=stage, b=0) for stage in range(len(depths))]
    kernels = [shape_of(shapes, f"{first}/dwconv/kernel", 4) for first in firsts]
    sides = {kernel[:2] for kernel in kernels}
    if len(sides) > 1 or len(set(*sides)) > 1:
        raise ConversionError(
            f"its depthwise kernels are {' and '.join(f'{h} x {w}' for h, w in sorted(sides))}; "
            "networks here have square ones of one size"
        )
    patch_size, _ = patches(shapes)
    found = {
        "patch_size": patch_size,
        "widths": [kernel[3] for kernel in kernels],
        "depths": list(depths),
        "kernel_size": kernels[0][0],
        "grn": f"{firsts[0]}/mlp/grn/scale" in shapes,
        "has_gamma": f"{firsts[0]}/gamma" in shapes,
        "final_norm": "encoder/norm/scale" in shapes,
    }
    if "fc_norm/scale" in shapes:
        found["pooling"] = "mean_norm"
    elif found["final_norm"]:
        found["pooling"] = "mean"
    return found


def _asks(told: Mapping[str, Any]) -> tuple[str, ...]:
    del told
    return ("image_size", "activation", "norm_eps", *PIXELS)


def _arch(settled: Settled) -> tuple[dict[str, Any], list[str]]:
    facts = {name: claim.value for name, claim in settled.items()}
    fields = "image_size patch_size widths depths kernel_size grn activation norm_eps final_norm"
    eps = facts.get("final_norm_eps")
    return {
        **{name: facts[name] for name in fields.split()},
        "layer_scale": facts.get("layer_scale", _SCALE_START) if facts["has_gamma"] else None,
        "final_norm_eps": None if eps == facts["norm_eps"] else eps,
    }, []


def _stand_ins(told: Mapping[str, Any]) -> dict[str, Any]:
    return {**STAND_INS, "image_size": told["patch_size"] << len(told["depths"]) - 1}


NETWORK = Network(
    depths=lambda arch: arch["depths"],
    width=lambda arch: arch["widths"][-1],
    positions=lambda arch: "convolutions",
    told=_told,
    asks=_asks,
    arch=_arch,
    stand_ins=_stand_ins,
)
