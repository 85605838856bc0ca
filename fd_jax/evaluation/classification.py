"""Accuracy of a classifier, as sums that add up over batches and hosts."""

import jax
import jax.numpy as jnp

from fd_jax import losses
from fd_jax.metrics import weighted
from fd_jax.typing import Metrics


def scores(logits: jax.Array, label: jax.Array, weight: jax.Array) -> Metrics:
    """Cross entropy, top-1 and top-5 accuracy as (sum, count).

    A label counts as among the k best where fewer than k classes score higher, so that ties do
    not depend on a sorting order; among fewer than five classes top-5 is always reached.

    Args:
      logits: [B, K].
      label: [B] int32.
      weight: [B], 0 for padding.
    """
    logits = logits.astype(jnp.float32)
    target = jax.nn.one_hot(label, logits.shape[-1])
    own = jnp.sum(logits * target, axis=-1, keepdims=True)
    better = jnp.sum(logits > own, axis=-1)
    return {
        "loss": weighted(losses.cross_entropy(logits, target), weight),
        "top1": weighted((better < 1).astype(jnp.float32), weight),
        "top5": weighted((better < 5).astype(jnp.float32), weight),
    }


def confusion(logits: jax.Array, label: jax.Array, weight: jax.Array) -> jax.Array:
    """How often each class is taken for which. -> [K, K] float32, row label, column prediction."""
    classes = logits.shape[-1]
    rows = jax.nn.one_hot(label, classes) * weight[:, None]
    return rows.T @ jax.nn.one_hot(jnp.argmax(logits, axis=-1), classes)
