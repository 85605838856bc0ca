"""BatchNorm over the global batch, with running statistics that are passed in and returned.

Modules of a segmenter hold scale and bias only. A forward pass gets the running statistics as a
nested dict that mirrors the modules, {"mean": [C], "var": [C]} at the place of each BatchNorm, and
returns the new ones. Those of an encoder are `KeptBatchNorm`s, which hold theirs as well, so that
whoever runs a frozen encoder need not know that there are any. In training, statistics are plain
means over all examples: inside of jax.jit, over a batch that is split over devices and hosts, these
are means over the global batch, as in PyTorch's SyncBatchNorm. Examples have no weights here,
because padding exists in evaluation only, where the running statistics are used.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fd_jax.errors import ConfigError
from fd_jax.models.layers import at_least_float32
from fd_jax.typing import PyTree

EPS = 1e-5
MOMENTUM = 0.1  # weight of the new batch in the running statistics


class Statistics:
    """The running statistics of some BatchNorms during one forward pass.

    `statistics["lateral"]["0"]` are those of a part. The object lives within one call: its caller
    passes the old statistics in, and takes the new ones out with `updated`.

    Attributes:
      running: the statistics before this pass, a nested dict.
      training: whether a batch is normalised with its own statistics.
    """

    def __init__(self, running: PyTree, *, training: bool):
        self.running = running
        self.training = training
        self._parts: dict[str, Statistics] = {}

    def __getitem__(self, name: str) -> "Statistics":
        if name not in self._parts:
            self._parts[name] = Statistics(self.running[name], training=self.training)
        return self._parts[name]

    def updated(self) -> PyTree:
        """The statistics after this pass, in the structure of `running`."""
        if not self._parts:
            return self.running
        return self.running | {name: part.updated() for name, part in self._parts.items()}


class BatchNorm(nnx.Module):
    """BatchNorm over batch, height and width, all of it in float32, the result in `dtype`.

    The running variance is the unbiased one, while the batch is normalised with the biased one, as
    in PyTorch's BatchNorm and SyncBatchNorm; epsilon and momentum are their defaults, which
    mmsegmentation's configs keep.
    """

    def __init__(self, width: int, *, dtype: DTypeLike, eps: float = EPS):
        self.width = width
        self.dtype = dtype
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: jax.Array, statistics: Statistics) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C].

        Raises:
          ConfigError: in training, the batch has a single value per channel.
        """
        x = x.astype(at_least_float32(x.dtype))
        if statistics.training:
            mean, var = _moments(x)
            statistics.running = _updated(statistics.running, mean, var, _values_per_channel(x))
        else:
            # A frozen encoder's are in its compute dtype, in which the sum would be rounded.
            mean, var = (statistics.running[name].astype(x.dtype) for name in ("mean", "var"))
        factor = jax.lax.rsqrt(var + self.eps) * self.scale[...]
        return ((x - mean) * factor + self.bias[...]).astype(self.dtype)


class KeptBatchNorm(BatchNorm):
    """A BatchNorm that holds its running statistics, `mean` and `var`, beside scale and bias.

    No gradient reaches them. A pass still gets them from outside, see `kept_statistics`.
    """

    def __init__(self, width: int, *, dtype: DTypeLike, eps: float, scale: float = 1.0):
        super().__init__(width, dtype=dtype, eps=eps)
        self.scale = nnx.Param(jnp.full((width,), scale, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((width,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((width,), jnp.float32))


def is_statistic(path: str) -> bool:
    """Whether a parameter of an encoder is a running statistic, by its path."""
    return path.endswith(("norm/mean", "norm/var"))


def kept_statistics(module: nnx.Module) -> PyTree:
    """The running statistics that the BatchNorms of a module hold, as `Statistics` takes them."""
    stored = _of_norms(module, lambda norm: {"mean": norm.mean[...], "var": norm.var[...]})
    return jax.lax.stop_gradient(stored)


def fresh_statistics(module: nnx.Module) -> PyTree:
    """The running statistics of all BatchNorms in a module before the first step."""
    return _of_norms(
        module, lambda norm: {"mean": jnp.zeros(norm.width), "var": jnp.ones(norm.width)}
    )


def _of_norms(module: nnx.Module, make: Callable[[Any], PyTree]) -> PyTree:
    """What is made of each BatchNorm, in a nested dict that mirrors the modules."""
    found = {}
    for path, part in nnx.iter_modules(module):
        if isinstance(part, BatchNorm):
            node = found
            for name in path:
                node = node.setdefault(str(name), {})
            node |= make(part)
    return found


def _moments(x):
    mean = jnp.mean(x, axis=(0, 1, 2))
    # E[x^2] - E[x]^2 would save a pass over x, and cancels badly where the mean is large.
    return mean, jnp.mean(jnp.square(x - mean), axis=(0, 1, 2))


def _values_per_channel(x) -> int:
    count = x.size // x.shape[-1]
    if count < 2:
        raise ConfigError(
            "BatchNorm got a single value per channel (a batch of one example, pooled to one "
            "pixel), which has no variance; set batch_size to at least 2 per micro-batch"
        )
    return count


def _updated(running, mean, var, count):
    mean, var = jax.lax.stop_gradient((mean, var * (count / (count - 1))))
    return {
        "mean": (1 - MOMENTUM) * running["mean"] + MOMENTUM * mean,
        "var": (1 - MOMENTUM) * running["var"] + MOMENTUM * var,
    }
