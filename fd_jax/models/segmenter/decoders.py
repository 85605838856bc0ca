"""From levels [B, H, W, C] to logits [B, h, w, K] float32.

All decoders have `__call__(levels, statistics, drops)`, and `droppable`, the channels of an example
that dropout can set to zero before the classifier. `drops` is [B, droppable] uniform numbers in
training and None in evaluation.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fd_jax.models.batch_norm import BatchNorm, Statistics
from fd_jax.models.convolution import Conv
from fd_jax.models.layers import truncated_normal
from fd_jax.models.segmenter.convolution import ConvNorm, drop_channels
from fd_jax.models.segmenter.resampling import adaptive_mean, resize

BINS = (1, 2, 3, 6)
CLASSIFIER_INIT = truncated_normal(0.01, 1.0)  # cut at absolute +-1, which cuts nothing


class UPerNet(nnx.Module):
    """Pyramid pooling on the last level, and a top-down path (docs/reference.md#upernet).

    Attributes:
      droppable: the number of channels; see the module.
      dropout: probability that a channel is dropped.
    """

    def __init__(
        self,
        widths: Sequence[int],
        classes: int,
        *,
        channels: int,
        dropout: float,
        dtype: DTypeLike,
        grad_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common: dict[str, Any] = {"dtype": dtype, "grad_dtype": grad_dtype, "rngs": rngs}
        last = len(widths) - 1
        self.droppable = channels
        self.dropout = dropout
        self.pooling = nnx.Dict(
            {str(bins): ConvNorm(widths[last], channels, size=1, **common) for bins in BINS}
        )
        self.bottleneck = ConvNorm(widths[last] + len(BINS) * channels, channels, size=3, **common)
        self.lateral = nnx.Dict(
            {str(i): ConvNorm(widths[i], channels, size=1, **common) for i in range(last)}
        )
        self.output = nnx.Dict(
            {str(i): ConvNorm(channels, channels, size=3, **common) for i in range(last)}
        )
        self.fusion = ConvNorm(len(widths) * channels, channels, size=3, **common)
        self.classifier = _classifier(channels, classes, grad_dtype, rngs)

    def __call__(
        self, levels: Sequence[jax.Array], statistics: Statistics, drops: jax.Array | None
    ) -> jax.Array:
        """Levels from the finest to the coarsest -> logits at the size of the first."""
        *finer, coarsest = levels
        pyramid = [self._pool(coarsest, statistics)]
        for i in reversed(range(len(finer))):
            lateral = self.lateral[str(i)](finer[i], statistics["lateral"][str(i)])
            pyramid.insert(0, lateral + resize(pyramid[0], lateral.shape[1:3]))
        outputs = [
            self.output[str(i)](pyramid[i], statistics["output"][str(i)]) for i in range(len(finer))
        ]
        x = _concatenate([*outputs, pyramid[-1]])
        x = self.fusion(x, statistics["fusion"])
        return self.classifier(drop_channels(x, drops, rate=self.dropout))

    def _pool(self, x: jax.Array, statistics: Statistics) -> jax.Array:
        """The coarsest level with what its means over large areas add to it."""
        pooled = [
            self.pooling[str(bins)](adaptive_mean(x, bins), statistics["pooling"][str(bins)])
            for bins in BINS
        ]
        return self.bottleneck(_concatenate([x, *pooled]), statistics["bottleneck"])


class FCN(nnx.Module):
    """A 3x3 convolution with BatchNorm and ReLU, dropout, and a 1x1 convolution on one level."""

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        channels: int,
        dropout: float,
        dtype: DTypeLike,
        grad_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.droppable = channels
        self.dropout = dropout
        self.hidden = ConvNorm(
            width, channels, size=3, dtype=dtype, grad_dtype=grad_dtype, rngs=rngs
        )
        self.classifier = _classifier(channels, classes, grad_dtype, rngs)

    def __call__(
        self, level: jax.Array, statistics: Statistics, drops: jax.Array | None
    ) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, K]."""
        x = self.hidden(level, statistics["hidden"])
        return self.classifier(drop_channels(x, drops, rate=self.dropout))


class Linear(nnx.Module):
    """BatchNorm and a 1x1 convolution on the last level: DINOv2's protocol, without dropout."""

    droppable = 0

    def __init__(
        self, width: int, classes: int, *, grad_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        self.norm = BatchNorm(width, dtype=jnp.dtype(jnp.float32))
        self.classifier = _classifier(width, classes, grad_dtype, rngs)

    def __call__(
        self, levels: Sequence[jax.Array], statistics: Statistics, drops: jax.Array | None
    ) -> jax.Array:
        """Levels, of which the last one counts, [B, H, W, C] -> [B, H, W, K]."""
        del drops
        return self.classifier(self.norm(levels[-1], statistics["norm"]))


def _classifier(width: int, classes: int, grad_dtype: DTypeLike, rngs: nnx.Rngs) -> Conv:
    """The last 1x1 convolution, in float32, from Normal(0, 0.01)."""
    return Conv(
        width,
        classes,
        size=1,
        use_bias=True,
        kernel_init=CLASSIFIER_INIT,
        dtype=jnp.dtype(jnp.float32),
        grad_dtype=grad_dtype,
        rngs=rngs,
    )


def _concatenate(maps: Sequence[jax.Array]) -> jax.Array:
    """Maps beside each other along channels, all resized to the first."""
    size = maps[0].shape[1:3]
    return jnp.concatenate([resize(x, size) for x in maps], axis=-1)
