"""Masked students: of each training image, the student sees some patches, and the teacher all.

The rules are those of MaskAlign (arXiv 2211.08887), see docs/masked_students.md.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from fd_jax.errors import ConfigError
from fd_jax.models.spec import ModelSpec
from fd_jax.tasks.goal import Goal, Grid
from fd_jax.tasks.sections import SINGLE_TEACHER
from fd_jax.tasks.stored import StoredTeacher
from fd_jax.typing import Config

By = Literal["random", "attention"]

# The entry of a batch with the random numbers by which patches are chosen, [B, H*W] from 0 to 1.
DRAWS = "student_mask"


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which patches the student sees.

    Attributes:
      keep: share of the patches of an image.
      guide: name of the goal whose teacher's class token attends to the patches, each of which is
        then drawn with a probability in proportion; None where all are equally likely.
    """

    keep: float
    guide: str | None = None

    def count(self, grid: Grid) -> int:
        """Number of patches that the student sees of a grid: the share of them, rounded down."""
        return math.floor(round(self.keep * math.prod(grid), 6))  # 0.29 of 100 is 28.999...

    def visible(self, draws: jax.Array, attention: jax.Array | None) -> jax.Array:
        """Places of the patches that the student sees, in their order. -> [B, P] int32

        Drawing one after another without replacement, each in proportion to its weight, gives the
        order of independent exponential times with these rates.

        Args:
          draws: uniform random numbers, [B, H*W].
          attention: what the teacher's class token attends to, [B, H*W]; None for equal shares.
        """
        times = -jnp.log(draws)
        if attention is not None:
            times = times / attention
        patches = draws.shape[1]
        first = jnp.argsort(times, axis=1)[:, : self.count((1, patches))]
        return jnp.sort(first.astype(jnp.int32), axis=1)


def of(
    config: Config,
    student: ModelSpec,
    goals: Mapping[str, Goal],
    grids: Mapping[int, Grid],
) -> Mask | None:
    """The mask of a run, or None if its student sees all patches.

    Args:
      config: config of a distillation.
      student: spec of the student.
      goals: what it learns from each teacher.
      grids: its grid for each side of training images.

    Raises:
      ConfigError: the student needs all patches, too few of them are left, or the teacher has no
        such attention.
    """
    section = config.student.get("mask")
    if section is None or section.keep == 1:
        return None
    here = f"student.mask.keep={section.keep}"
    if student.family != "vit":
        raise ConfigError(
            f"{here} leaves patches out, but the student is a {student.family}, which needs its "
            "whole grid: use a student of the family 'vit', or set student.mask.keep=1"
        )
    mask = Mask(section.keep)
    for goal in goals.values():
        _check_resample(here, goal)
        for side, grid in grids.items():
            _check_count(here, mask, goal, side, grid)
    if section.by == "random":
        return mask
    guide = _guide(section.teacher, goals)
    for side, grid in grids.items():
        _check_attention(goals[guide], side, grid)
    return dataclasses.replace(mask, guide=guide)


def _check_resample(here: str, goal: Goal) -> None:
    if goal.target.kind == "full" and goal.target.resample == "student":
        raise ConfigError(
            f"{here} leaves patches out, but {goal.section.field('target.resample')}='student' "
            "resizes the student's whole map: use 'bilinear', which resizes the teacher's, or set "
            "student.mask.keep=1"
        )


def _check_count(here: str, mask: Mask, goal: Goal, side: int, grid: Grid) -> None:
    """Refuses fewer patches than the goal compares."""
    patches, count, need, why = math.prod(grid), mask.count(grid), 1, "for the student to see"
    if goal.section.loss.weights.get("relation") and goal.target.kind == "full":
        compared = 0 if goal.section.loss.class_share else int(goal.cls)
        need, why = max(1, 2 - compared), f"for {goal.section.field('loss.relation')} to compare"
    if count < need:
        least = math.ceil(need / patches * 1e4) / 1e4
        raise ConfigError(
            f"{here} of the {grid[0]} x {grid[1]} patches of images of {side} px are {count}, but "
            f"there have to be {need} at least {why}: set it to {least:g} or more"
        )


def _guide(name: str, goals: Mapping[str, Goal]) -> str:
    """Name of the goal whose teacher `student.mask.teacher` means."""
    names = [goal.section.name for goal in goals.values()]
    if name and name not in names or not name and len(goals) > 1:
        known = ", ".join(map(repr, filter(None, names))) or "'', the only one"
        raise ConfigError(
            f"student.mask.teacher={name!r}, but student.mask.by='attention' follows one of the "
            f"teachers {known}: set it to that name"
        )
    return SINGLE_TEACHER if len(goals) == 1 else name


def _check_attention(goal: Goal, side: int, grid: Grid) -> None:
    """Refuses a teacher without a class token, or with other patches than the student's."""
    here, role = "student.mask.by='attention'", goal.section.role
    if isinstance(goal.teacher, StoredTeacher):
        raise ConfigError(
            f"{here} follows the attention of the {role}, which does not run, since its maps are "
            f"stored in {goal.teacher.folder}: set student.mask.by='random', or "
            f"{goal.section.field('targets')}=''"
        )
    if not goal.teacher.cls:
        raise ConfigError(
            f"{here} follows the attention of the class token, but the {role}, a "
            f"{goal.teacher.spec.family}, has none: set student.mask.by='random'"
        )
    there = goal.teacher_grid(grid)
    if there != grid:
        raise ConfigError(
            f"{here} weighs the student's patches, {grid[0]} x {grid[1]} in images of {side} px, "
            f"by the {role}'s attention, but that has {there[0]} x {there[1]} patches: change "
            f"{goal.section.field('image_size')} so that they are equal, or set "
            "student.mask.by='random'"
        )
