"""Accuracy of a classifier, as sums that can be added over batches and hosts."""

import jax
import jax.numpy as jnp

from fd_jax import losses
from fd_jax.metrics import weighted
from fd_jax.typing import Metrics


def accuracy_metrics(logits: jax.Array, label: jax.Array, weight: jax.Array) -> Metrics:
    """Cross entropy, top-1 and top-5 accuracy as (sum, count).

    A label is among the top k if all but fewer than k classes have a logit that is not higher, so
    that ties do not depend on a sorting order, and logits that are NaN make the answer wrong. With
    five classes or fewer there is no top-5 accuracy.

    Args:
      logits: [B, K].
      label: [B] int32.
      weight: [B], 0 for padding.
    """
    logits = logits.astype(jnp.float32)
    target = jax.nn.one_hot(label, logits.shape[-1])
    own = jnp.take_along_axis(logits, jnp.maximum(label, 0)[:, None], axis=-1)
    better = jnp.sum(~(logits <= own), axis=-1)
    known = ~jnp.isnan(own[:, 0])
    right = {
        f"top{k}": weighted((known & (better < k)).astype(jnp.float32), weight)
        for k in reported(logits.shape[-1])
    }
    return {"loss": weighted(losses.cross_entropy(logits, target), weight), **right}


def reported(classes: int) -> tuple[int, ...]:
    """The k of the top-k accuracies that say something: five of five classes are always right."""
    return (1, 5) if classes > 5 else (1,)


def confusion(logits: jax.Array, label: jax.Array, weight: jax.Array) -> jax.Array:
    """Confusion matrix: a row for each label, a column for each prediction. -> [K, K] float32."""
    classes = logits.shape[-1]
    rows = jax.nn.one_hot(label, classes) * weight[:, None]
    return rows.T @ jax.nn.one_hot(jnp.argmax(logits, axis=-1), classes)
