"""The MLP of a block against torch, with wrong variants that must be seen."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fd_jax.models import layers
from fd_jax.models.mlp import Mlp, gate
from tests.models.activations import ACTIVATIONS
from tests.models.arrays import init, rand, t

B, N, D, HIDDEN = 3, 10, 24, 40  # examples, tokens, channels, hidden channels
TOLERANCE = 1e-5
OTHERS = {
    "gelu_erf": "gelu_tanh",
    "gelu_tanh": "quick_gelu",
    "quick_gelu": "gelu_erf",
    "silu": "quick_gelu",
    "relu": "gelu_erf",
}


def mlp(activation, **kwargs):
    module = Mlp(
        D,
        HIDDEN,
        activation=activation,
        dtype=jnp.float32,
        kernel_init=init,
        out_init=init,
        rngs=nnx.Rngs(1),
        **kwargs,
    )
    module.fc1.bias[...] = jnp.asarray(rand(HIDDEN, seed=1))
    return module


def dense(layer, x):
    return x @ t(layer.kernel[...]) + t(layer.bias[...])


@pytest.mark.parametrize(("name", "reference"), ACTIVATIONS.items())
def test_plain(name, reference):
    module, x = mlp(name), rand(B, N, D, seed=2)
    want = dense(module.fc2, reference(dense(module.fc1, t(x)))).numpy()
    np.testing.assert_allclose(module(jnp.asarray(x)), want, atol=TOLERANCE)
    module.activation = OTHERS[name]
    assert np.abs(module(jnp.asarray(x)) - want).max() > 10 * TOLERANCE


@pytest.mark.parametrize("norm_eps", [None, 1e-3])
@pytest.mark.parametrize(("name", "reference"), ACTIVATIONS.items())
def test_gated(name, norm_eps, reference):
    module, x = mlp(name, gated=True, norm_eps=norm_eps), rand(B, N, D, seed=2)
    module.gate.bias[...] = jnp.asarray(rand(HIDDEN, seed=3))
    hidden = reference(dense(module.gate, t(x))) * dense(module.fc1, t(x))
    if norm_eps is not None:
        module.norm.scale[...] = jnp.asarray(1 + rand(HIDDEN, seed=4, scale=0.1))
        module.norm.bias[...] = jnp.asarray(rand(HIDDEN, seed=5))
        pair = t(module.norm.scale[...]), t(module.norm.bias[...])
        hidden = torch.nn.functional.layer_norm(hidden, (HIDDEN,), *pair, norm_eps)
    want = dense(module.fc2, hidden).numpy()
    np.testing.assert_allclose(module(jnp.asarray(x)), want, atol=TOLERANCE)
    module.gate, module.fc1 = module.fc1, module.gate
    assert np.abs(module(jnp.asarray(x)) - want).max() > 1000 * TOLERANCE


@pytest.mark.parametrize(("name", "reference"), ACTIVATIONS.items())
def test_gradients_of_a_gate_are_torchs(name, reference):
    arrays, weights = (rand(7, D, scale=2.0), rand(7, D, seed=1)), rand(7, D, seed=2)

    def gradients(function):
        return jax.grad(lambda a, b: jnp.sum(function(a, b) * weights), argnums=(0, 1))(*arrays)

    tensors = [t(array).requires_grad_() for array in arrays]
    (reference(tensors[0]) * tensors[1] * t(weights)).sum().backward()
    want = [tensor.grad.numpy() for tensor in tensors]
    for got, wanted in zip(gradients(lambda a, b: gate(a, b, name)), want, strict=True):
        np.testing.assert_allclose(got, wanted, atol=TOLERANCE)
    for got, wanted in zip(gradients(lambda a, b: gate(b, a, name)), want, strict=True):
        assert np.abs(got - wanted).max() > 1000 * TOLERANCE


def test_a_gate_in_bfloat16_is_rounded_once_and_keeps_its_arguments_alone():
    gates, values = (jnp.asarray(rand(50, D, seed=s)).astype(jnp.bfloat16) for s in (0, 1))
    wide = [np.asarray(x, np.float64) for x in (gates, values)]
    out, backward = jax.vjp(lambda a, b: gate(a, b, "silu"), gates, values)
    assert out.dtype == jnp.bfloat16
    want = wide[0] / (1 + np.exp(-wide[0])) * wide[1]
    error = np.abs(np.asarray(out, np.float64) - want)
    assert np.all(error <= 2.0**-8 * (1 + 1e-3) * np.abs(want) + 1e-6)
    rough = np.asarray(jax.nn.silu(gates) * values, np.float64)
    assert np.any(np.abs(rough - want) > 2.0**-8 * (1 + 1e-3) * np.abs(want) + 1e-6)
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.shape == gates.shape]
    assert len(kept) == 2
    assert all(leaf.dtype == jnp.bfloat16 for leaf in kept)


def test_an_activation_without_a_gradient_rule_of_its_own_keeps_more():
    """Control of the test above: XLA's own rule for the product of the same numbers."""
    gates, values = (jnp.asarray(rand(50, D, seed=s)).astype(jnp.bfloat16) for s in (0, 1))

    def product(a, b):
        return (layers.ACTIVATIONS["silu"](a.astype(jnp.float32)) * b).astype(b.dtype)

    _, backward = jax.vjp(product, gates, values)
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.shape == gates.shape]
    assert any(leaf.dtype == jnp.float32 for leaf in kept)
