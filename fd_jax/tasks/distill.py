"""Feature distillation: a student learns the features of one or several frozen teachers.

The method is in docs/reference.md#method, that of several teachers in docs/several_teachers.md, and
that of students that see some of the patches in docs/masked_students.md.
"""

from collections.abc import Mapping
import dataclasses
import math
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
from fd_jax.models import levels, transfer, trees
from fd_jax.models.features import FeatureMap
from fd_jax.models.spec import FAMILIES, ModelSpec
from fd_jax.precision import compute_dtype
from fd_jax.tasks import goals, masking, sections, start, stored
from fd_jax.tasks.base import EXTRA
from fd_jax.tasks.dropping import Dropping, loss_of_kept
from fd_jax.tasks.encoder import TrainedEncoder, share_of
from fd_jax.tasks.goal import Goal
from fd_jax.tasks.goals import STANDARDIZED, Goals, metric_name
from fd_jax.tasks.levels import LevelGoal
from fd_jax.tasks.of_teacher import OfTeacher
from fd_jax.tasks.sections import SINGLE_TEACHER
from fd_jax.tasks.teacher import Teacher
from fd_jax.typing import Batch, Config, Metrics, PyTree

# The student's last map, and those after each of its blocks if a goal mixes them, or else none.
Maps = tuple[FeatureMap, list[FeatureMap]]

# The part of the state that holds the teachers' running losses, and the entry of a batch with the
# random numbers by which teachers are dropped.
DROPPING, DROPPING_DRAWS = "dropping", "teacher_dropping"
# The part of the state with the running statistics of a student's BatchNorms.
BATCH_NORM = "batch_norm"
# The part of a model folder that holds what running normalisations have measured.
TARGET_STATISTICS = "target_statistics"


