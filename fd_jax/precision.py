"""The dtype of matmuls and activations."""

import jax
import jax.numpy as jnp

from fd_jax.errors import check_choice

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def compute_dtype(name: str, platform: str | None = None) -> jnp.dtype:
    """Resolves a config's dtype; "auto" is bfloat16 on accelerators and float32 on CPU."""
    if name == "auto":
        platform = platform or jax.default_backend()
        name = "float32" if platform == "cpu" else "bfloat16"
    check_choice("dtype", name, ("auto", *DTYPES))
    return jnp.dtype(DTYPES[name])
