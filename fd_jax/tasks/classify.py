"""Classification: fine-tuning, training from random weights, and the linear probe.

The probe is the same task with a frozen encoder: it only runs forward, and its weights are kept
outside the training state.
"""

import dataclasses
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from fd_jax import losses, optimizer
from fd_jax.console import say
from fd_jax.cost import flops
from fd_jax.data import mixing
from fd_jax.data.base import Data
from fd_jax.data.class_names import Classes
from fd_jax.data.resolutions import Resolutions
from fd_jax.errors import ConfigError, DataError
from fd_jax.evaluation import classification, evaluators
from fd_jax.metrics import weighted
from fd_jax.models import layers, transfer
from fd_jax.models.heads import Classifier
from fd_jax.models.keys import param_keys
from fd_jax.models.spec import CLIP_MEAN, CLIP_STD, FAMILIES, ModelSpec, split
from fd_jax.precision import compute_dtype
from fd_jax.tasks import start
from fd_jax.tasks.base import apply_frozen
from fd_jax.tasks.encoder import TrainedEncoder, share_of
from fd_jax.typing import Batch, Config, Metrics, PyTree

Trains = Literal["all", "head"]
Head = Literal["fresh", "keep"]

# Standard deviation of the head's initial weights
# (docs/reference.md#fine-tune-head, docs/reference.md#probe-head).
HEAD_STD = {"all": 0.02, "head": 0.01}
BATCH_NORM_EPS = 1e-6
BATCH_NORM_MOMENTUM = 0.1  # weight of the new batch in the running statistics


