"""Each layer against torch, with wrong variants that must be seen."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fd_jax.models import layers
from tests.models.activations import ACTIVATIONS
from tests.models.arrays import init, rand, t

B, N, D = 3, 10, 24  # examples, tokens, channels
TOLERANCE = 1e-5


@pytest.mark.parametrize(("name", "reference"), ACTIVATIONS.items())
def test_gradients_of_activations_are_torchs(name, reference):
    x, weights = rand(7, D, scale=2.0), rand(7, D, seed=1)

    def grad(name):
        return jax.grad(lambda x: jnp.sum(layers.activate(x, name) * weights))(x)

    tensor = t(x).requires_grad_()
    (reference(tensor) * t(weights)).sum().backward()
    np.testing.assert_allclose(grad(name), tensor.grad.numpy(), atol=TOLERANCE)
    other = "quick_gelu" if name == "gelu_erf" else "gelu_erf"
    assert np.abs(grad(other) - tensor.grad.numpy()).max() > 10 * TOLERANCE


@pytest.mark.parametrize(("name", "reference"), ACTIVATIONS.items())
def test_activations_in_bfloat16_are_rounded_once(name, reference):
    """Value and gradient are those of float64 within half a unit in the last place, or 1e-5.

    GELU in bfloat16 throughout, as jax.nn.gelu computes it, is off by several.
    """
    x = jnp.asarray(rand(50, D, scale=2.0)).astype(jnp.bfloat16)
    tensor = t(x.astype(jnp.float32)).double().requires_grad_()
    out = reference(tensor)
    out.sum().backward()
    value, grads = jax.vjp(lambda x: layers.activate(x, name), x)
    for got, want in ((value, out.detach()), (grads(jnp.ones_like(x))[0], tensor.grad)):
        assert got.dtype == jnp.bfloat16
        error = np.abs(np.asarray(got, np.float64) - want.numpy())
        assert np.all(error <= 2.0**-8 * (1 + 1e-3) * np.abs(want.numpy()) + 1e-5)
    if name == "gelu_erf":
        rough = np.asarray(jax.nn.gelu(x, approximate=False), np.float64)
        error = np.abs(rough - out.detach().numpy())
        assert np.any(error > 2.0**-7 * np.abs(out.detach().numpy()) + 1e-5)


def test_gradients_of_layer_norm_are_torchs():
    arrays = rand(B, N, D, scale=3.0) + 2, rand(D, seed=1), rand(D, seed=2)
    weights = rand(B, N, D, seed=3)

    def gradients(function):
        return jax.grad(lambda *args: jnp.sum(function(*args) * weights), argnums=(0, 1, 2))(
            *map(jnp.asarray, arrays)
        )

    tensors = [t(a).double().requires_grad_() for a in arrays]
    out = torch.nn.functional.layer_norm(tensors[0], (D,), tensors[1], tensors[2], 1e-5)
    (out * t(weights)).sum().backward()
    want = [tensor.grad.numpy() for tensor in tensors]
    got = gradients(lambda x, s, b: layers.layer_norm(x, s, b, 1e-5, jnp.float32))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=TOLERANCE)
    # Control: statistics that are taken for constants.
    stop = jax.lax.stop_gradient

    def constant(x, s, b):
        mean = stop(x.mean(-1, keepdims=True))
        return (x - mean) * stop(jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)) * s + b

    assert np.abs(gradients(constant)[0] - want[0]).max() > 100 * TOLERANCE


def test_layer_norm_of_bfloat16_sums_the_gradients_of_its_parameters_in_float32():
    x = jnp.asarray(rand(4096, D)).astype(jnp.bfloat16)
    g = jnp.asarray(rand(4096, D, seed=1) + 1).astype(jnp.bfloat16)
    scale, bias = jnp.ones(D), jnp.zeros(D)
    _, vjp = jax.vjp(lambda s, b: layers.layer_norm(x, s, b, 1e-5, jnp.bfloat16), scale, bias)
    dscale, dbias = vjp(g)
    wide, g = np.asarray(x, np.float64), np.asarray(g, np.float64)
    normalized = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(dbias, g.sum(0), rtol=1e-6)
    np.testing.assert_allclose(dscale, (g * normalized).sum(0), atol=1e-6 * np.abs(g).sum(0).max())
    rough = np.asarray(jnp.sum(jnp.asarray(g, jnp.bfloat16), axis=0, dtype=jnp.bfloat16), float)
    assert np.abs(rough - g.sum(0)).max() > 1e-4 * np.abs(g.sum(0)).max()


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_layer_norm(eps):
    module = layers.LayerNorm(D, eps=eps, dtype=jnp.float32, rngs=nnx.Rngs(0))
    scale, bias = rand(D, seed=1), rand(D, seed=2)
    module.scale[...], module.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    x = rand(B, N, D, seed=3, scale=3e-3)

    def want(eps):
        return torch.nn.functional.layer_norm(t(x), (D,), t(scale), t(bias), eps).numpy()

    np.testing.assert_allclose(module(x), want(eps), atol=TOLERANCE)
    assert np.abs(module(x) - want(1e-5 if eps == 1e-6 else 1e-6)).max() > 100 * TOLERANCE


def test_layer_norm_of_tokens_with_a_large_common_part():
    """Flax's default, E[x^2] - E[x]^2, loses four digits here."""
    x = rand(B, N, D, seed=3) + 300
    module = layers.LayerNorm(D, eps=1e-6, dtype=jnp.float32, rngs=nnx.Rngs(0))
    want = torch.nn.functional.layer_norm(t(x), (D,), eps=1e-6).numpy()
    np.testing.assert_allclose(module(x), want, atol=1e-4)
    fast = nnx.LayerNorm(D, epsilon=1e-6, use_fast_variance=True, rngs=nnx.Rngs(0))
    assert np.abs(fast(x) - want).max() > 1e-3


