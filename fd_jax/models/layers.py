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
import numpy as np

Activation = Literal["gelu_erf", "gelu_tanh", "quick_gelu"]
AttentionKind = Literal["xla", "dot_product"]
QkvBias = Literal["qkv", "qv", "none"]

# The names are spelled out because libraries disagree on what "gelu" means.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def activate(x: jax.Array, activation: Activation) -> jax.Array:
    """An activation, any shape; the backward pass keeps its input and nothing else.

    Left to itself, XLA for TPUs keeps parts of the error function beside it, in float32.
    """
    return ACTIVATIONS[activation](x)


def _activate_forward(x, activation):
    return ACTIVATIONS[activation](x), x


def _activate_backward(activation, x, g):
    # Without the barrier XLA sees that the forward pass computed much of this, and stores it.
    x = jax.lax.optimization_barrier(x)
    return jax.vjp(ACTIVATIONS[activation], x)[1](g)


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


class LayerNorm(nnx.LayerNorm):
    """LayerNorm over channels, all of it in float32, the result in `result_dtype`.

    Flax casts scale and bias to the dtype of the result, so that their gradients would be summed
    over rows and devices in it.
    """

    def __init__(self, width: int, *, eps: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.result_dtype = dtype
        # E[x^2] - E[x]^2 (flax's default) cancels badly on tokens with a large common part.
        super().__init__(
            width,
            epsilon=eps,
            use_fast_variance=False,
            dtype=at_least_float32(dtype),
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        return super().__call__(x).astype(self.result_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def linear(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, dtype: jnp.dtype, grad_dtype: jnp.dtype
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


class Dense(nnx.Module):
    """A linear layer on tokens: kernel [D, *out], float32 master, matmul in `dtype`."""

    def __init__(
        self,
        width: int,
        out: int | tuple[int, ...],
        *,
        use_bias: bool = True,
        dtype: jnp.dtype,
        grad_dtype: jnp.dtype = jnp.float32,
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
        y: jax.Array = linear(rows, self.kernel[...], bias, self.dtype, self.grad_dtype)
        return y.reshape(*x.shape[:-1], *y.shape[1:])


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


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """Where sums and statistics are taken: float32, or float64 where a test runs in it."""
    return jnp.promote_types(dtype, jnp.float32)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None,
    scale: float,
    kind: AttentionKind,
) -> jax.Array:
    """Softmax attention, the one function behind which implementations are exchanged.

    Args:
      q: [B, N, A, d] queries; `k` and `v` have the same shape.
      k: keys.
      v: values.
      bias: [A, N, N] or [G, A, N, N] float32, added to the logits, or None. G divides B, and
        bias g belongs to the rows g, g + G, g + 2G, ... (windows of one image are G rows).
      scale: factor on q k^T.
      kind: "xla" writes the einsums out; "dot_product" calls `jax.nn.dot_product_attention`, which
        picks a fused kernel where the device has one. Equal within rounding.

    Returns:
      [B, N, A, d] in the dtype of `v`.
    """
    if kind == "dot_product":
        if bias is not None:
            bias = bias.reshape((-1, *bias.shape[-3:])).astype(q.dtype)
            if bias.shape[0] > 1:
                bias = jnp.tile(bias, (q.shape[0] // bias.shape[0], 1, 1, 1))
        return jax.nn.dot_product_attention(q, k, v, bias=bias, scale=scale)
    return softmax_average(attention_logits(q, k, bias=bias, scale=scale), v)


def attention_logits(
    q: jax.Array, k: jax.Array, *, bias: jax.Array | None, scale: float
) -> jax.Array:
    """What the softmax over keys is taken of, float32; `bias` as in `attend`.

    q, k: [B, N, A, d] -> [B, A, N, N].
    """
    wide = at_least_float32(q.dtype)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q * scale, k, preferred_element_type=wide)
    if bias is None:
        return logits
    grouped = logits.reshape(-1, *bias.shape) if bias.ndim == 4 else logits
    return (grouped + bias).reshape(logits.shape)


@jax.custom_vjp
def softmax_average(logits: jax.Array, v: jax.Array) -> jax.Array:
    """Averages of values, weighted by the softmax of logits over keys.

    Where a gradient is taken, the weights are rounded to the dtype of `v`, summed after that, and
    their sum divides at the end. So they sum to one however coarse that dtype is, and the backward
    pass, which keeps them and no logits, lets nothing through that all keys share.

    Args:
      logits: [B, A, N, N] float32.
      v: [B, N, A, d].

    Returns:
      [B, N, A, d] in the dtype of `v`.
    """
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def _softmax_average_forward(logits, v):
    finfo = jnp.finfo(v.dtype)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    # Explicit, as XLA may skip the rounding of a mere cast where it sums.
    weights = jax.lax.reduce_precision(weights, finfo.nexp, finfo.nmant)
    total = jnp.sum(weights, axis=-1)  # [B, A, N]
    weights = weights.astype(v.dtype)
    average = _per_query(jnp.einsum("bhqk,bkhd->bqhd", weights, v), total)
    return average, (weights, total, v)


def _softmax_average_backward(residuals, g):
    weights, total, v = residuals
    g = _per_query(g, total)
    dv = jnp.einsum("bhqk,bqhd->bkhd", weights, g)
    dp = jnp.einsum("bqhd,bkhd->bhqk", g, v).astype(total.dtype)
    w = jax.lax.optimization_barrier(weights).astype(total.dtype)  # as in `_activate_backward`
    mean = jnp.sum(w * dp, axis=-1) / total
    return w * (dp - mean[..., None]), dv


def _per_query(x, total):
    """Divides [B, N, A, d] by [B, A, N] in the latter's dtype; the result in the former's."""
    return (x.astype(total.dtype) / total.swapaxes(1, 2)[..., None]).astype(x.dtype)


softmax_average.defvjp(_softmax_average_forward, _softmax_average_backward)


class PatchEmbed(nnx.Module):
    """Non-overlapping patches to tokens: a strided convolution written as a matmul."""

    def __init__(
        self,
        patch_size: int,
        width: int,
        *,
        use_bias: bool,
        dtype: jnp.dtype,
        grad_dtype: jnp.dtype = jnp.float32,
        kernel_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ):
        self.patch_size = patch_size
        self.dtype = dtype
        self.grad_dtype = grad_dtype
        shape = (patch_size, patch_size, 3, width)  # HWIO
        self.kernel: Any = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32)) if use_bias else None

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> [B, (H/P)*(W/P), D], row-major."""
        p = self.patch_size
        batch, height, width, channels = images.shape
        x = images.reshape(batch, height // p, p, width // p, p, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, p * p * channels)
        kernel = self.kernel[...].reshape(p * p * channels, -1)
        bias = None if self.bias is None else self.bias[...]
        y: jax.Array = linear(x.astype(self.dtype), kernel, bias, self.dtype, self.grad_dtype)
        return y.reshape(batch, -1, y.shape[-1])


class Mlp(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Activation,
        dtype: jnp.dtype,
        grad_dtype: jnp.dtype = jnp.float32,
        kernel_init: nnx.Initializer,
        out_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        common = {"dtype": dtype, "grad_dtype": grad_dtype, "rngs": rngs}
        self.fc1 = Dense(width, hidden, kernel_init=kernel_init, **common)
        self.fc2 = Dense(hidden, width, kernel_init=out_init, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        return self.fc2(activate(self.fc1(x), self.activation))


class Attention(nnx.Module):
    """Multi-head self-attention; one qkv kernel [D, 3, D] (axis 1: q, k, v; head-major)."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qkv_bias: QkvBias,
        rel_pos_bias: Callable[[], jax.Array] | None,
        kind: AttentionKind,
        dtype: jnp.dtype,
        grad_dtype: jnp.dtype = jnp.float32,
        kernel_init: nnx.Initializer,
        out_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.kind: AttentionKind = kind
        common = {"dtype": dtype, "grad_dtype": grad_dtype, "rngs": rngs}
        self.qkv = Dense(width, (3, width), use_bias=False, kernel_init=kernel_init, **common)
        # Separate vectors, since which of them exist differs between families and since weight
        # decay spares tensors of one dimension.
        self.q_bias = None if qkv_bias == "none" else _zeros(width)
        self.k_bias = _zeros(width) if qkv_bias == "qkv" else None
        self.v_bias = None if qkv_bias == "none" else _zeros(width)
        self.rel_pos_bias = rel_pos_bias
        self.proj = Dense(width, width, kernel_init=out_init, **common)

    def qkv_heads(self, x: jax.Array, rotate: "Rotation | None") -> tuple[jax.Array, ...]:
        """Queries, keys and values per head. [B, N, D] -> 3 x [B, N, A, d]."""
        q, k, v = self.project(x)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        return q, k, v

    def project(self, x: jax.Array) -> list[jax.Array]:
        """Queries, keys and values before any rotation. [B, N, D] -> 3 x [B, N, A, d]."""
        # A matmul each: of one result [B, N, 3, D] a TPU copies every part before its first use.
        batch, tokens, width = x.shape
        rows, kernel = x.reshape(-1, width), self.qkv.kernel[...]
        parts = []
        for index, bias in enumerate((self.q_bias, self.k_bias, self.v_bias)):
            part: jax.Array = linear(
                rows, kernel[:, index], None, self.qkv.dtype, self.qkv.grad_dtype
            )
            part = part if bias is None else add_parameter(part, bias[...])
            parts.append(part.reshape(batch, tokens, self.heads, width // self.heads))
        return parts

    def scaled(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array, float]:
        """What the logits are the scaled product of: queries, keys, and the factor."""
        return q, k, q.shape[-1] ** -0.5

    def __call__(
        self,
        x: jax.Array,
        *,
        shared_bias: jax.Array | None,
        rotate: "Rotation | None" = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """[B, N, D] -> [B, N, D].

        Args:
          x: tokens; the windows of a windowed network are rows of the batch.
          shared_bias: [A, N, N] for attention without a bias of its own, or None.
          rotate: rotary position embedding, or None.
          mask: [G, N, N] added to the bias of row g of every G, see `attend`; or None.
        """
        q, k, v = self.qkv_heads(x, rotate)
        bias = shared_bias if self.rel_pos_bias is None else self.rel_pos_bias()
        if mask is not None:
            bias = mask[:, None] if bias is None else bias + mask[:, None]
        q, k, scale = self.scaled(q, k)
        out = attend(q, k, v, bias=bias, scale=scale, kind=self.kind)
        return self.proj(out.reshape(x.shape))


class RelativePositionBias(nnx.Module):
    """One learned bias per head and relative position (BEiT's table), zero at the start."""

    def __init__(self, grid: tuple[int, int], heads: int, *, cls_token: bool):
        self.grid = grid
        self.cls_token = cls_token
        rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + (3 if cls_token else 0)
        self.table = nnx.Param(jnp.zeros((rows, heads), jnp.float32))

    def __call__(self) -> jax.Array:
        """The bias of every (query, key) pair. -> [A, N, N] float32."""
        index = relative_position_index(self.grid, cls_token=self.cls_token)
        return self.table[...].T[:, index]


@functools.lru_cache(maxsize=32)
def relative_position_index(grid: tuple[int, int], *, cls_token: bool) -> np.ndarray:
    """Row of the bias table for every query and key. [N, N] int32, N = cls + H*W.

    Patch to patch: (dr + H - 1)(2W - 1) + (dc + W - 1). The last three rows are class query to
    patch key, patch query to class key, and class to class.
    """
    height, width = grid
    rows, cols = (a.reshape(-1) for a in np.indices(grid))
    dr = rows[:, None] - rows[None] + height - 1
    dc = cols[:, None] - cols[None] + width - 1
    index = dr * (2 * width - 1) + dc
    if cls_token:
        offsets = (2 * height - 1) * (2 * width - 1)
        index = np.pad(index, ((1, 0), (1, 0)))
        index[0, :] = offsets
        index[:, 0] = offsets + 1
        index[0, 0] = offsets + 2
    return index.astype(np.int32)


class Rotation:
    """Axial rotary position embedding of the patch tokens (DINOv3); prefix tokens stay as they are.

    Patch centres are scaled to [-1, 1] on each axis; head dimension d gives d/4 frequencies per
    axis, base `theta`; the second half of the channels pairs with the first.
    """

    def __init__(self, grid: tuple[int, int], prefix: int, head_width: int, *, theta: float):
        self.prefix = prefix
        frequencies = theta ** -(np.arange(head_width // 4) / (head_width // 4))
        centres = [(np.arange(n) + 0.5) / n * 2 - 1 for n in grid]
        coordinates = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2)
        angles = 2 * np.pi * coordinates[:, :, None] * frequencies  # [H*W, 2, d/4]
        angles = np.tile(angles.reshape(len(coordinates), -1), 2)[:, None]  # [H*W, 1, d]
        self.cos = np.cos(angles).astype(np.float32)
        self.sin = np.sin(angles).astype(np.float32)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Rotates queries or keys. [B, N, A, d] -> [B, N, A, d], in float32 inside."""
        patches = x[:, self.prefix :].astype(jnp.float32)
        first, second = jnp.split(patches, 2, axis=-1)
        turned = jnp.concatenate([-second, first], axis=-1)
        rotated = patches * self.cos + turned * self.sin
        return jnp.concatenate([x[:, : self.prefix], rotated.astype(x.dtype)], axis=1)


def _zeros(width: int) -> nnx.Param:
    return nnx.Param(jnp.zeros((width,), jnp.float32))
