"""The random keys of a new network's parameters."""

from typing import Any, cast

from flax import nnx
import jax


class _ParamKeys:
    """Gives the keys that `nnx.Rngs(key).params()` gives, one after another."""

    def __init__(self, key: jax.Array):
        self._key, self._count = key, 0

    def params(self) -> jax.Array:
        key = jax.random.fold_in(self._key, self._count)
        self._count += 1
        return key


def param_keys(key: jax.Array | int) -> nnx.Rngs:
    """The keys for a module's parameters, for its argument `rngs`.

    The keys are those of `nnx.Rngs`, bit for bit. That class keeps its counter in a variable, and
    to update it inside of jax.jit or eval_shape takes most of the time in which a network is
    defined. A module that is only built needs the counter nowhere else.

    Args:
      key: random key, or seed.
    """
    key = jax.random.key(key) if isinstance(key, int) else key
    return cast(nnx.Rngs, cast(Any, _ParamKeys(key)))
