"""The linear layers of attention and MLPs: those that can be updated or quantised one by one."""

from collections.abc import Iterator
from typing import Any

from flax import nnx

from fd_jax.models import layers

# Names of these layers, and of the parts of a block that they are in.
NAMES = ("qkv", "proj", "fc1", "fc2", "gate")
_PARTS = ("attn", "mlp")


def of(network: nnx.Module) -> Iterator[tuple[str, Any]]:
    """The linear layers of attention and MLPs by their paths, sorted."""
    paths = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(network)
        if isinstance(module, layers.Dense) and is_one("/".join(map(str, path)))
    }
    yield from sorted(paths.items())


def is_one(path: str) -> bool:
    """Whether the parameters below this path, such as "blocks/0/attn/qkv", are of such a layer."""
    *_, part, name = ("", *path.split("/"))
    return part in _PARTS and name in NAMES
