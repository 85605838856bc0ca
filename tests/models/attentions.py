"""Inputs of attention, and its output and gradients, for tests of implementations."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.models.arrays import rand

HEADS, WIDTH = 2, 16


def inputs(tokens, *, batch=2, heads=HEADS, width=WIDTH, groups=0, masked=False, seed=0):
    """q, k, v and a bias; of `groups` biases, or with pairs that a mask forbids."""
    q, k, v = (jnp.asarray(rand(batch, tokens, heads, width, seed=seed + i)) for i in range(3))
    shape = (groups, heads, tokens, tokens) if groups else (heads, tokens, tokens)
    bias = rand(*shape, seed=seed + 3, scale=2.0)
    if masked:
        forbidden = np.random.default_rng(seed).random((tokens, tokens)) < 0.3
        np.fill_diagonal(forbidden, False)
        bias = bias + np.where(forbidden, -100.0, 0.0).astype(np.float32)
    return q, k, v, jnp.asarray(bias)


def with_gradients(function, arrays, seed=9):
    """Output and gradients for q, k, v and bias of a loss that weighs every channel differently."""
    weights = jnp.asarray(rand(*arrays[0].shape, seed=seed))

    def loss(q, k, v, bias):
        out = function(q, k, v, bias=bias, scale=q.shape[-1] ** -0.5)
        return jnp.sum(out * weights), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*arrays)
    return [out, *grads]


def worst(got, want):
    """Largest error, relative to the largest value of each array."""
    errors = [
        np.abs(np.asarray(g) - np.asarray(w)).max() / np.abs(np.asarray(w)).max()
        for g, w in zip(got, want, strict=True)
    ]
    return max(errors)
