"""Feature distillation in JAX: models, losses, tasks, conversion, sharding, diagnostics."""

from fd_jax.model_folder import Model, load_model

__version__ = "0.1.0.dev0"
__all__ = ["Model", "load_model"]
