"""Checkpoints are restored as what they are, and nothing is cast from one kind to another."""

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fd_jax.checkpoint import Checkpoints
from fd_jax.errors import CheckpointError


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(epath.Path(tmp_path / "checkpoints"), keep=1, keep_every=None)
    checkpoints.save(3, {"weight": jnp.arange(4.0) / 3, "count": jnp.int32(70000)}, {"step": 3})
    checkpoints.wait()
    yield checkpoints
    checkpoints.close()


def like(**dtypes):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {"weight": (4,), "count": ()}
    return {
        name: jax.ShapeDtypeStruct(shapes[name], dtype, sharding=sharding)
        for name, dtype in dtypes.items()
    }


def test_arrays_come_back_as_they_were(saved):
    state, record = saved.restore(3, like(weight=jnp.float32, count=jnp.int32))
    np.testing.assert_array_equal(state["weight"], np.arange(4, dtype=np.float32) / 3)
    assert state["count"] == 70000 and record == {"step": 3}


@pytest.mark.parametrize(
    "dtypes, line",
    [
        ({"weight": jnp.int32, "count": jnp.int32}, r"weight: 'float \[4\]' -> 'int32 \[4\]'"),
        ({"weight": jnp.float32, "count": jnp.int8}, r"count: 'int32 \[\]' -> 'int8 \[\]'"),
    ],
    ids=["floats into integers", "integers into smaller ones"],
)
def test_another_kind_of_numbers_is_refused(saved, dtypes, line):
    with pytest.raises(CheckpointError, match=line):
        saved.restore(3, like(**dtypes))


def test_floats_of_another_width_are_restored(saved):
    state, _ = saved.restore(3, like(weight=jnp.bfloat16, count=jnp.int32))
    assert state["weight"].dtype == jnp.bfloat16
