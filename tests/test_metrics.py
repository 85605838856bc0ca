"""Means as sums and counts."""

import jax.numpy as jnp

from fd_jax.metrics import Mean


def test_totals_keep_what_was_true_when_they_were_taken():
    mean = Mean()
    mean.add({"loss": (jnp.float32(3), jnp.float32(2))})
    recorded = mean.totals()
    mean.add({"loss": (jnp.float32(5), jnp.float32(2))})
    assert recorded == {"loss": [3.0, 2.0]}
    assert mean.result() == {"loss": 2.0}


def test_a_mean_that_continues_leaves_the_record_as_it_is():
    record = {"loss": [3.0, 2.0]}
    continued = Mean(record)
    continued.add({"loss": (jnp.float32(5), jnp.float32(2))})
    assert record == {"loss": [3.0, 2.0]}
    assert continued.totals() == {"loss": [8.0, 4.0]}
