"""Feature distillation: a student learns the feature map of a frozen teacher.

The method is in docs/reference.md#method.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import optax

from fd_jax import model_folder, optimizer
from fd_jax.cost import flops
from fd_jax.data.base import Data
from fd_jax.data.resolutions import Resolutions
from fd_jax.errors import ConfigError
from fd_jax.evaluation import evaluators
from fd_jax.metrics import weighted
from fd_jax.models import transfer
from fd_jax.models.features import FeatureMap
from fd_jax.models.spec import FAMILIES, ModelSpec
from fd_jax.precision import compute_dtype
from fd_jax.tasks import start
from fd_jax.tasks.encoder import TrainedEncoder, share_of
from fd_jax.tasks.goal import Goal, Target
from fd_jax.tasks.teacher import Teacher
from fd_jax.typing import Batch, Config, Metrics, PyTree

# The name of the teacher in a run with a single one. Its weights and its projector are not nested
# under a name, so that the trees are those of one network.
SINGLE_TEACHER = ""


class DistillTask:
    """The student and the goals that a config describes: what it learns from each teacher.

    The loss is the sum over the goals.

    Attributes:
      student_spec, student_def, student: the student, its graph definition and abstract network.
      changes: how it differs from the network in `student.init_from`; None without one.
      goals: goal for each teacher by name; a single teacher is named `SINGLE_TEACHER`.
      attention: name of the attention implementation of each network, the student first.
    """

    trains_encoder = True

    def __init__(
        self,
        config: Config,
        *,
        teacher_spec: ModelSpec | None = None,
        teachers: Mapping[str, Teacher] | None = None,
        student_spec: ModelSpec | None = None,
    ):
        """Checks the config and defines all networks; reads no weights.

        Args:
          config: see configs/base.py for the fields; one that `settings.check` accepts.
          teacher_spec: replaces the spec in the folder `config.teacher.path`, for planning without
            weights.
          teachers: several teachers by name, in place of `config.teacher`.
          student_spec: replaces the spec in the folder `config.student.init_from`, for planning
            without weights.

        Raises:
          ConfigError: the settings cannot work together; the message has the numbers.
          ModelFolderError: there is no teacher at `config.teacher.path`, or no network at
            `config.student.init_from`.
        """
        self.config = config
        self.dtype = compute_dtype(config.dtype)
        target = Target(**config.target)
        self._init_from: str = config.student.get("init_from", "")
        self.student_spec, self.changes = self._student(student_spec)
        if teachers is None:
            head = target.kind == "logits"
            teacher = Teacher(
                config.teacher,
                dtype=self.dtype,
                head=head,
                attention=config.attention,
                spec=teacher_spec,
            )
            teachers = {SINGLE_TEACHER: teacher}
        chosen = self.student_spec.choose_attention(config.attention, dtype=self.dtype)
        self.attention = {"student": chosen}
        for name, teacher in teachers.items():
            self.attention[f"teacher {name}".rstrip()] = teacher.attention
        resolutions = Resolutions.of(config)
        self._encoder = TrainedEncoder(
            self.student_spec,
            share=share_of(config, "student"),
            sizes=resolutions.others,
            **self._student_runtime(),
        )
        self.student_def, self.student = self._encoder.definition, self._encoder.network
        self._check_size()
        self.goals = {
            name: Goal(
                teacher,
                target,
                self.student,
                beta=config.loss_beta,
                dtype=self.dtype,
                grad_dtype=jnp.dtype(config.grad_reduce_dtype),
            )
            for name, teacher in teachers.items()
        }
        for size in resolutions.others:
            for goal in self.goals.values():
                goal.check_grid(self._encoder.grid(size), size)

    @property
    def goal(self) -> Goal:
        """The only goal of a run with one teacher."""
        (goal,) = self.goals.values()
        return goal

    @property
    def cls(self) -> bool:
        """Whether the student and its only teacher both have a class token."""
        return self.goal.cls

    def check_data(self, data: Data) -> None:
        """Checks that there are labels if `eval.knn` needs them; nothing else reads labels."""
        if self.config.eval.knn:
            data.number_labels()

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """A random student and a random projector for each teacher."""
        encoder_key, *projector_keys = jax.random.split(key, 1 + len(self.goals))
        keys = zip(self.goals.items(), projector_keys, strict=True)
        projectors = _nest_by_teacher({name: goal.init(key) for (name, goal), key in keys})
        return {"encoder": self._encoder.init(encoder_key), "projector": projectors}, {}

    def load_initial(self) -> PyTree:
        """The student to start or to continue from, of what trains; {} without a folder."""
        if not self._init_from and not self.config.init_from:
            return {}
        parts = self._stored(report=True)
        return {**parts, "encoder": self._encoder.divide(parts["encoder"])[0]}

    def load_frozen(self) -> PyTree:
        """The teachers' weights in the compute dtype, resized to their input sizes in this run.

        With them what is held of the student, if only a part of it trains.
        """
        teachers = {name: goal.teacher.load() for name, goal in self.goals.items()}
        return {**_nest_by_teacher(teachers), **self._encoder.load_held(self._stored_encoder)}

    def abstract_frozen(self) -> PyTree:
        """Shapes and dtypes of `load_frozen`, without reading weights."""
        teachers = {name: goal.teacher.abstract() for name, goal in self.goals.items()}
        return {**_nest_by_teacher(teachers), **self._encoder.abstract_held()}

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Adds the uniform random numbers for drop path, [B, depth, 2] for each network."""
        batch = dict(batch)
        student_key, *teacher_keys = jax.random.split(key, 1 + len(self.goals))
        rows = batch["image"].shape[0]
        if self.config.student.drop_path:
            batch["student_drops"] = jax.random.uniform(student_key, (rows, self.student.depth, 2))
        for (name, goal), teacher_key in zip(self.goals.items(), teacher_keys, strict=True):
            if goal.teacher.drop_path:
                shape = (rows, goal.teacher.depth, 2)
                batch[_drop_path_entry(name)] = jax.random.uniform(teacher_key, shape)
        return batch

    def loss(
        self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """Mean distance between the student's predictions and the teachers' targets."""
        targets = self.targets(frozen, batch)
        predictions = self.predictions(params, batch, frozen)
        total, count = weighted(self._distance(predictions, targets), batch["weight"])
        return total / count, (extra, {"loss": (total, count)})

    def evaluate(self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch) -> Metrics:
        """Loss and cosine similarity on held-out images, drop path off on both sides."""
        del extra
        targets = self.targets(frozen, batch)
        predictions = self.predictions(params, batch, frozen)
        weight = batch["weight"]
        metrics = {"loss": weighted(self._distance(predictions, targets), weight)}
        for name, goal in self.goals.items():
            agreement = goal.agreement(predictions[name], targets[name], weight)
            suffix = f"_{name}" if name else ""
            metrics |= {f"{metric}{suffix}": value for metric, value in agreement.items()}
        return metrics

    def features(self, params: PyTree, frozen: PyTree, batch: Batch) -> jax.Array:
        """The student's mean patch token after its final norm. -> [B, D_s] float32."""
        features = self._student_features(params, frozen, batch["image"], None)
        return jnp.mean(features.patches.astype(jnp.float32), axis=1)

    def targets(self, frozen: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """The target from each teacher; see `Goal.teacher_target`."""
        images = batch["image"]
        return {
            name: goal.teacher_target(
                _part_of_teacher(frozen, name),
                images,
                batch.get(_drop_path_entry(name)),
                grid=self._encoder.grid(images.shape[1]),
            )
            for name, goal in self.goals.items()
        }

    def predictions(
        self, params: PyTree, batch: Batch, frozen: PyTree | None = None
    ) -> dict[str, jax.Array]:
        """The student's tokens after its final norm, projected for each teacher. -> [B, T, D_t].

        Args:
          params: trained parameters.
          batch: with "image".
          frozen: frozen weights; needed if only a part of the student trains.
        """
        drops = batch.get("student_drops")
        features = self._student_features(params, frozen or {}, batch["image"], drops)
        return {
            name: goal.predict(_part_of_teacher(params["projector"], name), features)
            for name, goal in self.goals.items()
        }

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

    def flops_at(self, image_size: int) -> flops.Flops:
        """FLOPs of a step, for each image whose side is `image_size` pixels."""
        work = self._encoder.flops(image_size, remat=self.config.remat)
        grid = self._encoder.grid(image_size)
        return sum((goal.flops(image_size, grid) for goal in self.goals.values()), work)

    def flops(self) -> flops.Flops:
        """FLOPs of a step, per image."""
        return self.flops_at(self.config.data.image_size)

    def export(self, params: PyTree, extra: PyTree) -> tuple[ModelSpec, PyTree]:
        """The student and projector; the head of a logits student is its projector."""
        del extra
        encoder = self._encoder.whole(params["encoder"], self._stored_encoder)
        return self.student_spec, {**params, "encoder": encoder}

    def _student(self, initial: ModelSpec | None) -> tuple[ModelSpec, transfer.Changes | None]:
        """The student's spec, and how it differs from the network that it starts from, if any."""
        student = self.config.student
        source = f"distilled by fd_jax from {self.config.teacher.source}"
        if not self._init_from:
            return ModelSpec(student.family, student.arch.to_dict(), source=source), None
        initial = initial or model_folder.load_spec(epath.Path(self._init_from))
        changes = start.student_changes(self.config, initial)
        spec = dataclasses.replace(
            transfer.target_spec(initial, changes),
            classes=0,
            pooling="cls",
            source=f"{source}, started from {initial.source}",
            source_sha256=None,
            source_dtypes={},
        )
        return spec, changes

    def _stored_encoder(self) -> PyTree:
        """All parameters of the network that the student starts from, as host arrays."""
        return self._stored()["encoder"]

    def _stored(self, *, report: bool = False) -> PyTree:
        """The parts of the folder that the run starts from; `report` prints how they are used."""
        if self.changes is not None:
            return start.load(self._init_from, self.changes, parts={"projector"}, report=report)
        spec, parts = model_folder.load(self.config.init_from)
        if (spec.family, spec.arch) != (self.student_spec.family, self.student_spec.arch):
            raise ConfigError(
                f"init_from={self.config.init_from} holds {spec.family} {spec.arch}, "
                f"but the student is {self.student_spec.family} {self.student_spec.arch}"
            )
        return {name: parts[name] for name in ("encoder", "projector") if name in parts}

    def _student_features(
        self, params: PyTree, frozen: PyTree, images: jax.Array, drops: jax.Array | None
    ) -> FeatureMap:
        student = self._encoder.build(params["encoder"], frozen, images.shape[1])
        return student(self.student_spec.normalize(images, self.dtype), drops=drops)

    def _distance(
        self, predictions: dict[str, jax.Array], targets: dict[str, jax.Array]
    ) -> jax.Array:
        """Distance of each example, summed over the goals. -> [B]."""
        first, *others = (
            goal.distance(predictions[name], targets[name]) for name, goal in self.goals.items()
        )
        return sum(others, first)

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


def _nest_by_teacher(trees: dict[str, PyTree]) -> PyTree:
    """Nests the trees under the teachers' names; the tree of a single teacher is not nested."""
    return trees[SINGLE_TEACHER] if SINGLE_TEACHER in trees else trees


def _part_of_teacher(tree: PyTree, name: str) -> PyTree:
    """The part of a tree from `_nest_by_teacher` that belongs to one teacher."""
    return tree[name] if name else tree


def _drop_path_entry(name: str) -> str:
    """The name of the batch entry that holds a teacher's drop-path randomness."""
    return f"teacher_drops_{name}" if name else "teacher_drops"
