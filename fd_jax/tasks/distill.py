"""Feature distillation: a student learns the feature map of a frozen teacher.

The method is in docs/reference.md#method.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
import optax

from fd_jax import losses, model_folder, optimizer
from fd_jax.errors import ConfigError
from fd_jax.metrics import weighted
from fd_jax.models import resize
from fd_jax.models.features import FeatureMap
from fd_jax.models.heads import Classifier, Projector
from fd_jax.models.spec import FAMILIES, ModelSpec, split
from fd_jax.precision import compute_dtype
from fd_jax.tasks.base import apply_frozen
from fd_jax.typing import Batch, Config, Metrics, PyTree

if TYPE_CHECKING:  # data needs packages that planning does without
    from fd_jax.data.feed import Feed

TargetKind = Literal["full", "cls", "gap", "logits"]
Resample = Literal["none", "bilinear"]


@dataclasses.dataclass(frozen=True)
class Target:
    """What of the teacher is learned (docs/reference.md#table-2 and docs/reference.md#table-3).

    Attributes:
      kind: "full" the whole map (class token where both have one, and patches), "cls" the class
        token, "gap" the mean patch token, "logits" the class distribution of the teacher's head,
        learned from the student's class token or, where it has none, from its mean patch token.
      normalize: of the tokens, see `losses.normalize_target`; unused for logits.
      after_norm: whether the teacher's own final norm comes first (docs/reference.md#after-norm).
      resample: "bilinear" brings the teacher's patches to the student's grid, where those differ,
        before they are normalised; with "none", as in the original, unequal grids are refused.
    """

    kind: TargetKind
    normalize: losses.TargetNorm
    after_norm: bool
    resample: Resample = "none"

    def select(self, features: FeatureMap, *, cls: bool) -> jax.Array:
        """The tokens that are compared. -> [B, T, D]; `cls` tells whether both sides have one."""
        if self.kind == "gap":
            return jnp.mean(features.patches, axis=1, keepdims=True)
        if self.kind == "logits" and not features.cls:
            return jnp.mean(features.patches, axis=1, keepdims=True)
        if self.kind in ("cls", "logits"):
            return features.cls_token[:, None]
        return features.full if cls else features.patches


class DistillTask:
    """Student, teacher, target and loss of one run, from its config."""

    def __init__(self, config: Config, *, teacher_spec: ModelSpec | None = None):
        """Checks the config and defines both networks; reads no weights.

        Args:
          config: see configs/base.py for the fields.
          teacher_spec: stands in for `config.teacher.path`, for planning without weights.

        Raises:
          ConfigError: the combination cannot work, with the numbers.
          ModelFolderError: no teacher at `config.teacher.path`.
        """
        self.config = config
        self.dtype = compute_dtype(config.dtype)
        self.target = Target(**config.target)
        _check_choice("target.kind", self.target.kind, TargetKind.__args__)
        _check_choice("target.normalize", self.target.normalize, losses.TargetNorm.__args__)
        _check_choice("target.resample", self.target.resample, Resample.__args__)

        self.student_spec = ModelSpec(
            family=config.student.family,
            arch=config.student.arch.to_dict(),
            source=f"distilled by fd_jax from {config.teacher.source}",
        )
        spec = teacher_spec or _open_teacher(config)
        size = config.teacher.image_size or spec.arch["image_size"]
        self.teacher_resize = (spec.arch["image_size"], size)
        self.teacher_spec = dataclasses.replace(
            spec, arch={**_teacher_arch(spec, config.teacher.stages), "image_size": size}
        )

        self.attention = {
            role: spec.choose_attention(config.attention, dtype=self.dtype)
            for role, spec in (("student", self.student_spec), ("teacher", self.teacher_spec))
        }
        self.student_def, student = self.student_spec.abstract(**self._student_runtime())
        self.teacher_def, self._teacher_shapes = self.teacher_spec.abstract(
            dtype=self.dtype,
            drop_path=config.teacher.drop_path,
            attention=self.attention["teacher"],
        )
        self.student = nnx.merge(self.student_def, student)
        self.teacher = nnx.merge(self.teacher_def, self._teacher_shapes)
        self.cls = bool(self.student.cls and self.teacher.cls)
        self._check_match()
        self.classifier_def, self._classifier_shapes = None, {}
        if self.target.kind == "logits":
            self.classifier_def, self._classifier_shapes = split(
                nnx.eval_shape(lambda: self._classifier(nnx.Rngs(0)))
            )
        self.projector_def, _ = split(nnx.eval_shape(lambda: self._projector(nnx.Rngs(0))))

    def check_data(self, feed: "Feed") -> None:
        """Labels are read for nearest neighbours only."""
        if self.config.eval.knn:
            feed.check_labels()

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """A random student and projector."""
        encoder_key, projector_key = jax.random.split(key)
        encoder = self.student_spec.build(rngs=nnx.Rngs(encoder_key), **self._student_runtime())
        projector = self._projector(nnx.Rngs(projector_key))
        return {"encoder": split(encoder)[1], "projector": split(projector)[1]}, {}

    def load_initial(self) -> PyTree:
        """The student of `init_from`, where one is named, to train on from."""
        if not self.config.init_from:
            return {}
        spec, parts = model_folder.load(self.config.init_from)
        if (spec.family, spec.arch) != (self.student_spec.family, self.student_spec.arch):
            raise ConfigError(
                f"init_from={self.config.init_from} holds {spec.family} {spec.arch}, "
                f"the student is {self.student_spec.family} {self.student_spec.arch}"
            )
        return {name: parts[name] for name in ("encoder", "projector") if name in parts}

    def load_frozen(self) -> PyTree:
        """The teacher's weights in the compute dtype, at its input size in this run."""
        spec, parts = model_folder.load(self.config.teacher.path)
        _, encoder = spec.resized(parts["encoder"], self.teacher_resize[1])
        if stages := self.config.teacher.stages:
            encoder = FAMILIES[spec.family].first_stages_params(encoder, spec.arch, stages)
        frozen = {"encoder": encoder, **{name: parts[name] for name in self._classifier_shapes}}
        return jax.tree.map(lambda leaf: leaf.astype(self.dtype), frozen)

    def abstract_frozen(self) -> PyTree:
        """Shapes of `load_frozen`."""
        shapes = {"encoder": self._teacher_shapes, **self._classifier_shapes}
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self.dtype), shapes)

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Adds the uniform numbers of both networks' drop paths, [B, depth, 2] each."""
        batch = dict(batch)
        student_key, teacher_key = jax.random.split(key)
        rows = batch["image"].shape[0]
        if self.config.student.drop_path:
            batch["student_drops"] = jax.random.uniform(student_key, (rows, self.student.depth, 2))
        if self.config.teacher.drop_path:
            batch["teacher_drops"] = jax.random.uniform(teacher_key, (rows, self.teacher.depth, 2))
        return batch

    def loss(
        self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """Mean distance between the student's prediction and the teacher's target."""
        target = self.teacher_target(frozen, batch)
        prediction = self.predict(params, batch)
        total, count = weighted(self._distance(prediction, target), batch["weight"])
        return total / count, (extra, {"loss": (total, count)})

    def evaluate(self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch) -> Metrics:
        """Loss and cosine similarity on held-out images, drop path off on both sides."""
        del extra
        target = self.teacher_target(frozen, batch)
        prediction = self.predict(params, batch)
        weight = batch["weight"]
        metrics = {"loss": weighted(self._distance(prediction, target), weight)}
        if self.target.kind != "logits":
            cosine = jnp.mean(losses.cosine_similarity(prediction, target), axis=-1)
            metrics["cosine"] = weighted(cosine, weight)
        return metrics

    def features(self, params: PyTree, frozen: PyTree, batch: Batch) -> jax.Array:
        """The student's mean patch token after its final norm. -> [B, D_s] float32."""
        del frozen
        student = nnx.merge(self.student_def, params["encoder"])
        features = student(self.student_spec.normalize(batch["image"], self.dtype))
        return jnp.mean(features.patches.astype(jnp.float32), axis=1)

    def teacher_target(self, frozen: PyTree, batch: Batch) -> jax.Array:
        """What the student has to predict. -> [B, T, D_t] float32, or [B, 1, K] logits."""
        images = batch["image"]
        if images.shape[1] != self.teacher.image_size:
            images = resize_images(images, self.teacher.image_size)
        features = apply_frozen(
            self.teacher_def,
            frozen["encoder"],
            self.teacher_spec.normalize(images, self.dtype),
            final_norm=self.target.after_norm,
            drops=batch.get("teacher_drops"),
        )
        if self.classifier_def is not None:
            head = {name: frozen[name] for name in self._classifier_shapes}
            return apply_frozen(self.classifier_def, head, features)[:, None]
        if self.target.kind == "full" and features.grid != self.student.grid:
            features = resize_map(features, self.student.grid)
        tokens = self.target.select(features, cls=self.cls)
        return jax.lax.stop_gradient(losses.normalize_target(tokens, self.target.normalize))

    def predict(self, params: PyTree, batch: Batch) -> jax.Array:
        """The student's projected tokens, final norm applied. -> [B, T, D_t]."""
        student = nnx.merge(self.student_def, params["encoder"])
        projector = nnx.merge(self.projector_def, params["projector"])
        images = self.student_spec.normalize(batch["image"], self.dtype)
        features = student(images, drops=batch.get("student_drops"))
        return projector(self.target.select(features, cls=self.cls))

    def optimizer(
        self, params: PyTree, *, steps_per_epoch: int, total_steps: int
    ) -> tuple[optax.GradientTransformation, optimizer.Schedule]:
        """AdamW of the config over student and projector."""
        return optimizer.from_config(
            self.config,
            params,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            no_decay=FAMILIES[self.student_spec.family].NO_DECAY,
        )

    def export(self, params: PyTree, extra: PyTree) -> tuple[ModelSpec, PyTree]:
        """Student and projector; a logits student's head is its projector."""
        del extra
        return self.student_spec, params

    def _distance(self, prediction: jax.Array, target: jax.Array) -> jax.Array:
        """Per example. [B, T, D] x 2 -> [B]."""
        if self.target.kind == "logits":
            return losses.cross_entropy(prediction[:, 0], jax.nn.softmax(target[:, 0]))
        distance = losses.smooth_l1(prediction, target, beta=self.config.loss_beta)
        return jnp.mean(distance, axis=(1, 2))

    def _student_runtime(self) -> dict[str, Any]:
        return {
            "drop_path": self.config.student.drop_path,
            "init": "fd_student",
            "dtype": self.dtype,
            "grad_dtype": jnp.dtype(self.config.grad_reduce_dtype),
            "attention": self.attention["student"],
            "remat": self.config.remat or None,
        }

    def _projector(self, rngs: nnx.Rngs) -> Projector:
        out = self._teacher_classes() if self.target.kind == "logits" else self.teacher.width
        grad_dtype = jnp.dtype(self.config.grad_reduce_dtype)
        width = self.student.width
        return Projector(width, out, dtype=self.dtype, grad_dtype=grad_dtype, rngs=rngs)

    def _classifier(self, rngs: nnx.Rngs) -> Classifier:
        """The teacher's own head on its own pooling; its weights come from the folder."""
        return Classifier(
            self.teacher.width,
            self._teacher_classes(),
            pooling=self.teacher_spec.pooling,
            norm_eps=self.teacher_spec.arch["norm_eps"],
            kernel_init=nnx.initializers.zeros_init(),
            rngs=rngs,
        )

    def _teacher_classes(self) -> int:
        if not self.teacher_spec.classes:
            raise ConfigError(
                f"target.kind='logits' needs a teacher with a classifier head; "
                f"{self.teacher_spec.source} has none. Use 'full', 'cls' or 'gap', or DeiT"
            )
        return self.teacher_spec.classes

    def _check_match(self):
        data_size, student_size = self.config.data.image_size, self.student.image_size
        if data_size != student_size:
            raise ConfigError(
                f"data.image_size={data_size}, but student.arch.image_size={student_size}; "
                "they must be equal"
            )
        if self.target.kind == "cls" and not self.cls:
            raise ConfigError(
                f"target.kind={self.target.kind!r} needs a class token on both sides; "
                f"student has {self.student.cls}, teacher has {self.teacher.cls}"
            )
        if self.target.kind == "logits":
            self._teacher_classes()
        differ = self.target.kind == "full" and self.student.grid != self.teacher.grid
        if differ and self.target.resample == "none":
            want = self.teacher.image_size // self.teacher.grid[0] * self.student.grid[0]
            raise ConfigError(
                f"teacher grid {self.teacher.grid} != student grid {self.student.grid}: "
                f"set teacher.image_size to {want}, or target.resample to 'bilinear'"
            )


def resize_images(images: jax.Array, size: int) -> jax.Array:
    """Antialiased bilinear resize on the device, as CLIP-L's fixed 224 px input asks.

    See docs/reference.md#quirk-teacher-resize.

    [B, H, W, 3] uint8 -> [B, size, size, 3] float32 on the scale of the input, not rounded.
    """
    return _resize(images, (size, size))


def resize_map(features: FeatureMap, grid: tuple[int, int]) -> FeatureMap:
    """The same feature map on another grid, antialiased bilinear; only patches change.

    Tokens become [B, cls + registers + h*w, D] float32.
    """
    batch, _, width = features.tokens.shape
    others = features.cls + features.registers
    patches = _resize(features.patches.reshape(batch, *features.grid, width), grid)
    tokens = [features.tokens[:, :others].astype(jnp.float32), patches.reshape(batch, -1, width)]
    return dataclasses.replace(features, tokens=jnp.concatenate(tokens, axis=1), grid=grid)


def _resize(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """[B, H, W, C] -> [B, h, w, C] float32, antialiased bilinear."""
    rows = resize.antialias_matrix(x.shape[1], size[0], method="bilinear").astype("float32")
    columns = resize.antialias_matrix(x.shape[2], size[1], method="bilinear").astype("float32")
    x = jnp.einsum("ih,bhwc->biwc", rows, x.astype(jnp.float32), precision="highest")
    return jnp.einsum("jw,biwc->bijc", columns, x, precision="highest")


def _teacher_arch(spec: ModelSpec, stages: int) -> dict[str, Any]:
    """The teacher's architecture, or its first stages alone (docs/reference.md#stage-3-target)."""
    if not stages:
        return spec.arch
    depths = spec.arch.get("depths", ())
    if not 1 <= stages <= len(depths):
        has = f"has {len(depths)} stages" if depths else f"is a {spec.family}, without stages"
        raise ConfigError(f"teacher.stages={stages}, but the teacher {has}; set it to 0 for all")
    return FAMILIES[spec.family].first_stages(spec.arch, stages)


def _open_teacher(config: Config) -> ModelSpec:
    spec = model_folder.load_spec(epath.Path(config.teacher.path))
    if config.teacher.source and spec.source != config.teacher.source:
        raise ConfigError(
            f"the teacher at {config.teacher.path} was converted from {spec.source!r}, but the "
            f"config distils {config.teacher.source!r}; change teacher.path or teacher.source"
        )
    return spec


def _check_choice(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{field}={value!r} is unknown; expected one of {known}")