@pytest.mark.parametrize("use_bias", [True, False])
def test_patch_embed_is_torchs_convolution(use_bias):
    module = layers.PatchEmbed(
        4, D, use_bias=use_bias, dtype=jnp.float32, kernel_init=init, rngs=nnx.Rngs(0)
    )
    if use_bias:
        module.bias[...] = jnp.asarray(rand(D, seed=1))
    images = rand(B, 12, 8, 3, seed=2)
    weight = t(module.kernel[...]).permute(3, 2, 0, 1)
    bias = t(module.bias[...]) if use_bias else None
    out = torch.nn.functional.conv2d(t(images).permute(0, 3, 1, 2), weight, bias, stride=4)
    want = out.flatten(2).transpose(1, 2).numpy()
    np.testing.assert_allclose(module(jnp.asarray(images)), want, atol=TOLERANCE)


def test_linear_and_its_gradients_are_torchs():
    x, kernel, bias = rand(7, D), rand(D, 3, D, seed=1), rand(3, D, seed=2)
    weights = rand(7, 3, D, seed=3)

    def loss(x, kernel, bias):
        return jnp.sum(layers.linear(x, kernel, bias, jnp.float32, jnp.float32) * weights)

    got = jax.grad(loss, argnums=(0, 1, 2))(x, kernel, bias)
    tensors = [t(a).requires_grad_() for a in (x, kernel, bias)]
    out = torch.einsum("md,dce->mce", tensors[0], tensors[1]) + tensors[2]
    (out * t(weights)).sum().backward()
    for grad, tensor in zip(got, tensors, strict=True):
        np.testing.assert_allclose(grad, tensor.grad.numpy(), rtol=1e-5, atol=1e-5)


def test_weight_gradients_leave_the_matmul_in_float32():
    """In bfloat16 compute, the gradient of the float32 master never passes through bfloat16."""
    x, kernel, bias = rand(512, D), rand(D, D, seed=1), rand(D, seed=2)

    def grad(grad_dtype):
        def loss(kernel, bias):
            y = layers.linear(x.astype(jnp.bfloat16), kernel, bias, jnp.bfloat16, grad_dtype)
            return jnp.sum(y.astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1))(kernel, bias)

    exact = x.astype(jnp.bfloat16).astype(np.float64).sum(0)
    kernel_grad, bias_grad = grad(jnp.float32)
    np.testing.assert_allclose(kernel_grad[:, 0], exact, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(bias_grad, 512)
    rounded, _ = grad(jnp.bfloat16)
    assert np.abs(rounded[:, 0] - exact).max() > 1e-3


def test_drop_path_formula_and_expectation():
    branch = rand(20000, 1, 2, seed=1)
    uniform = np.random.default_rng(0).random(20000).astype(np.float32)
    out = np.asarray(layers.drop_path(jnp.asarray(branch), jnp.asarray(uniform), rate=0.3))
    kept = np.floor(0.7 + uniform)
    np.testing.assert_allclose(out, branch / 0.7 * kept[:, None, None], rtol=1e-5)
    assert kept.mean() == pytest.approx(0.7, abs=0.01)
    same = layers.drop_path(jnp.asarray(branch), None, rate=0.3)
    np.testing.assert_array_equal(same, branch)


def test_drop_path_of_rows_is_that_of_their_examples():
    branch, uniform = rand(B, N, D), np.array([0.1, 0.9, 0.2], np.float32)
    want = layers.drop_path(jnp.asarray(branch), uniform, rate=0.5)
    rows = layers.drop_path(jnp.asarray(branch.reshape(B * N, D)), uniform, rate=0.5)
    np.testing.assert_array_equal(rows.reshape(B, N, D), want)
    assert not np.array_equal(want[0], want[1])
