"""What a student learns from one teacher: target, projector and distance."""

import dataclasses
from typing import Any, Literal, get_args

from flax import nnx
import jax
import jax.numpy as jnp

from fd_jax import losses
from fd_jax.cost import flops
from fd_jax.errors import ConfigError, check_choice
from fd_jax.metrics import weighted
from fd_jax.models.features import FeatureMap
from fd_jax.models.heads import Projector
from fd_jax.models.keys import param_keys
from fd_jax.models.spec import split
from fd_jax.tasks.teacher import Teacher, resize_map
from fd_jax.typing import Metrics, PyTree

TargetKind = Literal["full", "cls", "gap", "logits"]
Resample = Literal["none", "bilinear"]


@dataclasses.dataclass(frozen=True)
class Target:
    """Which of the teacher's features is the target, and how it is normalised.

    See docs/reference.md#table-2 and docs/reference.md#table-3.

    Attributes:
      kind: "full" is the whole map (the class token if both networks have one, and the patches),
        "cls" the class token, "gap" the mean patch token, "logits" the class distribution from the
        teacher's head. The student predicts logits from its class token, or from its mean patch
        token if it has no class token.
      normalize: normalisation of the tokens, see `losses.normalize_target`; unused for logits.
      after_norm: whether the teacher's final norm is applied first (docs/reference.md#after-norm).
      resample: "bilinear" resizes the teacher's patches to the student's grid if the grids differ,
        before they are normalised; "none", as in the original, refuses unequal grids.

    Raises:
      ConfigError: the kind, normalisation or resampling is unknown.
    """

    kind: TargetKind
    normalize: losses.TargetNorm
    after_norm: bool
    resample: Resample = "none"

    def __post_init__(self):
        check_choice("target.kind", self.kind, get_args(TargetKind))
        check_choice("target.normalize", self.normalize, get_args(losses.TargetNorm))
        check_choice("target.resample", self.resample, get_args(Resample))

    def select(self, features: FeatureMap, *, cls: bool) -> jax.Array:
        """The tokens to compare. -> [B, T, D]; `cls`: whether both sides have a class token."""
        if self.kind == "gap":
            return jnp.mean(features.patches, axis=1, keepdims=True)
        if self.kind == "logits" and not features.cls:
            return jnp.mean(features.patches, axis=1, keepdims=True)
        if self.kind in ("cls", "logits"):
            return features.cls_token[:, None]
        return features.full if cls else features.patches


