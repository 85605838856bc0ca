"""Feature distillation: a student learns the features of one or several frozen teachers.

The method is in docs/reference.md#method, and that of several teachers in
docs/several_teachers.md.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from fd_jax import model_folder, optimizer
from fd_jax.cost import flops
from fd_jax.data.base import Data
from fd_jax.errors import ConfigError
from fd_jax.evaluation import evaluators
from fd_jax.metrics import weighted
from fd_jax.models.features import FeatureMap
from fd_jax.models.keys import param_keys
from fd_jax.models.spec import FAMILIES, ModelSpec, split
from fd_jax.precision import compute_dtype
from fd_jax.tasks import goals, sections
from fd_jax.tasks.dropping import Dropping, loss_of_kept
from fd_jax.tasks.goal import Goal
from fd_jax.tasks.goals import STANDARDIZED, Goals, metric_name
from fd_jax.tasks.sections import SINGLE_TEACHER
from fd_jax.tasks.teacher import Teacher
from fd_jax.typing import Batch, Config, Metrics, PyTree

# The part of the state that holds the teachers' running losses, and the entry of a batch with the
# random numbers by which teachers are dropped.
DROPPING, DROPPING_DRAWS = "dropping", "teacher_dropping"
# The part of a model folder that holds what running normalisations have measured.
TARGET_STATISTICS = "target_statistics"


class DistillTask:
    """The student and the goals that a config describes: what it learns from each teacher.

    The loss is the sum over the goals, or over those that `config.dropping` keeps.

    Attributes:
      student_spec, student_def, student: the student, its graph definition and abstract network.
      goals: what it learns from each teacher; a single teacher is named `SINGLE_TEACHER`.
      dropping: which teachers an image learns from; None for all.
      attention: name of the attention implementation of each network, the student first.
    """

    trains_encoder = True

    def __init__(
        self,
        config: Config,
        *,
        teacher_spec: ModelSpec | None = None,
        teacher_specs: Mapping[str, ModelSpec] | None = None,
    ):
        """Checks the config and defines all networks; reads no weights.

        Args:
          config: see configs/base.py for the fields; one that `settings.check` accepts.
          teacher_spec: replaces the spec in the folder of the only teacher, for planning without
            weights.
          teacher_specs: the same by the names of several teachers.

        Raises:
          ConfigError: the settings cannot work together; the message has the numbers.
          ModelFolderError: there is no teacher at the path of its section.
        """
        self.config = config
        self.dtype = compute_dtype(config.dtype)
        specs = {SINGLE_TEACHER: teacher_spec, **(teacher_specs or {})}
        named = sections.of(config)
        origins = " and ".join(each.network.source or each.name for each in named.values())
        self.student_spec = ModelSpec(
            family=config.student.family,
            arch=config.student.arch.to_dict(),
            source=f"distilled by fd_jax from {origins}",
        )
        chosen = self.student_spec.choose_attention(config.attention, dtype=self.dtype)
        self.attention = {"student": chosen}
        self.student_def, shapes = self.student_spec.abstract(**self._student_runtime())
        self.student: Any = nnx.merge(self.student_def, shapes)
        self._check_size()
        self.goals = Goals(
            {name: self._goal(section, specs.get(name)) for name, section in named.items()}
        )
        for goal in self.goals.each.values():
            self.attention[goal.section.role] = goal.teacher.attention
        rate = config.dropping.rate if "dropping" in config else 0.0
        self.dropping = Dropping(**config.dropping) if rate else None

    @property
    def goal(self) -> Goal:
        """The only goal of a run with one teacher."""
        return self.goals.only

    @property
    def cls(self) -> bool:
        """Whether the student and its only teacher both have a class token."""
        return self.goal.cls

    def check_data(self, data: Data) -> None:
        """Checks that there are labels if `eval.knn` needs them; nothing else reads labels."""
        if self.config.eval.knn:
            data.number_labels()

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """A random student, a random projector for each teacher, and what is measured meanwhile."""
        encoder_key, *projector_keys = jax.random.split(key, 1 + len(self.goals.each))
        encoder = self.student_spec.build(rngs=param_keys(encoder_key), **self._student_runtime())
        projectors = self.goals.init(projector_keys)
        return {"encoder": split(encoder)[1], "projector": projectors}, self._init_extra()

    def load_initial(self) -> PyTree:
        """The student in `init_from`, to continue from; {} if `init_from` is empty."""
        if not self.config.init_from:
            return {}
        spec, parts = model_folder.load(self.config.init_from)
        if (spec.family, spec.arch) != (self.student_spec.family, self.student_spec.arch):
            raise ConfigError(
                f"init_from={self.config.init_from} holds {spec.family} {spec.arch}, "
                f"but the student is {self.student_spec.family} {self.student_spec.arch}"
            )
        return {name: parts[name] for name in ("encoder", "projector") if name in parts}

    def load_frozen(self) -> PyTree:
        """The teachers' weights in the compute dtype, resized to their input sizes in this run."""
        return self.goals.load()

    def abstract_frozen(self) -> PyTree:
        """Shapes and dtypes of `load_frozen`, without reading weights."""
        return self.goals.abstract()

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Adds the uniform random numbers for drop path, [B, depth, 2] for each network.

        With teacher dropping also those for the K teachers, [B, K].
        """
        batch = dict(batch)
        student_key, *teacher_keys = jax.random.split(key, 1 + len(self.goals.each))
        rows = batch["image"].shape[0]
        if self.config.student.drop_path:
            batch["student_drops"] = jax.random.uniform(student_key, (rows, self.student.depth, 2))
        batch |= self.goals.draws(rows, teacher_keys)
        if self.dropping is not None:
            shape = (rows, len(self.goals.each))
            batch[DROPPING_DRAWS] = jax.random.uniform(jax.random.fold_in(key, 1), shape)
        return batch

    def loss(
        self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """Distance between the student's predictions and the teachers' targets."""
        weight = batch["weight"]
        tokens = self.goals.tokens(frozen, batch)
        extra = self.goals.measured(extra, tokens, weight)
        targets = self.goals.normalized(tokens, frozen, extra)
        each = self.goals.distances(self.predictions(params, batch), targets)
        total, count = weighted(goals.total(each), weight)
        loss, metrics = total / count, goals.by_teacher("loss", each, weight)
        if self.dropping is not None:
            loss, extra, kept = self._of_kept(each, extra, batch)
            total, metrics = loss * count, metrics | kept
        return loss, (extra, {"loss": (total, count), **metrics})

    def evaluate(self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch) -> Metrics:
        """Loss and cosine similarity on held-out images, with all teachers and without drop path.

        The loss of each of several teachers is named "loss/" and its name, and so on.
        """
        targets = self.targets(frozen, batch, extra)
        predictions = self.predictions(params, batch)
        weight = batch["weight"]
        each = self.goals.distances(predictions, targets)
        metrics = {"loss": weighted(goals.total(each), weight)}
        metrics |= goals.by_teacher("loss", each, weight)
        for name, goal in self.goals.each.items():
            agreement = goal.agreement(predictions[name], targets[name], weight)
            metrics |= {metric_name(metric, name): value for metric, value in agreement.items()}
        return metrics

    def features(self, params: PyTree, frozen: PyTree, batch: Batch) -> jax.Array:
        """The student's mean patch token after its final norm. -> [B, D_s] float32."""
        del frozen
        features = self._student_features(params, batch["image"], None)
        return jnp.mean(features.patches.astype(jnp.float32), axis=1)

    def targets(
        self, frozen: PyTree, batch: Batch, extra: PyTree | None = None
    ) -> dict[str, jax.Array]:
        """The target from each teacher; see `Goal.normalized`."""
        tokens = self.goals.tokens(frozen, batch)
        return self.goals.normalized(tokens, frozen, extra or self._init_extra())

    def predictions(self, params: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """The student's tokens after its final norm, projected for each teacher. -> [B, T, D_t]."""
        features = self._student_features(params, batch["image"], batch.get("student_drops"))
        return {
            name: goal.predict(goals.part_of(params["projector"], name), features)
            for name, goal in self.goals.each.items()
        }

    def of_teacher(self, name: str, extra: PyTree | None = None) -> "OfTeacher":
        """The task, seen from one of its teachers; `extra` is the state that is not trained."""
        return OfTeacher(self, name, extra or self._init_extra())

    def teacher_target(self, frozen: PyTree, batch: Batch) -> jax.Array:
        """The target of a run with one teacher. -> [B, T, D_t] float32, or [B, 1, K] logits."""
        (target,) = self.targets(frozen, batch).values()
        return target

    def predict(self, params: PyTree, batch: Batch) -> jax.Array:
        """The prediction of a run with one teacher. -> [B, T, D_t]."""
        (prediction,) = self.predictions(params, batch).values()
        return prediction

    def optimizer(
        self, params: PyTree, *, steps_per_epoch: int, total_steps: int
    ) -> tuple[optax.GradientTransformation, optimizer.Schedule]:
        """The config's optimizer for the student and the projectors."""
        return optimizer.from_config(
            self.config,
            params,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            no_decay=FAMILIES[self.student_spec.family].NO_DECAY,
        )

    def evaluators(self) -> list[evaluators.Evaluator]:
        """Held-out loss and cosine similarity, and nearest neighbours if `eval.knn` is set."""
        return evaluators.from_config(self.config)

    def flops(self) -> flops.Flops:
        """FLOPs of a step, per image."""
        size = self.config.data.image_size
        work = flops.network(self.student_spec, trains=True, remat=self.config.remat)
        return sum(self.goals.flops(size), work)

    def export(self, params: PyTree, extra: PyTree) -> tuple[ModelSpec, PyTree]:
        """The student and its projectors; the head of a logits student is its projector.

        Where targets are standardized, also the means and variances.
        """
        if STANDARDIZED not in extra:
            return self.student_spec, params
        return self.student_spec, {**params, TARGET_STATISTICS: extra[STANDARDIZED]}

    def extra_of(self, parts: PyTree) -> PyTree:
        """The state that is not trained, as far as the parts of an exported folder tell it."""
        if TARGET_STATISTICS not in parts:
            return self._init_extra()
        return {**self._init_extra(), STANDARDIZED: parts[TARGET_STATISTICS]}

    def _goal(self, section: sections.Section, spec: ModelSpec | None) -> Goal:
        teacher = Teacher(
            section.network,
            dtype=self.dtype,
            head=section.target.kind == "logits",
            attention=self.config.attention,
            spec=spec,
        )
        grad_dtype = jnp.dtype(self.config.grad_reduce_dtype)
        return Goal(teacher, section, self.student, dtype=self.dtype, grad_dtype=grad_dtype)

    def _init_extra(self) -> PyTree:
        extra = self.goals.init_state()
        dropping = self.dropping.init(len(self.goals.each)) if self.dropping is not None else {}
        return {**extra, DROPPING: dropping} if dropping else extra

    def _of_kept(
        self, each: dict[str, jax.Array], extra: PyTree, batch: Batch
    ) -> tuple[jax.Array, PyTree, Metrics]:
        """The loss over the teachers that stay, the new state, and the share of each teacher."""
        assert self.dropping is not None
        weight, losses = batch["weight"], jnp.stack(list(each.values()), axis=1)
        fixed = jax.lax.stop_gradient(losses)
        state = self.dropping.average(extra.get(DROPPING, {}), fixed, weight)
        kept = self.dropping.kept(state, fixed, batch[DROPPING_DRAWS])
        extra = {**extra, DROPPING: state} if state else extra
        shares = {name: kept[:, column] for column, name in enumerate(each)}
        return loss_of_kept(losses, kept, weight), extra, goals.by_teacher("kept", shares, weight)

    def _student_features(
        self, params: PyTree, images: jax.Array, drops: jax.Array | None
    ) -> FeatureMap:
        student = nnx.merge(self.student_def, params["encoder"])
        return student(self.student_spec.normalize(images, self.dtype), drops=drops)

    def _student_runtime(self) -> dict[str, Any]:
        return {
            "drop_path": self.config.student.drop_path,
            "init": "fd_student",
            "dtype": self.dtype,
            "grad_dtype": jnp.dtype(self.config.grad_reduce_dtype),
            "attention": self.attention["student"],
            "remat": self.config.remat or None,
        }

    def _check_size(self) -> None:
        data_size, student_size = self.config.data.image_size, self.student.image_size
        if data_size != student_size:
            raise ConfigError(
                f"data.image_size={data_size}, but student.arch.image_size={student_size}; "
                "they must be equal"
            )


@dataclasses.dataclass(frozen=True)
class OfTeacher:
    """A task, seen from one of its teachers: what `evaluation.agreement` compares.

    Attributes:
      task: the task.
      name: the teacher's name.
      extra: state of the run that is not trained.
    """

    task: DistillTask
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
        """The target. `frozen` is the result of `load`. -> [B, T, D_t] float32."""
        tokens = self.goal.tokens(frozen, batch["image"], None)
        return self.task.goals.normalized_one(self.name, tokens, frozen, self.extra)

    def predict(self, params: PyTree, batch: Batch) -> jax.Array:
        """The student's prediction of the target. -> [B, T, D_t]."""
        return self.task.predictions(params, batch)[self.name]
