"""How well a student predicts its teacher: R2 and cosine, each beside what a constant reaches."""

from collections.abc import Iterable
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fd_jax import losses
from fd_jax.typing import Batch, PyTree

KINDS = ("cls", "patch")


class Distillation(Protocol):
    """What is compared: a student's prediction and the target of its one teacher."""

    @property
    def cls(self) -> bool:
        """Whether both begin with a class token."""
        ...

    def teacher_target(self, frozen: PyTree, batch: Batch) -> jax.Array:
        """[B, T, D] float32."""
        ...

    def predict(self, params: PyTree, batch: Batch) -> jax.Array:
        """[B, T, D]."""
        ...


def split_kinds(tokens: jax.Array, *, cls: bool) -> dict[str, jax.Array]:
    """Class token and patches apart. [B, T, D] -> {"cls": [B, 1, D], "patch": [B, T - 1, D]}."""
    if not cls:
        return {"patch": tokens}
    return {"cls": tokens[:, :1], "patch": tokens[:, 1:]}


def mean_target(
    task: Distillation, frozen: PyTree, batches: Iterable[PyTree]
) -> dict[str, np.ndarray]:
    """Mean target per channel and kind of token over a dataset. -> {"cls": [D], "patch": [D]}."""

    @jax.jit
    def sums(frozen, batch):
        kinds = split_kinds(task.teacher_target(frozen, batch), cls=task.cls)
        weight = batch["weight"][:, None, None]
        return {
            kind: (jnp.sum(t * weight, axis=(0, 1)), jnp.sum(batch["weight"]) * t.shape[1])
            for kind, t in kinds.items()
        }

    totals = _add_up(sums(frozen, batch) for batch in batches)
    return {kind: total / count for kind, (total, count) in totals.items()}


def agreement(
    task: Distillation,
    params: PyTree,
    frozen: PyTree,
    batches: Iterable[PyTree],
    mean: dict[str, np.ndarray],
) -> dict[str, dict[str, float]]:
    """Held-out agreement per kind of token.

    R2 = 1 - sum (t - p)^2 / sum (t - m)^2 over all tokens of the kind and all channels, m the mean
    target of the training set. Tokens can share a large common part, so that the constant m alone
    has a high cosine; it is reported beside the student's as "cosine_of_mean".

    Args:
      task: defines student, teacher and target (target.kind "full").
      params: student and projector.
      frozen: the teacher's weights.
      batches: batches with "image" and "weight".
      mean: of `mean_target`.

    Returns:
      {"cls": {"r2", "cosine", "cosine_of_mean"}, "patch": {...}}; "cls" only with class tokens.
    """

    @jax.jit
    def sums(params, frozen, batch):
        target = split_kinds(task.teacher_target(frozen, batch), cls=task.cls)
        predicted = split_kinds(task.predict(params, batch), cls=task.cls)
        return {k: _compare(target[k], predicted[k], mean[k], batch["weight"]) for k in target}

    totals = _add_up(sums(params, frozen, batch) for batch in batches)
    return {
        kind: {
            "r2": float(1 - t["residual"] / t["variance"]),
            "cosine": float(t["cosine"] / t["tokens"]),
            "cosine_of_mean": float(t["cosine_of_mean"] / t["tokens"]),
        }
        for kind, t in totals.items()
    }


def _compare(target, predicted, mean, weight):
    per_token = functools.partial(jnp.sum, axis=-1)
    values = {
        "residual": per_token(jnp.square(target - predicted)),
        "variance": per_token(jnp.square(target - mean)),
        "cosine": losses.cosine_similarity(target, predicted),
        "cosine_of_mean": losses.cosine_similarity(target, jnp.broadcast_to(mean, target.shape)),
        "tokens": jnp.ones(target.shape[:2]),
    }
    return {name: jnp.sum(value * weight[:, None]) for name, value in values.items()}


def _add_up(parts: Iterable[PyTree]) -> PyTree:
    """Sums trees of device arrays in float64 on the host."""
    total = None
    for part in parts:
        part = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), part)
        total = part if total is None else jax.tree.map(np.add, total, part)
    if total is None:
        raise ValueError("no batches")
    return total
