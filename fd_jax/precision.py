"""The dtype of matmuls and activations."""

import jax
import jax.numpy as jnp

from fd_jax.errors import ConfigError

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def compute_dtype(name: str, platform: str | None = None) -> jnp.dtype:
    """Resolves a config's dtype; "auto" is bfloat16 on accelerators and float32 on CPU."""
    if name == "auto":
        platform = platform or jax.default_backend()
        name = "float32" if platform == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r} is unknown; expected 'auto' or one of {sorted(DTYPES)}")
    return jnp.dtype(DTYPES[name])
