"""Convolutions on [B, H, W, C], with zeros around the image."""

import functools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fd_jax.models import layers


def he_normal_fan_out(key, shape, dtype=jnp.float32):
    """Normal(0, 2 / (h * w * out)): how kernels [h, w, in, out] start in ResNets and in mmcv.

    PyTorch calls it `kaiming_normal_` with the mode "fan_out".
    """
    fan_out = shape[0] * shape[1] * shape[3]
    return math.sqrt(2 / fan_out) * jax.random.normal(key, shape, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve(
    x: jax.Array, kernel: jax.Array, dtype: DTypeLike, grad_dtype: DTypeLike, stride: int = 1
) -> jax.Array:
    """Convolution with zeros around the image, in `dtype`.

    The gradient of the kernel leaves its matmul in `grad_dtype`, for the reason that
    `layers.linear` gives.

    Args:
      x: [B, H, W, C].
      kernel: [h, w, C, D], h and w odd.
      dtype: of the computation and the result.
      grad_dtype: of the kernel's gradient until it is summed over devices.
      stride: along both axes. The first place of the kernel is centred on the first pixel, as with
        PyTorch's padding of half the kernel; "SAME" of other libraries shifts it for even sides.

    Returns:
      [B, ceil(H / stride), ceil(W / stride), D].
    """
    del grad_dtype
    return _convolve(x.astype(dtype), kernel.astype(dtype), stride)


def _convolve(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(side // 2, side // 2) for side in kernel.shape[:2]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _convolve_forward(x, kernel, dtype, grad_dtype, stride):
    del grad_dtype
    return _convolve(x.astype(dtype), kernel.astype(dtype), stride), (x, kernel)


def _convolve_backward(dtype, grad_dtype, stride, residuals, g):
    x, kernel = residuals
    size = kernel.shape[:2]
    # The input's gradient is the convolution with the kernel turned by half a circle, of the output
    # with as many zeros between its pixels as the stride leaves out.
    turned = kernel[::-1, ::-1].swapaxes(2, 3).astype(dtype)
    # XLA for CPUs takes about twice as long for the convolution as for the matmuls.
    arguments = {"size": size, "grad_dtype": grad_dtype, "stride": stride}
    dk = jax.lax.platform_dependent(
        x.astype(dtype),
        g,
        cpu=functools.partial(_kernel_gradient_by_matmuls, **arguments),
        default=functools.partial(_kernel_gradient, **arguments),
    )
    dx = jax.lax.conv_general_dilated(
        g,
        turned,
        (1, 1),
        [
            (side // 2, side // 2 + _rest(length, stride))
            for side, length in zip(size, x.shape[1:3], strict=True)
        ],
        lhs_dilation=(stride, stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return dx.astype(x.dtype), dk.astype(kernel.dtype)


convolve.defvjp(_convolve_forward, _convolve_backward)


def _rest(length: int, stride: int) -> int:
    """The pixels after the one on which the last place of a kernel is centred."""
    return (length - 1) % stride


def _kernel_gradient(x, g, *, size, grad_dtype, stride=1):
    """The gradient of the kernel as a convolution of x with g, where examples are channels."""
    return jax.lax.conv_general_dilated(
        x,
        g,
        (1, 1),
        [
            (side // 2, side // 2 - _rest(length, stride))
            for side, length in zip(size, x.shape[1:3], strict=True)
        ],
        rhs_dilation=(stride, stride),
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=grad_dtype,
    )


def _kernel_gradient_by_matmuls(x, g, *, size, grad_dtype, stride=1):
    """The same, with one matmul for each place in the kernel: of x, and of g moved the other way.

    x is transposed once, as XLA for CPUs is slower at matmuls that have to do it; the barrier
    keeps the transposition out of them. With a stride, places see different pixels.
    """
    if stride > 1:
        return _strided_kernel_gradient_by_matmuls(x, g, size, grad_dtype, stride)
    batch, height, width, channels = x.shape
    columns = jax.lax.optimization_barrier(x.reshape(-1, channels).T)
    padded = jnp.pad(g, ((0, 0), *((side // 2, side // 2) for side in size), (0, 0)))

    def place(i, j):
        top, left = size[0] - 1 - i, size[1] - 1 - j
        moved = padded[:, top : top + height, left : left + width]
        rows = moved.reshape(batch * height * width, -1)
        return jnp.matmul(columns, rows, preferred_element_type=grad_dtype)

    return jnp.stack([jnp.stack([place(i, j) for j in range(size[1])]) for i in range(size[0])])


def _strided_kernel_gradient_by_matmuls(x, g, size, grad_dtype, stride):
    """The same of what a place in the kernel sees of x, and of g."""
    padded = jnp.pad(x, ((0, 0), *((side // 2, side // 2) for side in size), (0, 0)))
    rows = g.reshape(-1, g.shape[-1])
    height, width = ((length - 1) * stride + 1 for length in g.shape[1:3])

    def place(i, j):
        seen = padded[:, i : i + height : stride, j : j + width : stride]
        columns = seen.reshape(-1, x.shape[-1]).T
        return jnp.matmul(columns, rows, preferred_element_type=grad_dtype)

    return jnp.stack([jnp.stack([place(i, j) for j in range(size[1])]) for i in range(size[0])])


class Conv(nnx.Module):
    """A square convolution; kernel [size, size, in, out], bias [out] starting at 0."""

    def __init__(
        self,
        width: int,
        out: int,
        *,
        size: int,
        stride: int = 1,
        use_bias: bool,
        kernel_init: nnx.Initializer,
        dtype: DTypeLike,
        grad_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.stride = stride
        self.dtype = dtype
        self.grad_dtype = grad_dtype
        shape = (size, size, width, out)
        self.kernel: Any = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out,), jnp.float32)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, in] -> [B, ceil(H / stride), ceil(W / stride), out] in `dtype`."""
        kernel = self.kernel[...]
        y: jax.Array
        if kernel.shape[:2] == (1, 1):
            seen = x if self.stride == 1 else x[:, :: self.stride, :: self.stride]
            y = rows_times(seen, kernel[0, 0], self.dtype, self.grad_dtype)
        else:
            y = convolve(x, kernel, self.dtype, self.grad_dtype, self.stride)
        return y if self.bias is None else layers.add_parameter(y, self.bias[...])


def rows_times(
    x: jax.Array, kernel: jax.Array, dtype: DTypeLike, grad_dtype: DTypeLike
) -> jax.Array:
    """[..., D] times [D, ...], as one matmul over all pixels, see `layers.linear`."""
    y: jax.Array = layers.linear(x.reshape(-1, x.shape[-1]), kernel, None, dtype, grad_dtype)
    return y.reshape(*x.shape[:-1], *kernel.shape[1:])


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of 3 x 3 pixels around every second one. [B, H, W, C] -> [B, ceil(H/2), ...]"""
    around = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), around)


def mean_of_squares(x: jax.Array) -> jax.Array:
    """The mean of every 2 x 2 pixels; what is left over at the end has squares of its own.

    [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C], computed in float32.
    """
    batch, height, width, channels = x.shape
    wide = x.astype(layers.at_least_float32(x.dtype))
    wide = jnp.pad(wide, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    squares = wide.reshape(batch, -(-height // 2), 2, -(-width // 2), 2, channels)
    rows, columns = (
        jnp.minimum(2, length - jnp.arange(0, length, 2)) for length in (height, width)
    )
    count = (rows[:, None] * columns)[..., None].astype(wide.dtype)
    return (jnp.sum(squares, axis=(2, 4)) / count).astype(x.dtype)
