"""Low-rank updates of linear layers: x (W + alpha / r A B), where W is held (arXiv 2106.09685).

A network gets them after it is built, so that no family of networks has to know of them. They are
no part of an architecture: `merged` adds them to the kernels when a network is exported.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fd_jax.errors import ConfigError
from fd_jax.models import layers, linear_layers
from fd_jax.typing import PyTree

TARGETS = linear_layers.NAMES  # names of the layers that can have an update


@dataclasses.dataclass(frozen=True)
class Lora:
    """The low-rank updates of a network.

    Attributes:
      rank: columns of A and rows of B.
      alpha: factor of the product A B, times 1 / rank.
      targets: names of the layers that have an update, some of TARGETS.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Factor of the product A B."""
        return self.alpha / self.rank


class LowRank(nnx.Module):
    """The update of one layer: a [D, r] is uniform in +-1/sqrt(D) at the start, b [r, *out] zero.

    That is how the authors' code and peft begin. The gradients of both leave their matmuls in
    `grad_dtype`, see `layers.linear`.
    """

    def __init__(
        self,
        width: int,
        out: tuple[int, ...],
        *,
        lora: Lora,
        dtype: DTypeLike,
        grad_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.scale, self.dtype, self.grad_dtype = lora.scale, dtype, grad_dtype
        bound = 1 / math.sqrt(width)
        drawn = jax.random.uniform(rngs.params(), (width, lora.rank), minval=-bound, maxval=bound)
        self.a: Any = nnx.Param(drawn)
        self.b: Any = nnx.Param(jnp.zeros((lora.rank, *out), jnp.float32))

    def __call__(self, rows: jax.Array) -> jax.Array:
        """What the update adds to the layer's result. [M, D] -> [M, *out] in `dtype`."""
        return self.expand(self.reduce(rows), self.b[...])

    def reduce(self, rows: jax.Array) -> jax.Array:
        """[M, D] -> [M, r], scaled."""
        reduced: jax.Array = layers.linear(rows, self.a[...], None, self.dtype, self.grad_dtype)
        return reduced * self.scale

    def expand(self, reduced: jax.Array, b: jax.Array) -> jax.Array:
        """[M, r] -> [M, ...] by `b` or a part of it, [r, ...]."""
        return layers.linear(reduced, b, None, self.dtype, self.grad_dtype)


def add(
    network: nnx.Module, lora: Lora, *, rngs: nnx.Rngs, trains: Callable[[str], bool]
) -> nnx.Module:
    """Gives the layers of a network their updates.

    Args:
      network: network, which is changed.
      lora: the updates.
      rngs: random keys of the matrices A.
      trains: whether the layer at a path, such as "blocks/0/attn/qkv", gets one.

    Raises:
      ConfigError: the network has no layer of a target's name, or one for which the rank is no
        saving.
    """
    found = list(linear_layers.of(network))
    names = {path.rpartition("/")[2] for path, _ in found}
    if missing := [name for name in lora.targets if name not in names]:
        raise ConfigError(
            f"lora.targets={lora.targets}: the network has no layer {' and no '.join(missing)} in "
            f"its blocks; it has {', '.join(name for name in TARGETS if name in names)}"
        )
    for path, layer in found:
        if path.rpartition("/")[2] in lora.targets and trains(path):
            width, *out = layer.kernel.shape
            _check_rank(lora.rank, path, layer.kernel.shape)
            layer.lora = LowRank(
                width,
                tuple(out),
                lora=lora,
                dtype=layer.dtype,
                grad_dtype=layer.grad_dtype,
                rngs=rngs,
            )
    return network


def merged(params: PyTree, lora: Lora) -> PyTree:
    """The parameters of the plain network that computes the same: W + alpha / r A B.

    Args:
      params: nested dict of numpy or JAX arrays with "lora" beside the "kernel" of a layer.
      lora: what they were made by.
    """
    if not isinstance(params, dict):
        return params
    rest = {name: merged(value, lora) for name, value in params.items() if name != "lora"}
    if "lora" in params:
        a, b = params["lora"]["a"], params["lora"]["b"]
        product = jnp.tensordot(a, b, axes=1, precision="highest")
        rest["kernel"] = params["kernel"] + lora.scale * product
    return rest


def _check_rank(rank: int, path: str, shape: tuple[int, ...]) -> None:
    smaller = min(shape[0], math.prod(shape[1:]))
    if rank >= smaller:
        raise ConfigError(
            f"lora.rank={rank}, but {path} is a matrix {shape[0]} x {math.prod(shape[1:])}, which "
            f"has no higher rank than {smaller}; use less, such as {max(1, smaller // 8)}, or set "
            "lora.rank=0 to train all of it"
        )
