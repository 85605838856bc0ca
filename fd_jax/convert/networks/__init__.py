"""What conversion knows about the networks of fd_jax: sizes, paths, needs of other libraries."""

from collections.abc import Mapping
import functools
import json
import math

from fd_jax import model_folder
from fd_jax.convert.containers.tensors import Container
from fd_jax.convert.networks import convnext, resnet, segmenter, swin, vit
from fd_jax.convert.networks.network import Network
from fd_jax.convert.rules.tables import Table
from fd_jax.convert.rules.transforms import Shape
from fd_jax.models.sizes import patch_grid
from fd_jax.models.spec import ModelSpec

_MOST = 1 << 20  # larger numbers in a description belong to no network
NETWORKS: dict[str, Network] = {
    "vit": vit.NETWORK,
    "swin": swin.V1,
    "swin_v2": swin.V2,
    "convnext": convnext.NETWORK,
    "resnet": resnet.NETWORK,
}


def depths(spec: ModelSpec) -> tuple[int, ...]:
    """Blocks of each stage; a network without stages has one."""
    return tuple(NETWORKS[spec.family].depths(spec.arch))


def width(spec: ModelSpec) -> int:
    """Channels of the feature map."""
    return spec.arch.get("lift") or NETWORKS[spec.family].width(spec.arch)


def positions(spec: ModelSpec) -> str:
    """How the network knows where a token is, in one word."""
    return NETWORKS[spec.family].positions(spec.arch)


def shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Shape of every parameter that a model folder of this network may hold, by path."""
    parts = json.dumps(spec.segmenter), json.dumps(spec.pool)
    return _shapes(spec.family, json.dumps(spec.arch), *parts)


def check_sizes(spec: ModelSpec, container: Container) -> None:
    """Bounds what a damaged description can make the network's definition cost.

    Raises:
      ValueError: a size in it is out of bounds, or too large for the tensors of the file.
    """
    arch = spec.arch
    numbers = [n for value in arch.values() for n in (value if type(value) is list else [value])]
    numbers = [number for number in numbers if isinstance(number, int)]
    if min(numbers, default=0) < 0 or max(numbers, default=0) > _MOST:
        raise ValueError("a size in it is out of bounds")
    blocks = sum(depths(spec))
    if blocks > len(container.tensors):
        raise ValueError(f"{blocks} blocks, but {len(container.tensors)} tensors")
    patches = math.prod(patch_grid(arch["image_size"], arch["patch_size"]))
    if patches > max(map(math.prod, (t.shape for t in container.tensors.values())), default=0):
        raise ValueError(f"{patches} positions, more than any tensor in the file has numbers")


def segmenter_table(table: Table, spec: ModelSpec, container: Container) -> Table:
    """The rules of a table for segmenters of several kinds that concern the one in a file.

    Raises:
      ValueError: see `check_sizes`.
    """
    check_sizes(spec, container)
    return segmenter.narrowed(table, set(shapes(spec)), spec.arch)


@functools.lru_cache(maxsize=64)
def _shapes(family: str, arch: str, segmenter: str, pool: str) -> dict[str, Shape]:
    parts = {"segmenter": json.loads(segmenter), "pool": json.loads(pool)}
    spec = ModelSpec(family, json.loads(arch), **parts)
    channels = width(spec)
    described: Mapping[str, Shape] = model_folder.flat_shapes(model_folder.described(spec))
    return {
        **described,
        "projector/kernel": (channels, "D"),
        "projector/bias": ("D",),
        "head/kernel": (channels, "K"),
        "head/bias": ("K",),
        "fc_norm/scale": (channels,),
        "fc_norm/bias": (channels,),
    }
