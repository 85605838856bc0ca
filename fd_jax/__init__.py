"""Feature distillation in JAX: models, losses, tasks, conversion, sharding, diagnostics."""

from fd_jax.__about__ import __version__
from fd_jax.inference import Model, load_model
from fd_jax.show.pictures import pca_picture

__all__ = ["Model", "__version__", "load_model", "pca_picture"]
