"""Arrays for the tests of layers: drawn in float32, compared in torch's float64."""

import jax
import jax.numpy as jnp
import numpy as np
import torch


def rand(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def init(key, shape, dtype=jnp.float32, **_):
    return jax.random.normal(key, shape, dtype) * 0.2


def t(array):
    return torch.from_numpy(np.array(array)).double()
