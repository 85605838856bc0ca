"""A goal with several targets of one teacher: its maps after some of its blocks.

See docs/masked_students.md#several-levels.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from fd_jax.cost import flops
from fd_jax.cost.flops import Flops
from fd_jax.errors import ConfigError
from fd_jax.models.features import FeatureMap
from fd_jax.models.levels import LevelAdaptor
from fd_jax.tasks.goal import Goal, Grid
from fd_jax.tasks.sections import Section
from fd_jax.tasks.teacher import Teacher
from fd_jax.typing import PyTree


class LevelGoal(Goal):
    """The maps of K of the teacher's blocks, each predicted from all of the student's maps.

    Targets and predictions are [B, K, T, D_t], and the loss is the mean over the K levels.
    """

    def __init__(
        self,
        teacher: Teacher,
        section: Section,
        student: Any,
        *,
        dtype: jnp.dtype,
        grad_dtype: jnp.dtype,
    ):
        """Checks that both networks have such maps; arguments and errors as in `Goal`."""
        self._blocks = tuple(section.target.blocks)
        self._student_depth = student.depth
        self._student_prefix = student.cls + student.registers
        _check(section, teacher, student)
        super().__init__(teacher, section, student, dtype=dtype, grad_dtype=grad_dtype)

    def predict(
        self, projector: PyTree, features: FeatureMap, levels: Sequence[FeatureMap] = ()
    ) -> jax.Array:
        """The prediction of every level. -> [B, K, T, D_t]; see `Goal.predict`."""
        adaptor: Any = nnx.merge(self.projector_def, projector)
        mixed = adaptor.mixed([level.tokens for level in levels])
        each = [
            project(self._student_tokens(dataclasses.replace(features, tokens=tokens)))
            for tokens, project in zip(mixed, adaptor.each(), strict=True)
        ]
        return jnp.stack(each, axis=1)

    def last_level(self, tokens: jax.Array) -> jax.Array:
        """Those of the last level. [B, K, T, D_t] -> [B, T, D_t]"""
        return tokens[:, -1]

    def distance(self, prediction: jax.Array, target: jax.Array) -> jax.Array:
        """Weighted distance of each example. [B, K, T, D] x 2 -> [B] float32."""
        rows, levels, *token = prediction.shape
        flat = (rows * levels, *token)
        each = super().distance(prediction.reshape(flat), target.reshape(flat))
        return jnp.mean(each.reshape(rows, levels), axis=1)

    def flops(
        self,
        image_size: int,
        grid: Grid | None = None,
        *,
        patches: int | None = None,
        attends: bool = False,
    ) -> Flops:
        """FLOPs of teacher, adaptor and loss for one image; see `Goal.flops`."""
        height, width = grid or self._student_grid
        tokens = self._student_prefix + (height * width if patches is None else patches)
        mixing = flops.linear(tokens * self._student_width, self._student_depth, len(self._blocks))
        work = super().flops(image_size, grid, patches=patches, attends=attends)
        return work + mixing

    def _flops_of_learning(self, student_grid: Grid, patches: int | None) -> Flops:
        one = super()._flops_of_learning(student_grid, patches)
        return sum([one] * len(self._blocks), start=Flops(0.0))

    @property
    def _until(self) -> int | None:
        return max(self._blocks) + 1

    def _maps(
        self, weights: PyTree, images: jax.Array, *, attends: bool, **run: Any
    ) -> tuple[list[FeatureMap], jax.Array | None]:
        if attends:
            return self.teacher.attending(weights, images, self._blocks, final_norm=False, **run)
        return self.teacher.intermediates(weights, images, self._blocks, **run), None

    def _joined(self, each: list[jax.Array]) -> jax.Array:
        return jnp.stack(each, axis=1)

    def _projector(self, rngs: nnx.Rngs) -> Any:
        return LevelAdaptor(
            self._student_depth,
            self._blocks,
            self.teacher.depth,
            super()._projector,
            rngs=rngs,
        )


def _check(section: Section, teacher: Teacher, student: Any) -> None:
    """Refuses networks whose maps cannot be mixed, and blocks that the teacher does not have."""
    field, blocks = section.field("target.blocks"), tuple(section.target.blocks)
    if max(blocks) >= teacher.depth:
        raise ConfigError(
            f"{field}={blocks}, but the {section.role} has {teacher.depth} blocks, which are "
            f"counted from 0: use numbers up to {teacher.depth - 1}"
        )
    for role, depths in ((section.role, teacher.depths), ("student", student.depths)):
        if len(depths) > 1:
            raise ConfigError(
                f"{field}={blocks} takes maps after single blocks, but the {role} has "
                f"{len(depths)} stages, whose maps differ in size: use a ViT, or set it to () for "
                "the last map"
            )
    wide = {section.role: _is_wide(teacher.spec.arch), "student": student.lift is not None}
    wide["student"] |= getattr(student, "widen", None) is not None
    for role in (role for role, holds in wide.items() if holds):
        raise ConfigError(
            f"{field}={blocks} takes maps after single blocks, but the {role} has more channels at "
            "its end than before (arch.lift or arch.last_width): use one without, or set it to () "
            "for the last map"
        )


def _is_wide(arch: dict[str, Any]) -> bool:
    return bool(arch.get("lift") or arch.get("last_width"))
