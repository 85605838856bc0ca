"""What conversion knows about the networks of fd_jax: sizes, paths, needs of other libraries."""

from collections.abc import Mapping
import functools
import json

from fd_jax import model_folder
from fd_jax.convert.networks import swin, vit
from fd_jax.convert.networks.network import Network
from fd_jax.convert.rules.transforms import Shape
from fd_jax.models.spec import ModelSpec

NETWORKS: dict[str, Network] = {"vit": vit.NETWORK, "swin": swin.V1, "swin_v2": swin.V2}


def depths(spec: ModelSpec) -> tuple[int, ...]:
    """Blocks of each stage; a network without stages has one."""
    return tuple(NETWORKS[spec.family].depths(spec.arch))


def width(spec: ModelSpec) -> int:
    """Channels of the feature map."""
    return NETWORKS[spec.family].width(spec.arch)


def positions(spec: ModelSpec) -> str:
    """How the network knows where a token is, in one word."""
    return NETWORKS[spec.family].positions(spec.arch)


def shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Shape of every parameter that a model folder of this network may hold, by path."""
    return _shapes(spec.family, json.dumps(spec.arch))


@functools.lru_cache(maxsize=64)
def _shapes(family: str, arch: str) -> dict[str, Shape]:
    spec = ModelSpec(family, json.loads(arch))
    channels = width(spec)
    encoder: Mapping[str, Shape] = model_folder.flat_shapes({"encoder": spec.abstract()[1]})
    return {
        **encoder,
        "projector/kernel": (channels, "D"),
        "projector/bias": ("D",),
        "head/kernel": (channels, "K"),
        "head/bias": ("K",),
        "fc_norm/scale": (channels,),
        "fc_norm/bias": (channels,),
    }
