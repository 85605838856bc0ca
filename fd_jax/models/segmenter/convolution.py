"""Convolutions of a segmenter, and what follows them."""

import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fd_jax.models import layers
from fd_jax.models.batch_norm import BatchNorm, Statistics
from fd_jax.models.convolution import Conv, he_normal_fan_out, rows_times


class Deconv(nnx.Module):
    """A transposed 2x2 convolution of stride 2: each pixel becomes four, as one matmul.

    Kernel [2, 2, in, out]: [i, j] gives the pixel in row i and column j of the four. Kernel and
    bias start uniform in +-1/sqrt(4 * out), PyTorch's default, which BEiT's neck keeps.
    """

    def __init__(
        self,
        width: int,
        out: int,
        *,
        dtype: DTypeLike,
        grad_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        bound = 1 / math.sqrt(4 * out)

        def uniform(*shape):
            return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))

        self.dtype = dtype
        self.grad_dtype = grad_dtype
        self.kernel: Any = uniform(2, 2, width, out)
        self.bias: Any = uniform(out)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, in] -> [B, 2H, 2W, out] in `dtype`."""
        batch, height, width = x.shape[:3]
        kernel = self.kernel[...].transpose(2, 0, 1, 3)
        four = rows_times(x, kernel, self.dtype, self.grad_dtype)  # [B, H, W, 2, 2, out]
        y = four.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, -1)
        return layers.add_parameter(y, self.bias[...])


class ConvNorm(nnx.Module):
    """A convolution without bias, BatchNorm, ReLU."""

    def __init__(
        self,
        width: int,
        out: int,
        *,
        size: int,
        dtype: DTypeLike,
        grad_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(
            width,
            out,
            size=size,
            use_bias=False,
            kernel_init=he_normal_fan_out,
            dtype=dtype,
            grad_dtype=grad_dtype,
            rngs=rngs,
        )
        self.norm = BatchNorm(out, dtype=dtype)

    def __call__(self, x: jax.Array, statistics: Statistics) -> jax.Array:
        """[B, H, W, in] -> [B, H, W, out]."""
        return jax.nn.relu(self.norm(self.conv(x), statistics["norm"]))


def drop_channels(x: jax.Array, uniform: jax.Array | None, *, rate: float) -> jax.Array:
    """Sets whole channels of an example to zero and rescales the rest (PyTorch's Dropout2d).

    Args:
      x: [B, H, W, C].
      uniform: [B, C] numbers in [0, 1), or None in evaluation.
      rate: probability of dropping.
    """
    if uniform is None or rate == 0.0:
        return x
    factor = jnp.where(uniform >= rate, 1 / (1 - rate), 0.0)
    return x * factor[:, None, None].astype(x.dtype)