class DistillTask:
    """The student and the goals that a config describes: what it learns from each teacher.

    The loss is the sum over the goals, or over those that `config.dropping` keeps.

    Attributes:
      student_spec, student_def, student: the student, its graph definition and abstract network.
      exported_spec: what `export` describes: the student, with its projector if that is kept.
      changes: how it differs from the network in `student.init_from`; None without one.
      goals: what it learns from each teacher; a single teacher is named `SINGLE_TEACHER`.
      dropping: which teachers an image learns from; None for all.
      mask: which patches of a training image the student sees; None for all.
      attention: name of the attention implementation of each network, the student first.
    """

    trains_encoder = True

    def __init__(
        self,
        config: Config,
        *,
        teacher_spec: ModelSpec | None = None,
        teacher_specs: Mapping[str, ModelSpec] | None = None,
        student_spec: ModelSpec | None = None,
    ):
        """Checks the config and defines all networks; reads no weights.

        Args:
          config: see configs/base.py for the fields; one that `settings.check` accepts.
          teacher_spec: replaces the spec in the folder of the only teacher, for planning without
            weights.
          teacher_specs: the same by the names of several teachers.
          student_spec: replaces the spec in the folder `config.student.init_from`, for planning
            without weights.

        Raises:
          ConfigError: the settings cannot work together; the message has the numbers.
          ModelFolderError: there is no teacher at the path of its section, or no network at
            `config.student.init_from`.
        """
        self.config = config
        self.dtype = compute_dtype(config.dtype)
        specs = {SINGLE_TEACHER: teacher_spec, **(teacher_specs or {})}
        named = sections.of(config)
        origins = " and ".join(each.network.source or each.name for each in named.values())
        self._init_from: str = config.student.get("init_from", "")
        self.student_spec, self.changes = self._student(origins, student_spec)
        chosen = self.student_spec.choose_attention(config.attention, dtype=self.dtype)
        self.attention = {"student": chosen}
        resolutions = Resolutions.of(config)
        self._encoder = TrainedEncoder(
            self.student_spec,
            share=share_of(config, "student"),
            sizes=resolutions.others,
            measures=True,
            **self._student_runtime(),
        )
        self.student_def, self.student = self._encoder.definition, self._encoder.network
        self._check_size()
        self._check_whole_batch()
        self.goals = Goals(
            {name: self._goal(section, specs.get(name)) for name, section in named.items()}
        )
        self._keeps = bool(config.student.get("keep_projector", False))
        self.exported_spec = self._exported_spec()
        for name, goal in self.goals.each.items():
            if name not in self.goals.stored:
                self.attention[goal.section.role] = goal.teacher.attention
        for size in resolutions.others:
            self.goals.check_grid(self._encoder.grid(size), size)
        sides = (config.data.image_size, *resolutions.others)
        grids = {side: self._encoder.grid(side) for side in sides}
        self.mask = masking.of(config, self.student_spec, self.goals.each, grids)
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
        projectors = self.goals.init(projector_keys)
        params = {"encoder": self._encoder.init(encoder_key), "projector": projectors}
        return params, self._init_extra()

    def load_initial(self) -> PyTree:
        """The student to start or to continue from, of what trains; {} without a folder."""
        if not self._init_from and not self.config.init_from:
            return {}
        parts = self._stored(report=True)
        trained = {**parts, "encoder": self._encoder.divide(parts["encoder"])[0]}
        statistics = self._encoder.statistics(parts["encoder"])
        return {**trained, EXTRA: {BATCH_NORM: statistics}} if statistics else trained

    def load_frozen(self) -> PyTree:
        """The teachers' weights in the compute dtype, resized to their input sizes in this run.

        With them what is held of the student, if only a part of it trains.
        """
        return {**self.goals.load(), **self._encoder.load_held(self._stored_encoder)}

    def abstract_frozen(self) -> PyTree:
        """Shapes and dtypes of `load_frozen`, without reading weights."""
        return {**self.goals.abstract(), **self._encoder.abstract_held()}

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Adds the uniform random numbers for drop path, [B, depth, 2] for each network.

        With teacher dropping also those for the K teachers, [B, K], and for a masked student those
        for the patches, [B, H*W].
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
        if self.mask is not None:
            patches = math.prod(self._grid(batch))
            mask_key = jax.random.fold_in(key, 2)
            batch[masking.DRAWS] = jax.random.uniform(mask_key, (rows, patches))
        return batch

    def loss(
        self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """Distance between the student's predictions and the teachers' targets."""
        weight = batch["weight"]
        tokens, visible = self._seen(frozen, batch)
        extra = self.goals.measured(extra, tokens, weight)
        targets = self.goals.normalized(self.goals.at(tokens, visible), frozen, extra)
        run = {"drops": batch.get("student_drops"), "keep": visible}
        maps, extra = self._maps(params, extra, frozen, batch, trains=True, **run)
        each = self.goals.distances(self._predicted(params, maps), targets)
        total, count = weighted(goals.total(each), weight)
        loss, metrics = total / count, goals.by_teacher("loss", each, weight)
        if self.dropping is not None:
            loss, extra, kept = self._of_kept(each, extra, batch)
            total, metrics = loss * count, metrics | kept
        return loss, (extra, {"loss": (total, count), **metrics})

    def evaluate(self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch) -> Metrics:
        """Loss and cosine similarity on held-out images, with all teachers and without drop path.

        A masked student sees all patches here, as it does in use.
        The loss of each of several teachers is named "loss/" and its name, and so on.
        """
        targets = self.targets(frozen, batch, extra)
        predictions = self.predictions(params, batch, frozen, extra)
        weight = batch["weight"]
        each = self.goals.distances(predictions, targets)
        metrics = {"loss": weighted(goals.total(each), weight)}
        metrics |= goals.by_teacher("loss", each, weight)
        for name, goal in self.goals.each.items():
            agreement = goal.agreement(predictions[name], targets[name], weight)
            metrics |= {metric_name(metric, name): value for metric, value in agreement.items()}
        return metrics

    def features(self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch) -> jax.Array:
        """The student's mean patch token, as the exported network has it. -> [B, D] float32."""
        (features, _), _ = self._maps(params, extra, frozen, batch)
        mean = jnp.mean(features.patches.astype(jnp.float32), axis=1)
        return self.goal.lifted(params["projector"], mean) if self._keeps else mean

    def targets(
        self, frozen: PyTree, batch: Batch, extra: PyTree | None = None
    ) -> dict[str, jax.Array]:
        """The target from each teacher; see `Goal.normalized`."""
        tokens = self.goals.tokens(frozen, batch, self._grid(batch))
        return self.goals.normalized(tokens, frozen, extra or self._init_extra())

    def predictions(
        self,
        params: PyTree,
        batch: Batch,
        frozen: PyTree | None = None,
        extra: PyTree | None = None,
        *,
        visible: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """The student's tokens after its final norm, projected for each teacher. -> [B, T, D_t].

        Args:
          params: trained parameters, or those of an exported folder.
          batch: with "image".
          frozen: frozen weights; needed if only a part of the student trains.
          extra: state that is not trained; needed if a student with BatchNorm is not of a folder.
          visible: places of the patches that the student sees, [B, P] int32; None for all.
        """
        maps, _ = self._maps(params, extra or {}, frozen or {}, batch, keep=visible)
        return self._predicted(params, maps)

    def _predicted(self, params: PyTree, maps: Maps) -> dict[str, jax.Array]:
        return {
            name: goal.predict(goals.part_of(params["projector"], name), *maps)
            for name, goal in self.goals.each.items()
        }

    def of_teacher(self, name: str, extra: PyTree | None = None) -> OfTeacher:
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
            no_decay=(*FAMILIES[self.student_spec.family].NO_DECAY, *levels.NO_DECAY),
        )

    def evaluators(self) -> list[evaluators.Evaluator]:
        """Held-out loss and cosine similarity, and nearest neighbours if `eval.knn` is set.

        There are no loss and no similarity where a teacher does not run, and only maps of training
        pictures are stored.
        """
        return evaluators.from_config(self.config, held_out=self.goals.of_held_out)

    def flops_at(self, image_size: int) -> flops.Flops:
        """FLOPs of a step, for each image whose side is `image_size` pixels."""
        grid, mask = self._encoder.grid(image_size), self.mask
        patches = None if mask is None else mask.count(grid)
        guide = None if mask is None else mask.guide
        work = self._encoder.flops(image_size, remat=self.config.remat, patches=patches)
        return sum(self.goals.flops(image_size, grid, patches=patches, guide=guide), work)

    def flops(self) -> flops.Flops:
        """FLOPs of a step, per image."""
        return self.flops_at(self.config.data.image_size)

    def export(self, params: PyTree, extra: PyTree) -> tuple[ModelSpec, PyTree]:
        """The student and its projectors; the head of a logits student is its projector.

        Where targets are standardized, also the means and variances.
        """
        encoder = self._encoder.whole(params["encoder"], self._stored_encoder)
        parts = self.as_stored({**params, "encoder": encoder}, extra)
        if self._keeps:
            lift = parts.pop("projector")
            parts["encoder"] = {**parts["encoder"], "lift": lift}
        if STANDARDIZED in extra:
            parts[TARGET_STATISTICS] = extra[STANDARDIZED]
        return self.exported_spec, parts

    def from_stored(self, parts: PyTree) -> PyTree:
        """The parts of an exported folder, with a kept projector in its place for training."""
        if not self._keeps:
            return parts
        encoder = dict(parts["encoder"])
        return {**parts, "projector": encoder.pop("lift"), "encoder": encoder}

    def as_stored(self, params: PyTree, extra: PyTree) -> PyTree:
        """The parameters with the running statistics of BatchNorms, as a folder has them."""
        if BATCH_NORM not in extra:
            return params
        return {**params, "encoder": trees.joined(params["encoder"], extra[BATCH_NORM])}

    def extra_of(self, parts: PyTree) -> PyTree:
        """The state that is not trained, as far as the parts of an exported folder tell it."""
        extra = self._init_extra()
        if statistics := self._encoder.statistics(parts.get("encoder", {})):
            extra[BATCH_NORM] = statistics
        if TARGET_STATISTICS in parts:
            extra[STANDARDIZED] = parts[TARGET_STATISTICS]
        return extra

    def _goal(self, section: sections.Section, spec: ModelSpec | None) -> Goal:
        if stored.folder_of(section):
            teacher = stored.StoredTeacher(section, dtype=self.dtype)
        else:
            teacher = Teacher(
                section.network,
                dtype=self.dtype,
                head=section.target.kind == "logits",
                attention=self.config.attention,
                spec=spec,
            )
        grad_dtype = jnp.dtype(self.config.grad_reduce_dtype)
        kind = LevelGoal if section.target.blocks else Goal
        return kind(teacher, section, self.student, dtype=self.dtype, grad_dtype=grad_dtype)

    def _student(
        self, teachers: str, initial: ModelSpec | None
    ) -> tuple[ModelSpec, transfer.Changes | None]:
        """The student's spec, and how it differs from the network that it starts from, if any.

        Args:
          teachers: where they come from, for the spec's source.
          initial: spec of that network; None to read it from its folder.
        """
        student = self.config.student
        source = f"distilled by fd_jax from {teachers}"
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
        wanted = self.exported_spec
        if (spec.family, spec.arch) != (wanted.family, wanted.arch):
            raise ConfigError(
                f"init_from={self.config.init_from} holds {spec.family} {spec.arch}, "
                f"but the student is {wanted.family} {wanted.arch}"
            )
        parts = self.from_stored(parts)
        return {name: parts[name] for name in ("encoder", "projector") if name in parts}

    def _grid(self, batch: Batch) -> tuple[int, int]:
        """The student's grid for the size of these images."""
        return self._encoder.grid(batch["image"].shape[1])

    def _seen(self, frozen: PyTree, batch: Batch) -> tuple[dict[str, jax.Array], jax.Array | None]:
        """The teachers' tokens, and the patches that the student sees, [B, P]; None for all."""
        if self.mask is None:
            return self.goals.tokens(frozen, batch, self._grid(batch)), None
        views = self.goals.views(frozen, batch, self._grid(batch), guide=self.mask.guide)
        attention = None if self.mask.guide is None else views[self.mask.guide].attention
        visible = self.mask.visible(batch[masking.DRAWS], attention)
        return {name: view.tokens for name, view in views.items()}, visible

    def _init_extra(self) -> PyTree:
        extra = self.goals.init_state()
        dropping = self.dropping.init(len(self.goals.each)) if self.dropping is not None else {}
        statistics = self._encoder.init_statistics()
        more = {DROPPING: dropping, BATCH_NORM: statistics}
        return {**extra, **{name: state for name, state in more.items() if state}}

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

    def _maps(
        self,
        params: PyTree,
        extra: PyTree,
        frozen: PyTree,
        batch: Batch,
        *,
        trains: bool = False,
        **run: Any,
    ) -> tuple[Maps, PyTree]:
        """The student's maps of the images of a batch, and the state after it.

        Args:
          params: trained parameters; those of a folder hold running statistics themselves.
          extra: state that is not trained.
          frozen: frozen weights of the run.
          batch: with "image".
          trains: whether BatchNorms use the statistics of the batch, and measure the running ones.
          **run: further arguments of the network: `drops` and `keep`.
        """
        encoder, images = params["encoder"], batch["image"]
        known = None if self._encoder.statistics(encoder) else extra.get(BATCH_NORM)
        student = self._encoder.build(encoder, frozen, images.shape[1], known)
        images = self.student_spec.normalize(images, self.dtype)
        if any(goal.target.blocks for goal in self.goals.each.values()):
            maps = student.intermediates(images, range(student.depth), **run)
            return (student.normed(maps[-1]), maps), extra
        if not trains:
            return (student(images, **run), []), extra
        features, statistics = student.measured(images, **run)
        return (features, []), {**extra, BATCH_NORM: statistics} if statistics else extra

    def _student_runtime(self) -> dict[str, Any]:
        return {
            "drop_path": self.config.student.drop_path,
            "init": "fd_student",
            "dtype": self.dtype,
            "grad_dtype": jnp.dtype(self.config.grad_reduce_dtype),
            "attention": self.attention["student"],
            "remat": self.config.remat or None,
        }

    def _exported_spec(self) -> ModelSpec:
        """The student's spec, with the width of its kept projector.

        Raises:
          ConfigError: there is not one linear map of all tokens that could be kept.
        """
        if not self._keeps:
            return self.student_spec
        each = list(self.goals.each.values())
        shape, kind = each[0].section.projector, each[0].target.kind
        lift = self.student_spec.arch.get("lift")
        reasons = {
            f"there are {len(each)} teachers, each with a projector of its own": len(each) > 1,
            f"target.kind={kind!r} trains a head": kind == "logits",
            f"target.blocks={tuple(each[0].target.blocks)} has one for each block": bool(
                each[0].target.blocks
            ),
            f"projector.kind={shape.kind!r} has two layers": shape.kind != "linear",
            "projector.separate=True has one for the class token": shape.separate,
            f"the features of the student are lifted to {lift} channels already": bool(lift),
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise ConfigError(
                f"student.keep_projector=True keeps one linear map of all tokens, but {found[0]}; "
                "change that, or set keep_projector=False"
            )
        arch = {**self.student_spec.arch, "lift": each[0].teacher.width}
        return dataclasses.replace(self.student_spec, arch=arch)

    def _check_whole_batch(self) -> None:
        parts = self.config.accumulation
        if parts > 1 and self._encoder.has_statistics:
            raise ConfigError(
                f"accumulation={parts}: the BatchNorms of a student of the family "
                f"{self.student_spec.family!r} are over the whole batch, and micro-batches would "
                "each have statistics of their own; set accumulation=1, and remat='full' or a "
                "larger mesh if memory is short"
            )

    def _check_size(self) -> None:
        data_size, student_size = self.config.data.image_size, self.student.image_size
        if data_size != student_size:
            raise ConfigError(
                f"data.image_size={data_size}, but student.arch.image_size={student_size}; "
                "they must be equal"
            )
