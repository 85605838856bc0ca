"""The layers the vision transformers are made of.

Modules hold parameters and nothing else. What is random in a forward pass (which examples drop a
residual branch) comes in as an array of uniform numbers, one row per example, so that the same
numbers fall on the same image whatever the mesh, the host count or the micro-batching.
"""

from collections.abc import Callable
import functools
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from fd_jax.models import narrow

Activation = Literal["gelu_erf", "gelu_tanh", "quick_gelu", "silu", "relu"]


def _gelu_erf(x: jax.Array) -> jax.Array:
    # Not jax.nn.gelu, which computes 1 + erf as erfc. XLA has an instruction for erf only; of erfc
    # it computes both halves of the range for every element, which takes a GPU three times as long
    # as moving the array. The two differ by rounding, where GELU is nearly zero.
    return 0.5 * x * (1 + jax.lax.erf(x * np.asarray(np.sqrt(0.5), x.dtype)))


# Functions of float32. The names are spelled out because libraries disagree on what "gelu" means.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_erf": _gelu_erf,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": lambda x: x * jax.nn.sigmoid(x),
    "relu": jax.nn.relu,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def activate(x: jax.Array, activation: Activation) -> jax.Array:
    """An activation, any shape, computed in float32; the result and its gradient in `x`'s dtype.

    The backward pass keeps the input and nothing else. Left to itself, XLA for TPUs keeps parts of
    the error function beside it, in float32.
    """
    wide = x.astype(at_least_float32(x.dtype))
    return ACTIVATIONS[activation](wide).astype(x.dtype)


def _activate_forward(x, activation):
    return activate(x, activation), x


def _activate_backward(activation, x, g):
    # Without the barrier XLA sees that the forward pass computed much of this, and stores it.
    wide = jax.lax.optimization_barrier(x).astype(at_least_float32(x.dtype))
    # The slope first and one product with the gradient at the end: for a GPU, XLA then makes one
    # kernel of the whole, and of the sum over rows that the bias before the activation needs.
    _, slope = jax.jvp(ACTIVATIONS[activation], (wide,), (jnp.ones_like(wide),))
    return ((g.astype(wide.dtype) * slope).astype(x.dtype),)


activate.defvjp(_activate_forward, _activate_backward)