class Goal:
    """A teacher, the target taken from it, and the projector from the student to the target.

    Attributes:
      teacher: the teacher.
      target: which of its features is the target.
      cls: whether student and teacher both have a class token.
      projector_def: the projector's graph definition.
    """

    def __init__(
        self,
        teacher: Teacher,
        target: Target,
        student: Any,
        *,
        beta: float,
        dtype: jnp.dtype,
        grad_dtype: jnp.dtype,
    ):
        """Checks that student and teacher can be compared.

        Args:
          teacher: teacher; it needs its head if the target is logits.
          target: which of its features is the target.
          student: abstract student network.
          beta: beta of the smooth L1 loss.
          dtype: dtype of the projector's matmul.
          grad_dtype: dtype of the projector's weight gradient while it is summed over devices.

        Raises:
          ConfigError: they cannot be compared; the message has the numbers.
        """
        self.teacher, self.target = teacher, target
        self.cls = bool(student.cls and teacher.cls)
        self._beta, self._dtype, self._grad_dtype = beta, dtype, grad_dtype
        self._student_width: int = student.width
        self._grid: tuple[int, int] = student.grid
        self._check_match(student)
        self.projector_def, _ = split(nnx.eval_shape(lambda: self._projector(param_keys(0))))

    def init(self, key: jax.Array) -> PyTree:
        """Random initial parameters of the projector."""
        return split(self._projector(param_keys(key)))[1]

    def teacher_target(
        self,
        weights: PyTree,
        images: jax.Array,
        drops: jax.Array | None,
        *,
        grid: tuple[int, int] | None = None,
    ) -> jax.Array:
        """The target that the student predicts. -> [B, T, D_t] float32, or [B, 1, K] logits.

        Args:
          weights: the teacher's weights.
          images: [B, H, W, 3] uint8.
          drops: uniform random numbers for the teacher's drop path, [B, depth, 2], or None.
          grid: the student's grid for these images; None for that of its own image size.
        """
        grid = self._grid if grid is None else grid
        features = self.teacher.features(
            weights,
            images,
            final_norm=self.target.after_norm,
            drops=drops,
            image_size=self._teacher_size(grid),
        )
        if self.target.kind == "logits":
            return self.teacher.logits(weights, features)[:, None]
        if self.target.kind == "full" and features.grid != grid:
            features = resize_map(features, grid)
        tokens = self.target.select(features, cls=self.cls)
        return jax.lax.stop_gradient(losses.normalize_target(tokens, self.target.normalize))

    def predict(self, projector: PyTree, features: FeatureMap) -> jax.Array:
        """The student's tokens, projected to the teacher's width. -> [B, T, D_t]."""
        tokens = self.target.select(features, cls=self.cls)
        return nnx.merge(self.projector_def, projector)(tokens)

    def distance(self, prediction: jax.Array, target: jax.Array) -> jax.Array:
        """Distance of each example. [B, T, D] x 2 -> [B]."""
        if self.target.kind == "logits":
            return losses.cross_entropy(prediction[:, 0], jax.nn.softmax(target[:, 0]))
        distance = losses.smooth_l1(prediction, target, beta=self._beta)
        return jnp.mean(distance, axis=(1, 2))

    def agreement(self, prediction: jax.Array, target: jax.Array, weight: jax.Array) -> Metrics:
        """Held-out metrics besides the distance: cosine similarity, or {} for logits."""
        if self.target.kind == "logits":
            return {}
        cosine = jnp.mean(losses.cosine_similarity(prediction, target), axis=-1)
        return {"cosine": weighted(cosine, weight)}

    def flops(self, image_size: int, grid: tuple[int, int] | None = None) -> flops.Flops:
        """FLOPs of teacher and projector for one image.

        Args:
          image_size: its side in pixels.
          grid: the student's grid for this size; None for that of its own image size.
        """
        grid = self._grid if grid is None else grid
        tokens = grid[0] * grid[1] + int(self.cls) if self.target.kind == "full" else 1
        projector = flops.linear(tokens, self._student_width, self._out)
        return self.teacher.flops(image_size, self._teacher_size(grid)) + projector

    def check_grid(self, grid: tuple[int, int], image_size: int) -> None:
        """Refuses a size of training images for which the two maps cannot be compared.

        Args:
          grid: the student's grid for images of this size.
          image_size: side of the images in pixels.

        Raises:
          ConfigError: the teacher cannot follow to this size, or stays on another grid.
        """
        where = f"images of {image_size} px, in data.sizes or data.phases, give the student {grid}"
        side = self.teacher.image_size * grid[0]
        if self.teacher.follows and side % self._grid[0]:
            raise ConfigError(
                f"{where} patches, for which the teacher would need {side / self._grid[0]:g} px; "
                "leave that size out, or set teacher.follow=False"
            )
        try:
            there = self.teacher.grid_at(self._teacher_size(grid))
        except ConfigError as error:
            raise ConfigError(f"{where} patches, and the teacher: {error}") from error
        if self.target.kind == "full" and there != grid and self.target.resample == "none":
            raise ConfigError(
                f"{where} patches, but the teacher has {there}: set teacher.follow=True, with "
                "which its input follows the student's, or target.resample to 'bilinear'"
            )

    def _teacher_size(self, grid: tuple[int, int]) -> int:
        """The teacher's input size where the student has this grid."""
        own = self.teacher.image_size
        return own * grid[0] // self._grid[0] if self.teacher.follows else own

    @property
    def _out(self) -> int:
        return self.teacher.classes if self.target.kind == "logits" else self.teacher.width

    def _projector(self, rngs: nnx.Rngs) -> Projector:
        width, dtype, grad_dtype = self._student_width, self._dtype, self._grad_dtype
        return Projector(width, self._out, dtype=dtype, grad_dtype=grad_dtype, rngs=rngs)

    def _check_match(self, student: Any) -> None:
        if self.target.kind == "cls" and not self.cls:
            raise ConfigError(
                f"target.kind={self.target.kind!r} needs a class token on both sides; "
                f"student has {student.cls}, teacher has {self.teacher.cls}"
            )
        differ = self.target.kind == "full" and student.grid != self.teacher.grid
        if differ and self.target.resample == "none":
            want = self.teacher.token_side * student.grid[0]
            raise ConfigError(
                f"teacher grid {self.teacher.grid} != student grid {student.grid}: "
                f"set teacher.image_size to {want}, or target.resample to 'bilinear'"
            )
