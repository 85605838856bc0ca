"""Accuracy of a classifier, as sums that can be added over batches and hosts."""

import jax
import jax.numpy as jnp

from fd_jax import losses
from fd_jax.metrics import weighted
from fd_jax.typing import Metrics


def accuracy_metrics(logits: jax.Array, label: jax.Array, weight: jax.Array) -> Metrics:
    """Cross entropy, top-1 and top-5 accuracy as (sum, count).

    A label is among the top k if fewer than k classes have a higher logit, so that ties do not
    depend on a sorting order. With five classes or fewer, top-5 accuracy is always 1.

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
    """Confusion matrix: a row for each label, a column for each prediction. -> [K, K] float32."""
    classes = logits.shape[-1]
    rows = jax.nn.one_hot(label, classes) * weight[:, None]
    return rows.T @ jax.nn.one_hot(jnp.argmax(logits, axis=-1), classes)