def truncated_normal(std: float, limit: float) -> nnx.Initializer:
    """Normal(0, std) cut at +-limit and not rescaled, so that what results is narrower."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding  # parameters are created unsharded here; sharding.py places them
        bound = limit / std
        if bound > 6:
            # In float32 the inverse error function reaches infinity for a draw in 2^24, and the
            # cut would turn that into a weight at the limit, a hundred deviations out.
            return std * jax.random.normal(key, shape, dtype)
        return std * jax.random.truncated_normal(key, -bound, bound, shape, dtype)

    return init


def scaled(init: nnx.Initializer, factor: float) -> nnx.Initializer:
    """The initialiser `init` times a constant."""
    return lambda key, shape, dtype=jnp.float32, **kwargs: factor * init(key, shape, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float, dtype: DTypeLike
) -> jax.Array:
    """LayerNorm over channels, computed in float32.

    The backward pass keeps the input, and mean and deviation of each row. Left to itself, XLA for
    GPUs writes the normalised input times the gradient in float32, to sum it over rows afterwards.

    Args:
      x: [..., D].
      scale: [D] float32.
      bias: [D] float32.
      eps: added to the variance.
      dtype: of the result.
    """
    return _layer_norm_forward(x, scale, bias, eps, dtype)[0]


def _layer_norm_forward(x, scale, bias, eps, dtype):
    wide = x.astype(at_least_float32(x.dtype))
    mean = jnp.mean(wide, axis=-1)
    centred = wide - mean[..., None]  # not E[x^2] - E[x]^2, which cancels where tokens share a part
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1) + eps)
    y = centred * (rstd[..., None] * scale) + bias
    return y.astype(dtype), (x, mean, rstd, scale)


def _layer_norm_backward(eps, dtype, residuals, g):
    del eps, dtype
    x, mean, rstd, scale = residuals
    # Without the barrier XLA computes both anew from the rows, in every kernel that needs them.
    mean, rstd = jax.lax.optimization_barrier((mean, rstd))
    normalized = (x.astype(mean.dtype) - mean[..., None]) * rstd[..., None]
    g = g.astype(mean.dtype)
    rows = tuple(range(x.ndim - 1))
    scaled = g * scale
    shared = jnp.mean(scaled, axis=-1)[..., None]
    along = jnp.mean(scaled * normalized, axis=-1)[..., None]
    dx = rstd[..., None] * (scaled - shared - normalized * along)
    return dx.astype(x.dtype), jnp.sum(g * normalized, axis=rows), jnp.sum(g, axis=rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nnx.Module):
    """LayerNorm over channels with scale and bias [D], see `layer_norm`.

    Flax's casts scale and bias to the dtype of the result, so that their gradients would be summed
    over rows and devices in it.
    """

    def __init__(self, width: int, *, eps: float, dtype: DTypeLike, rngs: nnx.Rngs):
        self.eps = eps
        self.dtype = dtype
        # Two keys go by unused, as in flax's, so that a seed gives the weights it always gave.
        for _ in ("scale", "bias"):
            rngs.params()
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D] in `dtype`."""
        return layer_norm(x, self.scale[...], self.bias[...], self.eps, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def linear(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, dtype: DTypeLike, grad_dtype: DTypeLike
) -> jax.Array:
    """X @ kernel + bias in `dtype`, with parameter gradients summed in `grad_dtype`.

    Left to itself, differentiation casts the gradient to `dtype` before it is summed over the
    devices, because the cast of the float32 master lies inside. Here the weight gradient leaves
    its matmul in `grad_dtype`, so the sum over devices is taken in it.

    Args:
      x: [M, D].
      kernel: [D, ...].
      bias: the trailing shape of `kernel`, or None.
      dtype: of the matmul and the result.
      grad_dtype: of the gradients of `kernel` and `bias` until they are summed.
    """
    del grad_dtype
    return _affine(x, kernel, bias, dtype)


def _affine(x, kernel, bias, dtype):
    y = jnp.tensordot(x.astype(dtype), kernel.astype(dtype), axes=1)
    return y if bias is None else y + bias.astype(dtype)


def _linear_forward(x, kernel, bias, dtype, grad_dtype):
    del grad_dtype
    # Not `linear` itself: a remat policy that keeps matmuls does not look into a custom_vjp.
    return _affine(x, kernel, bias, dtype), (x, kernel, bias)


def _linear_backward(dtype, grad_dtype, residuals, g):
    x, kernel, bias = residuals
    out_axes = tuple(range(1, g.ndim))
    kernel_axes = tuple(range(1, kernel.ndim))
    dx = jnp.tensordot(g, kernel.astype(dtype), axes=(out_axes, kernel_axes))
    dw = jnp.tensordot(x.astype(dtype), g, axes=(0, 0), preferred_element_type=grad_dtype)
    db = None if bias is None else jnp.sum(g, axis=0, dtype=grad_dtype).astype(bias.dtype)
    return dx.astype(x.dtype), dw.astype(kernel.dtype), db


linear.defvjp(_linear_forward, _linear_backward)


def multiply(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    dtype: DTypeLike,
    grad_dtype: DTypeLike,
) -> jax.Array:
    """`linear`; or `narrow.linear`, without a gradient, of a kernel that has factors `scale`."""
    if scale is None:
        return linear(x, kernel, bias, dtype, grad_dtype)
    return narrow.linear(x, kernel, scale, bias, dtype)


class Dense(nnx.Module):
    """A linear layer on tokens: kernel [D, *out], float32 master, matmul in `dtype`.

    Attributes:
      lora: a low-rank update of the kernel, see `lora.LowRank`; None without one.
      kernel_scale: factors of a kernel of narrow numbers, see `quantized`; None for another.
    """

    lora: Any = None
    kernel_scale: Any = None

    def __init__(
        self,
        width: int,
        out: int | tuple[int, ...],
        *,
        use_bias: bool = True,
        dtype: DTypeLike,
        grad_dtype: DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ):
        out = (out,) if isinstance(out, int) else out
        self.dtype = dtype
        self.grad_dtype = grad_dtype
        self.kernel: Any = nnx.Param(kernel_init(rngs.params(), (width, *out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out, jnp.float32)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., *out] in `dtype`.

        All leading axes become one, so that a step is made of plain [M, D] matmuls. Numerically
        the same; XLA:CPU otherwise fuses every later residual gradient into a transposed copy of
        the weight gradient's operand, which makes a step of ViT-B a third slower.
        """
        bias = None if self.bias is None else self.bias[...]
        rows = x.reshape(-1, x.shape[-1])
        y = multiply(rows, self.kernel[...], self.scale, bias, self.dtype, self.grad_dtype)
        if self.lora is not None:
            y = y + self.lora(rows)
        return y.reshape(*x.shape[:-1], *y.shape[1:])

    @property
    def scale(self) -> jax.Array | None:
        """The factors of a narrow kernel, [*out] float32; None for another."""
        return None if self.kernel_scale is None else self.kernel_scale[...]


def drop_path(branch: jax.Array, uniform: jax.Array | None, *, rate: float) -> jax.Array:
    """Drops a residual branch for whole examples and rescales the rest (stochastic depth).

    Args:
      branch: [B, ..., D], or [B * N, D] with the rows of an example together.
      uniform: [B] numbers in [0, 1), or None in evaluation.
      rate: probability of dropping.
    """
    if uniform is None or rate == 0.0:
        return branch
    keep = 1.0 - rate
    kept = jnp.floor(keep + uniform).astype(branch.dtype)
    rows = jnp.broadcast_to(kept[:, None], (len(kept), len(branch) // len(kept)))
    return branch * rows.reshape(-1, *(1,) * (branch.ndim - 1)) / keep


def add_parameter(x: jax.Array, parameter: jax.Array) -> jax.Array:
    """X + parameter in float32, back in the dtype of `x`; so its gradient is summed in float32."""
    return (x.astype(at_least_float32(x.dtype)) + parameter).astype(x.dtype)


def scale_by_parameter(x: jax.Array, parameter: jax.Array) -> jax.Array:
    """X * parameter in float32, back in the dtype of `x`."""
    return (x.astype(at_least_float32(x.dtype)) * parameter).astype(x.dtype)


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """Where sums and statistics are taken: float32, or float64 where a test runs in it."""
    return jnp.promote_types(dtype, jnp.float32)


class PatchEmbed(nnx.Module):
    """Non-overlapping patches to tokens: a strided convolution written as a matmul.

    As such a convolution does, it does not read what remains at the right and at the bottom of an
    image that patches do not fill.
    """

    def __init__(
        self,
        patch_size: int,
        width: int,
        *,
        channels: int = 3,
        use_bias: bool,
        dtype: DTypeLike,
        grad_dtype: DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ):
        self.patch_size = patch_size
        self.dtype = dtype
        self.grad_dtype = grad_dtype
        shape = (patch_size, patch_size, channels, width)  # HWIO
        self.kernel: Any = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32)) if use_bias else None

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, (H//P)*(W//P), D], row-major."""
        p = self.patch_size
        if images.shape[1] % p or images.shape[2] % p:
            images = images[:, : images.shape[1] // p * p, : images.shape[2] // p * p]
        batch, height, width, channels = images.shape
        x = images.reshape(batch, height // p, p, width // p, p, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, p * p * channels)
        kernel = self.kernel[...].reshape(p * p * channels, -1)
        bias = None if self.bias is None else self.bias[...]
        y: jax.Array = linear(x.astype(self.dtype), kernel, bias, self.dtype, self.grad_dtype)
        return y.reshape(batch, -1, y.shape[-1])


def zeros(width: int) -> nnx.Param:
    """A float32 parameter [D] that starts at zero."""
    return nnx.Param(jnp.zeros((width,), jnp.float32))
