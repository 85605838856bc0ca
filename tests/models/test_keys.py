"""The keys of new parameters are those of flax, so that every initial weight stays the same."""

from flax import nnx
import jax
import numpy as np
import pytest

from fd_jax.models.keys import param_keys
from tests import tiny


@pytest.mark.parametrize("key", [0, 7, jax.random.key(3)])
def test_the_keys_are_those_of_flax(key):
    ours, flax = param_keys(key), nnx.Rngs(key)
    for _ in range(5):
        assert jax.random.key_data(ours.params()).tolist() == (
            jax.random.key_data(flax.params()).tolist()
        )


def test_the_keys_of_another_seed_differ():
    first, second = param_keys(0).params(), param_keys(1).params()
    assert jax.random.key_data(first).tolist() != jax.random.key_data(second).tolist()


@pytest.mark.parametrize("spec", [tiny.teacher_spec(), tiny.swin_spec(1), tiny.swin_spec(2)])
def test_a_network_starts_with_the_weights_that_flax_keys_give(spec):
    def initial(rngs):
        return jax.tree.leaves(nnx.to_pure_dict(nnx.state(spec.build(rngs=rngs))))

    ours, flax = initial(param_keys(5)), initial(nnx.Rngs(5))
    assert len(ours) == len(flax) > 10
    for a, b in zip(ours, flax, strict=True):
        np.testing.assert_array_equal(a, b)
