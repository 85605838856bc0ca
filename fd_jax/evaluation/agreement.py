"""How well a student predicts its teacher: R2 and cosine, compared with a constant prediction."""

from collections.abc import Iterable, Mapping
import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fd_jax import losses
from fd_jax.typing import Batch, PyTree


class Distillation(Protocol):
    """The methods of a task that are compared: prediction and target, for a single teacher."""

    @property
    def cls(self) -> bool:
        """Whether prediction and target begin with a class token."""
        ...

    def teacher_target(self, frozen: PyTree, batch: Batch) -> jax.Array:
        """The target. -> [B, T, D] float32."""
        ...

    def predict(self, params: PyTree, batch: Batch) -> jax.Array:
        """The student's prediction of the target. -> [B, T, D]."""
        ...


def split_kinds(tokens: jax.Array, *, cls: bool) -> dict[str, jax.Array]:
    """Splits class token and patches. [B, T, D] -> {"cls": [B, 1, D], "patch": [B, T - 1, D]}."""
    if not cls:
        return {"patch": tokens}
    return {"cls": tokens[:, :1], "patch": tokens[:, 1:]}


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over the tokens of one kind, from which all figures of `scores` follow.

    Attributes:
      tokens: number of tokens.
      target: sum of the targets. [D]
      direction: sum of the targets at unit length. [D]
      square: sum of the squares of all numbers in the targets.
      residual, cosine: by student, the sum of squared differences between prediction and target,
        and of their cosines.
    """

    tokens: float
    target: np.ndarray
    direction: np.ndarray
    square: float
    residual: dict[str, float]
    cosine: dict[str, float]

    @property
    def mean(self) -> np.ndarray:
        """The mean target. [D]"""
        return self.target / self.tokens


def measure(
    task: Distillation,
    students: Mapping[str, PyTree],
    frozen: PyTree,
    batches: Iterable[PyTree],
) -> dict[str, Totals]:
    """Compares predictions with the teacher in a single pass, since the teacher costs the most.

    Args:
      task: defines student, teacher and target (target.kind "full").
      students: parameters of student and projector, by the name of each student.
      frozen: the teacher's weights.
      batches: batches with "image" and "weight".

    Returns:
      The sums for "patch", and for "cls" if there are class tokens.
    """

    @jax.jit
    def sums(students, frozen, batch):
        targets = split_kinds(task.teacher_target(frozen, batch), cls=task.cls)
        predicted = {
            name: split_kinds(task.predict(params, batch), cls=task.cls)
            for name, params in students.items()
        }
        return {
            kind: _compare(target, {n: p[kind] for n, p in predicted.items()}, batch["weight"])
            for kind, target in targets.items()
        }

    totals = _add_up(sums(students, frozen, batch) for batch in batches)
    return {kind: Totals(**values) for kind, values in totals.items()}


def scores(
    totals: Mapping[str, Totals], student: str, mean: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """Agreement of one student with the teacher for each kind of token.

    R2 = 1 - sum (t - p)^2 / sum (t - m)^2, where t is the target, p the prediction and m the mean
    target of the training set; the sums are over all tokens of the kind and all channels. Tokens
    can share a large common part, so that even the constant m has a high cosine with the target;
    this is reported as "cosine_of_mean".

    Args:
      totals: result of `measure`.
      student: name of the student.
      mean: mean target of the training set for each kind of token. [D]

    Returns:
      {"cls": {"r2", "cosine", "cosine_of_mean"}, "patch": {...}}; "cls" only if there are class
      tokens.
    """
    return {kind: _scores(total, student, mean[kind]) for kind, total in totals.items()}


def _scores(total: Totals, student: str, mean: np.ndarray) -> dict[str, float]:
    # sum (t - m)^2 and sum cos(t, m), written as sums that do not need m.
    variance = total.square - 2 * mean @ total.target + total.tokens * mean @ mean
    length = max(float(np.linalg.norm(mean)), 1e-12)
    return {
        "r2": float(1 - total.residual[student] / variance),
        "cosine": float(total.cosine[student] / total.tokens),
        "cosine_of_mean": float(total.direction @ mean / length / total.tokens),
    }


def _compare(target: jax.Array, predicted: dict[str, jax.Array], weight: jax.Array) -> PyTree:
    """The fields of `Totals` for one batch. target, predicted: [B, T, D]; weight: [B]"""

    def total(values: jax.Array, axis: tuple[int, ...] | None = None) -> jax.Array:
        return jnp.sum(values * weight[(...,) + (None,) * (values.ndim - 1)], axis=axis)

    return {
        "tokens": total(jnp.ones(target.shape[:2])),
        "target": total(target, axis=(0, 1)),
        "direction": total(losses.l2_normalize(target), axis=(0, 1)),
        "square": total(jnp.square(target)),
        "residual": {n: total(jnp.square(target - p)) for n, p in predicted.items()},
        "cosine": {n: total(losses.cosine_similarity(target, p)) for n, p in predicted.items()},
    }


def _add_up(parts: Iterable[PyTree]) -> PyTree:
    """Sums trees of device arrays in float64 on the host."""
    total = None
    for part in parts:
        part = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), part)
        total = part if total is None else jax.tree.map(np.add, total, part)
    if total is None:
        raise ValueError("there are no batches to measure")
    return total
