"""A distillation as one of its teachers sees it, which is what agreement is measured on."""

import dataclasses
from typing import TYPE_CHECKING

import jax

from fd_jax.tasks.goal import Goal
from fd_jax.typing import Batch, PyTree

if TYPE_CHECKING:
    from fd_jax.tasks.distill import DistillTask


@dataclasses.dataclass(frozen=True)
class OfTeacher:
    """A task, seen from one of its teachers: what `evaluation.agreement` compares.

    Attributes:
      task: the task.
      name: the teacher's name.
      extra: state of the run that is not trained.
    """

    task: "DistillTask"
    name: str
    extra: PyTree

    @property
    def goal(self) -> Goal:
        """What the student learns from this teacher."""
        return self.task.goals.each[self.name]

    @property
    def cls(self) -> bool:
        """Whether the student and this teacher both have a class token."""
        return self.goal.cls

    def load(self) -> PyTree:
        """The frozen arrays of this teacher alone."""
        return self.goal.load()

    def teacher_target(self, frozen: PyTree, batch: Batch) -> jax.Array:
        """The target, of several levels the last. -> [B, T, D_t] float32.

        `frozen` is the result of `load`.
        """
        tokens = self.goal.tokens(frozen, batch["image"], None)
        target = self.task.goals.normalized_one(self.name, tokens, frozen, self.extra)
        return self.goal.last_level(target)

    def predict(self, params: PyTree, batch: Batch) -> jax.Array:
        """The student's prediction of the target. -> [B, T, D_t]."""
        found = self.task.predictions(params, batch, extra=self.extra)
        return self.goal.last_level(found[self.name])
