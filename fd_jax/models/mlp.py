"""The MLP of a block: plain or gated, with or without a norm of its hidden channels."""

import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fd_jax.models import layers
from fd_jax.models.layers import Activation


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gate(gates: jax.Array, values: jax.Array, activation: Activation) -> jax.Array:
    """activation(gates) * values, any shape, computed in float32.

    The result and both gradients are in the dtypes of the arguments. The backward pass keeps the
    two arguments and nothing else, as that of `layers.activate` keeps its input.
    """
    wide, wide_values = _wide(gates, values)
    return (layers.ACTIVATIONS[activation](wide) * wide_values).astype(values.dtype)


def _gate_forward(gates, values, activation):
    return gate(gates, values, activation), (gates, values)


def _gate_backward(activation, residuals, g):
    # Without the barrier XLA sees that the forward pass computed much of this, and stores it.
    gates, values = residuals
    wide, wide_values = _wide(*jax.lax.optimization_barrier(residuals))
    active, slope = jax.jvp(layers.ACTIVATIONS[activation], (wide,), (jnp.ones_like(wide),))
    g = g.astype(wide.dtype)
    return (g * wide_values * slope).astype(gates.dtype), (g * active).astype(values.dtype)


gate.defvjp(_gate_forward, _gate_backward)


def _wide(*arrays: jax.Array) -> list[jax.Array]:
    return [x.astype(layers.at_least_float32(x.dtype)) for x in arrays]


class Mlp(nnx.Module):
    """Two linear layers with an activation between them.

    Args:
      width: channels D of the tokens.
      hidden: channels between the layers.
      activation: key of `layers.ACTIVATIONS`.
      gated: whether a third layer `gate` goes through the activation and multiplies what leaves
        `fc1` (SwiGLU, where the activation is "silu").
      norm_eps: epsilon of a LayerNorm of the hidden channels before `fc2`; None without one.
      dtype: of matmuls and activations.
      grad_dtype: of weight gradients until they are summed over devices.
      kernel_init: of `fc1` and `gate`.
      out_init: of `fc2`.
      rngs: random keys of the parameters.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Activation,
        gated: bool = False,
        norm_eps: float | None = None,
        dtype: DTypeLike,
        grad_dtype: DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer,
        out_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        common = {"dtype": dtype, "grad_dtype": grad_dtype, "rngs": rngs}
        self.fc1 = layers.Dense(width, hidden, kernel_init=kernel_init, **common)
        self.fc2 = layers.Dense(hidden, width, kernel_init=out_init, **common)
        self.gate = (
            layers.Dense(width, hidden, kernel_init=kernel_init, **common) if gated else None
        )
        self.norm = (
            layers.LayerNorm(hidden, eps=norm_eps, dtype=dtype, rngs=rngs)
            if norm_eps is not None
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        hidden = self._hidden(x)
        return self.fc2(hidden if self.norm is None else self.norm(hidden))

    def _hidden(self, x: jax.Array) -> Any:
        if self.gate is None:
            return layers.activate(self.fc1(x), self.activation)
        return gate(self.gate(x), self.fc1(x), self.activation)