class ClassifyTask:
    """The encoder, head and recipe that a config describes."""

    def __init__(self, config: Config, *, init_spec: ModelSpec | None = None):
        """Checks the config and defines the network; reads no weights.

        Args:
          config: see configs/base.py for the fields; one that `settings.check` accepts.
          init_spec: replaces the spec in the folder `config.init_from`, for planning without
            weights.

        Raises:
          ConfigError: the settings cannot work together; the message has the numbers.
          ModelFolderError: there is no model at `config.init_from`.
        """
        model = config.model
        self.config = config
        self.dtype = compute_dtype(config.dtype)
        self.probe = model.trains == "head"
        self.changes = transfer.Changes(
            image_size=config.data.image_size,
            final_norm=model.final_norm,
            untie=model.untie_positions,
            keep_head=model.head == "keep",
        )
        initial = init_spec or start.initial_spec(config, "model")
        self._check_initial_spec(initial)
        how = "probed" if self.probe else "fine-tuned"
        self.spec = dataclasses.replace(
            transfer.target_spec(initial, self.changes),
            classes=model.classes,
            class_names=initial.class_names if self.changes.keep_head else None,
            pooling=model.pooling,
            source=start.source_name(config, initial, how),
        )
        self.eval_statistics = self.spec
        if config.reference_quirks:  # as in docs/reference.md#quirk-eval-statistics
            self.eval_statistics = dataclasses.replace(self.spec, mean=CLIP_MEAN, std=CLIP_STD)
        self.attention = {"encoder": self.spec.choose_attention(config.attention, dtype=self.dtype)}
        self._encoder = TrainedEncoder(
            self.spec,
            share=share_of(config, "model"),
            sizes=Resolutions.of(config).others,
            **self._runtime(),
        )
        self.encoder_def, self.encoder = self._encoder.definition, self._encoder.network
        if model.pooling == "cls" and not self.encoder.cls:
            raise ConfigError("model.pooling='cls', but the network has no class token; use 'mean'")
        self.classifier_def, _ = split(nnx.eval_shape(lambda: self._classifier(param_keys(0))))
        self.mixing = None
        if not self.probe and (config.mixing.mixup or config.mixing.cutmix):
            self.mixing = mixing.Mixing(
                mixup=config.mixing.mixup,
                cutmix=config.mixing.cutmix,
                switch=config.mixing.switch,
                batch_size=config.batch_size,
            )

    def check_data(self, data: Data) -> None:
        """Refuses data whose labels do not fit the head, and keeps the names of the classes.

        A trained head gives its classes their numbers, a fresh one takes those of the data.

        Raises:
          DataError: there are no labels, more classes than the head has outputs, or classes that a
            trained head does not know.
        """
        head = None
        if self.changes.keep_head:
            where = f"the head in {self.config.init_from}"
            head = Classes(where, self.spec.classes, self.spec.class_names)
        data.number_labels(head)
        head_classes, data_classes, name = self.spec.classes, data.classes, data.name
        if data_classes > head_classes:
            raise DataError(
                f"{name} has {data_classes} classes, labels 0 to {data_classes - 1}, but "
                f"model.classes={head_classes}; set --config.model.classes={data_classes}"
            )
        if data_classes < head_classes:
            say(f"note: model.classes={head_classes}, but {name} has only {data_classes} classes")
        if data.class_names is not None:
            names = [*data.class_names, *[""] * (head_classes - data_classes)]
            self.spec = dataclasses.replace(self.spec, class_names=names)

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Random parameters; only the head has any where the encoder is frozen."""
        encoder_key, head_key = jax.random.split(key)
        params = split(self._classifier(param_keys(head_key)))[1]
        if self.probe:
            return params, {
                "mean": jnp.zeros(self.encoder.width),
                "var": jnp.ones(self.encoder.width),
            }
        return {"encoder": self._encoder.init(encoder_key), **params}, {}

    def load_initial(self) -> PyTree:
        """The trained parameters that `init_from` provides; prints what it loads and drops."""
        if not self.config.init_from:
            return {}
        taken = self._transferred(report=True)
        encoder = taken.pop("encoder")
        return taken if self.probe else {"encoder": self._encoder.divide(encoder)[0], **taken}

    def load_frozen(self) -> PyTree:
        """The probed encoder in the compute dtype, or what is held of one that trains."""
        if not self.probe:
            return self._encoder.load_held(self._stored_encoder)
        encoder = self._stored_encoder()
        return jax.tree.map(lambda leaf: leaf.astype(self.dtype), {"encoder": encoder})

    def abstract_frozen(self) -> PyTree:
        """Shapes and dtypes of `load_frozen`, without reading weights."""
        if not self.probe:
            return self._encoder.abstract_held()
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self.dtype),
            {"encoder": self._encoder.shapes},
        )

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Mixes, normalises and erases the whole batch; adds targets and drop-path randomness.

        "image" becomes float [B, S, S, 3] in the compute dtype; "target" [B, K] is a smoothed,
        mixed distribution.
        """
        recipe = self.config.mixing
        mix_key, erase_key, drop_key = jax.random.split(key, 3)
        batch = dict(batch)
        images = batch["image"]
        smoothing = 0.0 if self.probe else recipe.smoothing
        target = mixing.smooth_one_hot(batch["label"], self.spec.classes, smoothing)
        if self.mixing is not None:
            images, target = self.mixing(mix_key, images, target)
        images = self.spec.normalize(images)
        if recipe.erasing and not self.probe:
            images = mixing.erase(erase_key, images, probability=recipe.erasing)
        batch["image"], batch["target"] = images.astype(self.dtype), target
        if self.config.model.drop_path and not self.probe:
            rows = images.shape[0]
            batch["drops"] = jax.random.uniform(drop_key, (rows, self.encoder.depth, 2))
        return batch

    def loss(
        self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """Mean cross entropy against the prepared targets."""
        classifier = nnx.merge(self.classifier_def, _head_params(params))
        pooled = classifier.pool(self._encode(params, frozen, batch["image"], batch.get("drops")))
        if self.probe:
            pooled, extra = _batch_norm(pooled, extra)
        each = losses.cross_entropy(classifier.head(pooled), batch["target"])
        total, count = weighted(each, batch["weight"])
        return total / count, (extra, {"loss": (total, count)})

    def evaluate(self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch) -> Metrics:
        """Cross entropy against the labels, top-1 and top-5 accuracy."""
        logits = self.logits(params, extra, frozen, batch)
        return classification.accuracy_metrics(logits, batch["label"], batch["weight"])

    def logits(self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch) -> jax.Array:
        """Logits of an unprepared batch, as the data delivers it. -> [B, K] float32."""
        classifier = nnx.merge(self.classifier_def, _head_params(params))
        pooled = classifier.pool(self._encode(params, frozen, self._eval_images(batch), None))
        if self.probe:
            pooled = (pooled - extra["mean"]) * jax.lax.rsqrt(extra["var"] + BATCH_NORM_EPS)
        return classifier.head(pooled)

    def features(self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch) -> jax.Array:
        """The pooled vector of each image, before the head. -> [B, D] float32."""
        del extra
        classifier = nnx.merge(self.classifier_def, _head_params(params))
        return classifier.pool(self._encode(params, frozen, self._eval_images(batch), None))

    def optimizer(
        self, params: PyTree, *, steps_per_epoch: int, total_steps: int
    ) -> tuple[optax.GradientTransformation, optimizer.Schedule]:
        """The config's optimizer, with a learning rate per layer if `optim.layer_decay` is set."""
        return optimizer.from_config(
            self.config,
            params,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            no_decay=FAMILIES[self.spec.family].NO_DECAY,
            layer_scales=start.layer_scales(self.config, self.spec, params, head="head/kernel"),
        )

    @property
    def trains_encoder(self) -> bool:
        """False for a probe, which trains only the head."""
        return not self.probe

    def evaluators(self) -> list[evaluators.Evaluator]:
        """Held-out loss and accuracy, and nearest neighbours if `eval.knn` is set."""
        return evaluators.from_config(self.config)

    def flops_at(self, image_size: int) -> flops.Flops:
        """FLOPs of a step, for each image whose side is `image_size` pixels."""
        trains = not self.probe
        head = flops.linear(1, self.encoder.width, self.spec.classes, input_gradient=trains)
        return self._encoder.flops(image_size, trains=trains, remat=self.config.remat) + head

    def flops(self) -> flops.Flops:
        """FLOPs of a step, per image."""
        return self.flops_at(self.config.data.image_size)

    def export(self, params: PyTree, extra: PyTree) -> tuple[ModelSpec, PyTree]:
        """The encoder and head; a probe's BatchNorm is folded into the head's weights."""
        if not self.probe:
            encoder = self._encoder.whole(params["encoder"], self._stored_encoder)
            return self.spec, {**params, "encoder": encoder}
        scale = jax.lax.rsqrt(extra["var"] + BATCH_NORM_EPS)
        kernel = params["head"]["kernel"] * scale[:, None]
        bias = params["head"]["bias"] - extra["mean"] @ kernel
        parts = {
            "encoder": self._stored_encoder(),
            "head": {"kernel": kernel, "bias": bias},
        }
        if "norm" in self.spec.pooling:
            width = self.encoder.width
            parts["fc_norm"] = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
        return self.spec, parts

    def _encode(self, params: PyTree, frozen: PyTree, images: jax.Array, drops: Any):
        if self.probe:
            return apply_frozen(self.encoder_def, frozen["encoder"], images)
        encoder = self._encoder.build(params["encoder"], frozen, images.shape[1])
        return encoder(images, drops=drops)

    def _eval_images(self, batch: Batch) -> jax.Array:
        return self.eval_statistics.normalize(batch["image"], self.dtype)

    def _stored_encoder(self) -> PyTree:
        """The encoder of `init_from` as this network starts from it."""
        return self._transferred()["encoder"]

    def _transferred(self, *, report: bool = False) -> PyTree:
        """The parts of `init_from` that this network starts from; `report` prints them."""
        parts = {"head", "fc_norm"} if "norm" in self.spec.pooling else {"head"}
        return start.load(self.config.init_from, self.changes, parts=parts, report=report)

    def _runtime(self) -> dict[str, Any]:
        return {
            "drop_path": self.config.model.drop_path,
            "init": "finetune",
            "dtype": self.dtype,
            "grad_dtype": jnp.dtype(self.config.grad_reduce_dtype),
            "attention": self.attention["encoder"],
            "remat": self.config.remat or None,
        }

    def _classifier(self, rngs: nnx.Rngs) -> Classifier:
        init = layers.truncated_normal(HEAD_STD[self.config.model.trains], 2.0)
        return self.spec.build_head(
            self.encoder.width,
            affine=not self.probe,
            kernel_init=layers.scaled(init, self.config.model.head_scale),
            grad_dtype=jnp.dtype(self.config.grad_reduce_dtype),
            rngs=rngs,
        )

    def _check_initial_spec(self, initial: ModelSpec) -> None:
        model, folder = self.config.model, self.config.init_from
        if not self.changes.keep_head:
            return
        if initial.classes != model.classes or initial.pooling != model.pooling:
            raise ConfigError(
                f"model.head='keep', but init_from={folder} has a head of {initial.classes} "
                f"classes on pooling {initial.pooling!r}, and the config sets "
                f"model.classes={model.classes} on {model.pooling!r}; change these or set "
                "model.head='fresh'"
            )


def _batch_norm(x: jax.Array, running: PyTree) -> tuple[jax.Array, PyTree]:
    """BatchNorm over the global batch, without scale and bias, in training mode as in torch.

    x: [B, D]. Returns the normalised x and the updated running statistics.
    """
    mean = jnp.mean(x, axis=0)
    var = jnp.mean(jnp.square(x - mean), axis=0)
    unbiased = var * x.shape[0] / max(x.shape[0] - 1, 1)
    keep = 1 - BATCH_NORM_MOMENTUM
    running = {
        "mean": keep * running["mean"] + BATCH_NORM_MOMENTUM * mean,
        "var": keep * running["var"] + BATCH_NORM_MOMENTUM * unbiased,
    }
    return (x - mean) * jax.lax.rsqrt(var + BATCH_NORM_EPS), running


def _head_params(params: PyTree) -> PyTree:
    return {name: params[name] for name in ("fc_norm", "head") if name in params}
