"""What stands on top of an encoder."""

import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from fd_jax.models import layers


class Projector(nnx.Module):
    """The 1x1 map from student to teacher width, trained with the student and then set aside.

    Weight and bias start uniform in +-1/sqrt(D_s), torch's default for the 1x1 convolution of the
    original (reference 1.5).
    """

    def __init__(
        self,
        width: int,
        out: int,
        *,
        dtype: jnp.dtype = jnp.float32,
        grad_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        bound = 1 / math.sqrt(width)

        def init(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        self.dtype = dtype
        self.grad_dtype = grad_dtype
        self.kernel: Any = nnx.Param(init(rngs.params(), (width, out)))
        self.bias = nnx.Param(init(rngs.params(), (out,)))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[..., D_s] -> [..., D_t] in `dtype`."""
        rows = tokens.reshape(-1, tokens.shape[-1])
        out: jax.Array = layers.linear(
            rows, self.kernel[...], self.bias[...], self.dtype, self.grad_dtype
        )
        return out.reshape(*tokens.shape[:-1], -1)
