"""Depthwise convolution: every channel has a kernel of its own, and channels do not mix."""

import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fd_jax.models import layers


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, kernel: jax.Array, dtype: DTypeLike, grad_dtype: DTypeLike) -> jax.Array:
    """Depthwise convolution of stride 1 with zeros around the image, in `dtype`.

    The gradient of the kernel leaves its sum over images and places in `grad_dtype`, for the
    reason that `layers.linear` gives.

    Args:
      x: [B, H, W, D].
      kernel: [h, w, 1, D], h and w odd.
      dtype: of the factors and the result.
      grad_dtype: of the kernel's gradient until it is summed over devices.

    Returns:
      [B, H, W, D].
    """
    del grad_dtype
    return _convolve(x.astype(dtype), kernel.astype(dtype))


def _convolve(x, kernel):
    # XLA for CPUs takes several times as long for a convolution with one channel per group.
    return jax.lax.platform_dependent(x, kernel, cpu=_convolve_by_shifts, default=_convolve_by_xla)


def _convolve_by_xla(x, kernel):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3],
    )


def _convolve_by_shifts(x, kernel):
    """The same, one place of the kernel after the other: the moved image times a row, added up."""
    wide = layers.at_least_float32(x.dtype)
    padded = _padded(x, kernel.shape[:2])
    rows = jnp.asarray(kernel, wide).reshape(-1, kernel.shape[3])

    def add(number, total):  # in a loop, since many blocks of so many terms compile for minutes
        return total + _moved(padded, number, kernel.shape[1], x.shape).astype(wide) * rows[number]

    places = kernel.shape[0] * kernel.shape[1]
    return jax.lax.fori_loop(0, places, add, jnp.zeros(x.shape, wide)).astype(x.dtype)


def _padded(x, size):
    """The image [B, H, W, D] with the zeros around it that a kernel of this size reads."""
    return jnp.pad(x, ((0, 0), *((side // 2, side // 2) for side in size), (0, 0)))


def _moved(padded, number, columns, shape):
    """What the place of this number in a kernel, counted row by row, sees of a padded image."""
    return jax.lax.dynamic_slice(padded, (0, number // columns, number % columns, 0), shape)


def _convolve_forward(x, kernel, dtype, grad_dtype):
    del grad_dtype
    return _convolve(x.astype(dtype), kernel.astype(dtype)), (x, kernel)


def _convolve_backward(dtype, grad_dtype, residuals, g):
    x, kernel = residuals
    arguments = {"size": kernel.shape[:2], "grad_dtype": grad_dtype}
    dk = jax.lax.platform_dependent(
        x.astype(dtype),
        g,
        cpu=functools.partial(_kernel_gradient_by_shifts, **arguments),
        default=functools.partial(_kernel_gradient_by_xla, **arguments),
    )
    # The input's gradient is the convolution with the kernel turned by half a circle.
    turned = kernel[::-1, ::-1].astype(dtype)
    return _convolve(g, turned).astype(x.dtype), dk.astype(kernel.dtype)


convolve.defvjp(_convolve_forward, _convolve_backward)


def _kernel_gradient_by_xla(x, g, *, size, grad_dtype):
    """The gradient of the kernel as a convolution of x with g, where examples are channels."""
    return jax.lax.conv_general_dilated(
        x,
        g,
        (1, 1),
        [(side // 2, side // 2) for side in size],
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        batch_group_count=x.shape[3],
        preferred_element_type=grad_dtype,
    )


def _kernel_gradient_by_shifts(x, g, *, size, grad_dtype):
    """The same, one place of the kernel after the other: the moved image times g, summed."""
    padded, g = _padded(x, size), g.astype(grad_dtype)

    def place(number):
        moved = _moved(padded, number, size[1], x.shape)
        return jnp.sum(moved.astype(grad_dtype) * g, axis=(0, 1, 2))

    sums = jax.lax.map(place, jnp.arange(size[0] * size[1]))
    return sums.reshape(*size, 1, -1)


class DepthwiseConv(nnx.Module):
    """A square depthwise convolution of stride 1; kernel [size, size, 1, D], bias [D] from 0."""

    def __init__(
        self,
        width: int,
        *,
        size: int,
        kernel_init: nnx.Initializer,
        dtype: DTypeLike,
        grad_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.grad_dtype = grad_dtype
        shape = (size, size, 1, width)
        self.kernel: Any = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, D] -> [B, H, W, D] in `dtype`."""
        y: jax.Array = convolve(x, self.kernel[...], self.dtype, self.grad_dtype)
        return layers.add_parameter(y, self.bias[...])
