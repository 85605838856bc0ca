"""ConvNeXts: parameter paths, published sizes, properties that other libraries assume."""

from typing import Any

from fd_jax.convert.layout import need
from fd_jax.convert.networks.network import Arch, Network
from fd_jax.convert.rules.tables import Place

NETWORK = Network(
    depths=lambda arch: arch["depths"],
    width=lambda arch: arch["widths"][-1],
    positions=lambda arch: "convolutions",
)

STAGE = "encoder/stages/{s}"
BLOCK = f"{STAGE}/blocks/{{b}}"

SIZES: dict[str, dict[str, Any]] = {
    "T": {"widths": [96, 192, 384, 768], "depths": [3, 3, 9, 3]},
    "S": {"widths": [96, 192, 384, 768], "depths": [3, 3, 27, 3]},
    "B": {"widths": [128, 256, 512, 1024], "depths": [3, 3, 27, 3]},
    "L": {"widths": [192, 384, 768, 1536], "depths": [3, 3, 27, 3]},
}


def follows_a_stage(arch: Arch, place: Place) -> bool:
    """Whether the stage begins with a halving of the grid."""
    del arch
    return place.stage > 0


FOUR_STAGES = need("four stages", lambda arch: len(arch["depths"]) == 4)
KERNELS_OF_7 = need("depthwise kernels of 7 x 7", lambda arch: arch["kernel_size"] == 7)
LAYER_SCALE = need("a layer scale", lambda arch: arch["layer_scale"] is not None)
NO_LAYER_SCALE = need("no layer scale", lambda arch: arch["layer_scale"] is None)
RESPONSE_NORM = need("global response normalisation", lambda arch: arch["grn"])
NO_RESPONSE_NORM = need("no global response normalisation", lambda arch: not arch["grn"])
NO_FINAL_NORM = need(
    "tokens that are not normalised at the end", lambda arch: not arch["final_norm"]
)
