"""Convolutions on [B, H, W, C], and what follows them in the parts of a segmenter."""

import functools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from fd_jax.models import layers
from fd_jax.models.segmenter.normalization import BatchNorm, Statistics


def he_normal_fan_out(key, shape, dtype=jnp.float32):
    """Normal(0, 2 / (h * w * out)): how mmcv's ConvModule starts a kernel [h, w, in, out]."""
    fan_out = shape[0] * shape[1] * shape[3]
    return math.sqrt(2 / fan_out) * jax.random.normal(key, shape, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype, grad_dtype: jnp.dtype) -> jax.Array:
    """Convolution of stride 1 with zeros around the image, in `dtype`.

    The gradient of the kernel leaves its matmul in `grad_dtype`, for the reason that
    `layers.linear` gives.

    Args:
      x: [B, H, W, C].
      kernel: [h, w, C, D], h and w odd.
      dtype: of the computation and the result.
      grad_dtype: of the kernel's gradient until it is summed over devices.

    Returns:
      [B, H, W, D].
    """
    del grad_dtype
    return _convolve(x.astype(dtype), kernel.astype(dtype))


def _convolve(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _convolve_forward(x, kernel, dtype, grad_dtype):
    del grad_dtype
    return _convolve(x.astype(dtype), kernel.astype(dtype)), (x, kernel)


def _convolve_backward(dtype, grad_dtype, residuals, g):
    x, kernel = residuals
    # The input's gradient is the convolution with the kernel turned by half a circle.
    turned = kernel[::-1, ::-1].swapaxes(2, 3).astype(dtype)
    arguments = {"size": kernel.shape[:2], "grad_dtype": grad_dtype}
    # XLA for CPUs takes about twice as long for the convolution as for the matmuls.
    dk = jax.lax.platform_dependent(
        x.astype(dtype),
        g,
        cpu=functools.partial(_kernel_gradient_by_matmuls, **arguments),
        default=functools.partial(_kernel_gradient, **arguments),
    )
    return _convolve(g, turned).astype(x.dtype), dk.astype(kernel.dtype)


convolve.defvjp(_convolve_forward, _convolve_backward)


def _kernel_gradient(x, g, *, size, grad_dtype):
    """The gradient of the kernel as a convolution of x with g, where examples are channels."""
    return jax.lax.conv_general_dilated(
        x,
        g,
        (1, 1),
        [(side // 2, side // 2) for side in size],
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=grad_dtype,
    )


def _kernel_gradient_by_matmuls(x, g, *, size, grad_dtype):
    """The same, with one matmul for each place in the kernel: of x, and of g moved the other way.

    x is transposed once, as XLA for CPUs is slower at matmuls that have to do it; the barrier
    keeps the transposition out of them.
    """
    batch, height, width, channels = x.shape
    columns = jax.lax.optimization_barrier(x.reshape(-1, channels).T)
    padded = jnp.pad(g, ((0, 0), *((side // 2, side // 2) for side in size), (0, 0)))

    def place(i, j):
        top, left = size[0] - 1 - i, size[1] - 1 - j
        moved = padded[:, top : top + height, left : left + width]
        rows = moved.reshape(batch * height * width, -1)
        return jnp.matmul(columns, rows, preferred_element_type=grad_dtype)

    return jnp.stack([jnp.stack([place(i, j) for j in range(size[1])]) for i in range(size[0])])


class Conv(nnx.Module):
    """A square convolution of stride 1; kernel [size, size, in, out], bias [out] starting at 0."""

    def __init__(
        self,
        width: int,
        out: int,
        *,
        size: int,
        use_bias: bool,
        kernel_init: nnx.Initializer,
        dtype: jnp.dtype,
        grad_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.grad_dtype = grad_dtype
        shape = (size, size, width, out)
        self.kernel: Any = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out,), jnp.float32)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, in] -> [B, H, W, out] in `dtype`."""
        kernel = self.kernel[...]
        y: jax.Array
        if kernel.shape[:2] == (1, 1):
            y = _rows_times(x, kernel[0, 0], self.dtype, self.grad_dtype)
        else:
            y = convolve(x, kernel, self.dtype, self.grad_dtype)
        return y if self.bias is None else layers.add_parameter(y, self.bias[...])


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
        dtype: jnp.dtype,
        grad_dtype: jnp.dtype = jnp.float32,
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
        four = _rows_times(x, kernel, self.dtype, self.grad_dtype)  # [B, H, W, 2, 2, out]
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
        dtype: jnp.dtype,
        grad_dtype: jnp.dtype = jnp.float32,
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


def _rows_times(x, kernel, dtype, grad_dtype):
    """[..., D] times [D, ...], as one matmul over all pixels."""
    y: jax.Array = layers.linear(x.reshape(-1, x.shape[-1]), kernel, None, dtype, grad_dtype)
    return y.reshape(*x.shape[:-1], *kernel.shape[1:])
