"""What a student learns from one teacher: target, projector and distance."""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from fd_jax import losses
from fd_jax.cost.flops import Flops
from fd_jax.errors import ConfigError
from fd_jax.metrics import weighted
from fd_jax.models.features import FeatureMap
from fd_jax.models.heads import MlpProjector, Projector, SeparateProjectors
from fd_jax.models.keys import param_keys
from fd_jax.models.spec import split
from fd_jax.normalization import kinds, statistics
from fd_jax.tasks import comparable, learning_flops
from fd_jax.tasks.parts import in_parts
from fd_jax.tasks.sections import Section
from fd_jax.tasks.stored import StoredTeacher
from fd_jax.tasks.teacher import Teacher, resize_map
from fd_jax.typing import Batch, Metrics, PyTree

Grid = tuple[int, int]  # (H, W) of patches

STATISTICS = "statistics"  # part of a goal's frozen arrays: constants of a fitted normalisation


class View(NamedTuple):
    """What is taken from one run of a teacher.

    Attributes:
      tokens: those that become the target, see `Goal.tokens`.
      attention: what its class token attends to, [B, P] float32, see
        `AttentionMap.of_class_token`; or None.
    """

    tokens: jax.Array
    attention: jax.Array | None = None


class Goal:
    """A teacher, the target taken from it, and the projector from the student to the target.

    Attributes:
      teacher: the teacher.
      section: what the config says about it.
      target: which of its features is the target.
      cls: whether student and teacher both have a class token.
      grid: (H, W) of the patches that are compared at the student's own image size, if the target
        is the map.
      projector_def: the projector's graph definition.
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
        """Checks that student and teacher can be compared.

        Args:
          teacher: teacher; it needs its head if the target is logits.
          section: what the config says about it.
          student: abstract student network.
          dtype: dtype of the projector's matmul.
          grad_dtype: dtype of the projector's weight gradient while it is summed over devices.

        Raises:
          ConfigError: they cannot be compared; the message has the numbers.
        """
        self.teacher, self.section, self.target = teacher, section, section.target
        self.cls = bool(student.cls and teacher.cls)
        self._dtype, self._grad_dtype = dtype, grad_dtype
        self._student_width, self._student_grid = student.width, student.grid
        self.grid = self.compared_grid(student.grid)
        comparable.check_tokens(section, student, teacher)
        comparable.check_relation(section, self._count(self.grid))
        comparable.check_grids(section, student, teacher)
        self.projector_def, _ = split(nnx.eval_shape(lambda: self._projector(param_keys(0))))

    def init(self, key: jax.Array) -> PyTree:
        """Random initial parameters of the projector."""
        return split(self._projector(param_keys(key)))[1]

    def init_state(self) -> PyTree:
        """What a running normalisation knows before the first step; {} for other ones."""
        if not self.target.running:
            return {}
        groups = self.target.groups(cls=self.cls)
        return {group: kinds.first_constants(self._out) for group in groups}

    def load(self) -> PyTree:
        """The teacher's weights as host arrays, and the constants of a fitted normalisation.

        Raises:
          ConfigError: there are no statistics, they are of another teacher, or of too few tokens.
        """
        constants = {STATISTICS: self._fitted_constants()} if self.target.fitted else {}
        return {**self.teacher.load(), **constants}

    def abstract(self) -> PyTree:
        """Shapes and dtypes of `load`, without reading anything."""
        if not self.target.fitted:
            return self.teacher.abstract()
        groups = self.target.groups(cls=self.cls)
        shapes = {group: kinds.fitted_shapes(self._out) for group in groups}
        return {**self.teacher.abstract(), STATISTICS: shapes}

    def tokens(
        self,
        weights: PyTree,
        images: jax.Array,
        drops: jax.Array | None,
        *,
        grid: Grid | None = None,
    ) -> jax.Array:
        """The teacher's tokens that become the target. -> [B, T, D_t], or [B, 1, K] logits.

        Args:
          weights: its share of the frozen arrays.
          images: [B, H, W, 3] uint8.
          drops: uniform random numbers for the teacher's drop path, [B, depth, 2], or None.
          grid: the student's grid for these images; None for that of its own image size.
        """
        return self.view(weights, images, drops, grid=grid).tokens

    def view(
        self,
        weights: PyTree,
        images: jax.Array,
        drops: jax.Array | None,
        *,
        grid: Grid | None = None,
        attends: bool = False,
    ) -> View:
        """`tokens`, with the attention of the teacher's class token if `attends`."""
        student_grid = grid or self._student_grid
        compared, size = self.compared_grid(student_grid), self._teacher_size(student_grid)

        def of_part(images: jax.Array, drops: jax.Array | None) -> View:
            run: dict[str, Any] = {"drops": drops, "image_size": size}
            maps, attention = self._maps(weights, images, attends=attends, **run)
            each = [self._target_tokens(weights, features, compared) for features in maps]
            return View(self._joined(each), attention)

        return in_parts(of_part, self.section.parts, images, drops)

    def at(self, tokens: jax.Array, visible: jax.Array) -> jax.Array:
        """Of a map's tokens, those of some patches, and the class token.

        Args:
          tokens: result of `tokens`. [B, T, D]; those of several levels are [B, K, T, D].
          visible: places of the patches on the compared grid. [B, P] int32
        """
        if self.target.kind != "full":
            return tokens
        first = int(self.cls)
        places = visible.reshape(len(visible), *(1,) * (tokens.ndim - 3), -1, 1)
        patches = jnp.take_along_axis(tokens[..., first:, :], places, axis=-2)
        return jnp.concatenate([tokens[..., :first, :], patches], axis=-2)

    def stored_tokens(
        self, weights: PyTree, batch: Batch, name: str, *, grid: Grid | None = None
    ) -> jax.Array:
        """What `tokens` returns, of the maps in a batch; for a `StoredTeacher`. -> [B, T, D_t]

        Args:
          weights: its share of the frozen arrays.
          batch: with the stored arrays, see `description.elements`.
          name: of the teacher; "" for the only one.
          grid: as in `tokens`.
        """
        assert isinstance(self.teacher, StoredTeacher)
        features = self.teacher.stored_features(weights, batch, name)
        return self._selected(features, self.compared_grid(grid or self._student_grid))

    def measured(
        self, state: PyTree, tokens: jax.Array, weight: jax.Array, steps: jax.Array
    ) -> PyTree:
        """What a running normalisation knows after one more step; see `Target.measured`."""
        tokens = jax.lax.stop_gradient(tokens)
        return self.target.measured(state, tokens, weight, steps=steps, cls=self.cls)

    def normalized(self, tokens: jax.Array, weights: PyTree, state: PyTree) -> jax.Array:
        """The target that the student predicts. -> [B, T, D_t] float32, or [B, 1, K] logits.

        Args:
          tokens: result of `tokens`.
          weights: the teacher's share of the frozen arrays.
          state: what a running normalisation knows.
        """
        if self.target.kind == "logits":
            return tokens
        constants = state if self.target.running else weights.get(STATISTICS, {})
        return jax.lax.stop_gradient(self.target.normalized(tokens, constants, cls=self.cls))

    def predict(
        self, projector: PyTree, features: FeatureMap, levels: Sequence[FeatureMap] = ()
    ) -> jax.Array:
        """The student's tokens, projected to the teacher's width. -> [B, T, D_t].

        Args:
          projector: its parameters.
          features: the student's map.
          levels: its maps after each of its blocks, which a `LevelGoal` reads.
        """
        return nnx.merge(self.projector_def, projector)(self._student_tokens(features))

    def last_level(self, tokens: jax.Array) -> jax.Array:
        """Of targets or predictions, the map that reports and pictures show. -> [B, T, D_t]."""
        return tokens

    def lifted(self, projector: PyTree, vectors: jax.Array) -> jax.Array:
        """Vectors of the student's width, projected. [B, D_s] -> [B, D_t] float32"""
        return nnx.merge(self.projector_def, projector)(vectors).astype(jnp.float32)

    def distance(self, prediction: jax.Array, target: jax.Array) -> jax.Array:
        """Weighted distance of each example. [B, T, D] x 2 -> [B] float32."""
        if self.target.kind == "logits":
            own = losses.cross_entropy(prediction[:, 0], jax.nn.softmax(target[:, 0]))
            return _scaled(own, self.section.weight)
        share = self.section.loss.class_share
        if not share:
            return _scaled(self._over_tokens(prediction, target), self.section.weight)
        of_class = self._over_tokens(prediction[:, :1], target[:, :1])
        of_patches = self._over_tokens(prediction[:, 1:], target[:, 1:])
        return _scaled(share * of_class + (1 - share) * of_patches, self.section.weight)

    def agreement(self, prediction: jax.Array, target: jax.Array, weight: jax.Array) -> Metrics:
        """Held-out metrics besides the distance: cosine similarity, or {} for logits."""
        if self.target.kind == "logits":
            return {}
        similarity = losses.cosine_similarity(prediction, target)
        cosine = jnp.mean(similarity, axis=tuple(range(1, similarity.ndim)))
        return {"cosine": weighted(cosine, weight)}

    def flops(
        self,
        image_size: int,
        grid: Grid | None = None,
        *,
        patches: int | None = None,
        attends: bool = False,
    ) -> Flops:
        """FLOPs of teacher, projector and loss for one image.

        Args:
          image_size: its side in pixels.
          grid: the student's grid for this size; None for that of its own image size.
          patches: number of patches that the student sees; None for all.
          attends: whether the attention of the teacher's class token is read.
        """
        student_grid = grid or self._student_grid
        size = self._teacher_size(student_grid)
        work = self.teacher.flops(image_size, size, until=self._until, attends=attends)
        return work + self._flops_of_learning(student_grid, patches)

    def compared_grid(self, student_grid: Grid) -> Grid:
        """(H, W) of the patches that are compared where the student's map has `student_grid`."""
        if self.target.resample != "student":
            return student_grid
        return self.teacher_grid(student_grid)

    def teacher_grid(self, student_grid: Grid) -> Grid:
        """(H, W) of the teacher's map where the student's has `student_grid`."""
        return self.teacher.grid_at(self._teacher_size(student_grid))

    def check_grid(self, grid: Grid, image_size: int) -> None:
        """Refuses a size of training images for which the two maps cannot be compared.

        Args:
          grid: the student's grid for images of this size.
          image_size: side of the images in pixels.

        Raises:
          ConfigError: the teacher cannot follow to this size, or stays on another grid, or the loss
            needs more tokens.
        """
        where = f"images of {image_size} px, in data.sizes or data.phases, give the student {grid}"
        follow, rows = self.section.field("follow"), self._student_grid[0]
        side = self.teacher.image_size * grid[0]
        if self.teacher.follows and side % rows:
            raise ConfigError(
                f"{where} patches, for which the {self.section.role} would need {side / rows:g} "
                f"px; leave that size out, or set {follow}=False"
            )
        try:
            there = self.teacher_grid(grid)
        except ConfigError as error:
            raise ConfigError(f"{where} patches, and the {self.section.role}: {error}") from error
        if self.target.kind == "full" and there != grid and self.target.resample == "none":
            raise ConfigError(
                f"{where} patches, but the {self.section.role} has {there}: set {follow}=True, "
                "with which its input follows the student's, or "
                f"{self.section.field('target.resample')} to 'bilinear'"
            )
        comparable.check_relation(self.section, self._count(self.compared_grid(grid)))

    def _selected(self, features: FeatureMap, compared: Grid) -> jax.Array:
        """The tokens of a map that are compared, on this grid. -> [B, T, D]"""
        if self.target.kind == "full" and features.grid != compared:
            features = resize_map(features, compared)
        return self.target.select(features, cls=self.cls)

    def _over_tokens(self, prediction: jax.Array, target: jax.Array) -> jax.Array:
        """The sum of the distances that have a weight. -> [B]"""
        loss = self.section.loss
        first, *others = (
            _scaled(losses.DISTANCES[name](prediction, target, loss.beta), weight)
            for name, weight in loss.weights.items()
            if weight
        )
        return sum(others, first)

    def _teacher_size(self, student_grid: Grid) -> int:
        """The teacher's input size where the student's map has this grid."""
        own = self.teacher.image_size
        return own * student_grid[0] // self._student_grid[0] if self.teacher.follows else own

    @property
    def _out(self) -> int:
        return self.teacher.classes if self.target.kind == "logits" else self.teacher.width

    @property
    def _hidden(self) -> int:
        return self.section.projector.hidden or self.teacher.width

    @property
    def _until(self) -> int | None:
        """Number of the teacher's first blocks that run; None for all."""
        return None

    def _count(self, compared: Grid, patches: int | None = None) -> int:
        """Number of tokens that are compared, on a grid from `compared_grid` or of some patches."""
        if self.target.kind != "full":
            return 1
        return (math.prod(compared) if patches is None else patches) + int(self.cls)

    def _maps(
        self, weights: PyTree, images: jax.Array, *, attends: bool, **run: Any
    ) -> tuple[list[FeatureMap], jax.Array | None]:
        """The teacher's maps that the target is taken from, and the attention of `View`."""
        final_norm = self.target.after_norm
        if attends:
            last = [self.teacher.depth - 1]
            return self.teacher.attending(weights, images, last, final_norm=final_norm, **run)
        return [self.teacher.features(weights, images, final_norm=final_norm, **run)], None

    def _target_tokens(self, weights: PyTree, features: FeatureMap, compared: Grid) -> jax.Array:
        """The tokens of one of the teacher's maps. -> [B, T, D_t], or [B, 1, K] logits."""
        if self.target.kind == "logits":
            return self.teacher.logits(weights, features)[:, None]
        return self._selected(features, compared)

    def _joined(self, each: list[jax.Array]) -> jax.Array:
        """The tokens of all maps of `_maps`."""
        (tokens,) = each
        return tokens

    def _student_tokens(self, features: FeatureMap) -> jax.Array:
        """The tokens of one of the student's maps that are projected. -> [B, T, D_s]"""
        return self._selected(features, self.compared_grid(features.grid))

    def _projector(self, rngs: nnx.Rngs) -> Any:
        shape, width, out = self.section.projector, self._student_width, self._out
        runtime = {"dtype": self._dtype, "grad_dtype": self._grad_dtype}

        def make(rngs: nnx.Rngs) -> Projector | MlpProjector:
            if shape.kind == "linear":
                return Projector(width, out, **runtime, rngs=rngs)
            return MlpProjector(width, self._hidden, out, **runtime, rngs=rngs)

        return SeparateProjectors(make, rngs=rngs) if shape.separate else make(rngs)

    def _fitted_constants(self) -> dict[str, dict[str, np.ndarray]]:
        """The constants of each group of tokens, from the file of statistics."""
        path = self.target.statistics
        found = statistics.load(path, self.teacher.origin(after_norm=self.target.after_norm))
        constants = {}
        for group in self.target.groups(cls=self.cls):
            if group not in found:
                raise ConfigError(
                    f"{path} has statistics of {', '.join(found)} tokens, but this run needs those "
                    f"of {group} tokens; measure them with python -m fd_jax.target_stats"
                )
            try:
                constants[group] = kinds.fitted_constants(self.target.normalize, found[group])
            except ValueError as error:
                raise ConfigError(f"{path}, {group}: {error}") from None
        return constants

    def _flops_of_learning(self, student_grid: Grid, patches: int | None) -> Flops:
        """What one map of the teacher costs besides the teacher itself."""
        count = self._count(self.compared_grid(student_grid), patches)
        width = self._student_width
        hidden = None if self.section.projector.kind == "linear" else self._hidden
        work = learning_flops.projector(count, width, hidden, self._out)
        if self.target.kind == "full":
            grids = (student_grid, self.teacher_grid(student_grid))
            widths = (width, self.teacher.width)
            work += learning_flops.resampling(self.target.resample, grids, widths)
        if self.target.fitted:
            work += Flops(2.0 * count * self._out**2)
        loss = self.section.loss
        if loss.weights.get("relation", 0.0) and self.target.kind == "full":
            work += learning_flops.relations(count, self._out, separate=bool(loss.class_share))
        return work


def _scaled(value: jax.Array, factor: float) -> jax.Array:
    """The product, without a multiplication by 1 in the program."""
    return value if factor == 1.0 else factor * value
