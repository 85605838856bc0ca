"""Semantic segmentation: a neck, a decoder and an auxiliary head on the maps of an encoder.

With `segment.trains="head"` the encoder is frozen: it only runs forward, and its weights are kept
outside the training state.
"""

import dataclasses
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fd_jax import losses, optimizer
from fd_jax.console import say
from fd_jax.cost import flops
from fd_jax.data.base import IGNORED, Data, SegmentationData
from fd_jax.errors import ConfigError, DataError
from fd_jax.evaluation import evaluators, segmentation
from fd_jax.metrics import weighted
from fd_jax.models import sizes, transfer
from fd_jax.models.features import FeatureMap
from fd_jax.models.keys import param_keys
from fd_jax.models.segmenter import Levels, levels, maps_of, resampling
from fd_jax.models.spec import FAMILIES, ModelSpec, split
from fd_jax.models.vit import ViT
from fd_jax.precision import compute_dtype
from fd_jax.tasks import start
from fd_jax.typing import Batch, Config, Metrics, PyTree

Trains = Literal["all", "head"]


class SegmentTask:
    """The encoder, segmenter and recipe that a config describes.

    Attributes:
      spec: of the trained network, with its segmenter.
      fill: grey levels of pixels outside of a picture, RGB; see `outside`.
    """

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
        segment = config.segment
        self.config = config
        self.dtype = compute_dtype(config.dtype)
        self.frozen = segment.trains == "head"
        initial = init_spec or start.initial_spec(config, "segment")
        self.changes = transfer.Changes(
            image_size=config.data.image_size,
            # A UPerNet reads the raw maps of blocks, a linear decoder the network's own output.
            final_norm=segment.decoder == "linear" and initial.arch.get("final_norm", True),
            untie=segment.untie_positions,
            keep_head=False,
            lift=False,
            patch_size=segment.patch_size,
            window=segment.window,
        )
        encoder_spec = transfer.target_spec(initial, self.changes)
        # A mask covers the whole image, so that a network has to read all of it.
        sizes.check_patches(config.data.image_size, encoder_spec.arch["patch_size"])
        if config.data.image_size % encoder_spec.stride:
            raise ConfigError(
                f"data.image_size={config.data.image_size}: the last map of {initial.source!r} has "
                f"a token for {encoder_spec.stride} pixels; use a multiple of it"
            )
        attention = encoder_spec.choose_attention(config.attention, dtype=self.dtype)
        self.attention = {"encoder": attention}
        self.encoder_def, self._encoder_shapes = encoder_spec.abstract(**self._encoder_runtime())
        self.encoder: Any = nnx.merge(self.encoder_def, self._encoder_shapes)
        how = "probed" if self.frozen else "fine-tuned"
        self.spec = dataclasses.replace(
            encoder_spec,
            classes=0,
            segmenter=_segmenter(config, self._levels()),
            source=start.source_name(config, initial, how),
        )
        self.fill = outside(self.spec)
        # Made here, so that an evaluation that cannot work is refused before the run starts.
        self._evaluators = segmentation.from_config(config, self.spec, fill=self.fill)
        self.segmenter_def, shapes, _ = self.spec.abstract_segmenter(**self._dtypes())
        self.segmenter: Any = nnx.merge(self.segmenter_def, shapes)

    def check_data(self, data: Data | SegmentationData) -> None:
        """Refuses data without masks, or with other classes than those of the decoder.

        Raises:
          DataError: there are no masks, or more classes than the decoder has outputs.
        """
        ours, theirs = self.config.segment.classes, data.classes
        if "mask" not in data.elements:
            raise DataError(f"{data.name} has no class for each pixel, which segmentation learns")
        if theirs is not None and theirs > ours:
            raise DataError(
                f"{data.name} has {theirs} classes, but segment.classes={ours}; set "
                f"--config.segment.classes={theirs}"
            )
        if theirs is not None and theirs < ours:
            say(f"note: segment.classes={ours}, but {data.name} has only {theirs} classes")

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Random parameters, and the running statistics before the first step."""
        encoder_key, segmenter_key = jax.random.split(key)
        segmenter = self.spec.build_segmenter(rngs=param_keys(segmenter_key), **self._dtypes())
        params = {"segmenter": split(segmenter)[1]}
        if not self.frozen:
            encoder = self.spec.build(rngs=param_keys(encoder_key), **self._encoder_runtime())
            params["encoder"] = split(encoder)[1]
        return params, segmenter.fresh_statistics()

    def load_initial(self) -> PyTree:
        """The trained parameters that `init_from` provides; prints what it loads and drops."""
        if not self.config.init_from:
            return {}
        taken = self._transferred(report=True)
        return {} if self.frozen else taken

    def load_frozen(self) -> PyTree:
        """The frozen encoder in the compute dtype, or {} where everything trains."""
        if not self.frozen:
            return {}
        return jax.tree.map(lambda leaf: leaf.astype(self.dtype), self._transferred())

    def abstract_frozen(self) -> PyTree:
        """Shapes and dtypes of `load_frozen`, without reading weights."""
        if not self.frozen:
            return {}
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self.dtype),
            {"encoder": self._encoder_shapes},
        )

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Normalises the whole batch, and adds the randomness of drop path and dropout.

        "image" becomes float [B, S, S, 3] in the compute dtype.
        """
        block_key, channel_key = jax.random.split(key)
        rows = batch["image"].shape[0]
        batch = {**batch, "image": self.spec.normalize(batch["image"], self.dtype)}
        batch["channel_drops"] = jax.random.uniform(channel_key, (rows, self.segmenter.droppable))
        if self.config.segment.drop_path and not self.frozen:
            batch["drops"] = jax.random.uniform(block_key, (rows, self.encoder.depth, 2))
        return batch

    def loss(
        self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """Mean cross entropy of the decoder, and that of the auxiliary head times its weight."""
        maps = self._maps(params, frozen, batch["image"], batch.get("drops"))
        segmenter = nnx.merge(self.segmenter_def, params["segmenter"])
        found = segmenter(maps, extra, batch["channel_drops"])
        main = losses.pixel_cross_entropy(found.logits, batch["mask"])
        metrics = {"decoder_loss": weighted(main, batch["weight"])}
        each = main
        if found.auxiliary is not None:
            auxiliary = losses.pixel_cross_entropy(found.auxiliary, batch["mask"])
            each = each + self.config.segment.auxiliary_weight * auxiliary
            metrics["auxiliary_loss"] = weighted(auxiliary, batch["weight"])
        total, count = weighted(each, batch["weight"])
        return total / count, (found.running, {"loss": (total, count), **metrics})

    def evaluate(self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch) -> Metrics:
        """Cross entropy of the decoder, and the share of labelled pixels that it gets right."""
        logits, mask = self.predict(params, extra, frozen, batch), batch["mask"]
        loss = losses.pixel_cross_entropy(logits, mask)
        chosen = jnp.argmax(resampling.resize(logits, mask.shape[1:]), axis=-1)
        counted = (mask != IGNORED) * batch["weight"][:, None, None]
        return {
            "loss": weighted(loss, batch["weight"]),
            "accuracy": weighted(chosen == mask, counted),
        }

    def predict(self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch) -> jax.Array:
        """Logits of an unprepared batch at the finest level. -> [B, h, w, K] float32.

        Pictures may have another size than in training, for which position tables are resized.
        """
        maps = self._maps(params, frozen, self.spec.normalize(batch["image"], self.dtype), None)
        return nnx.merge(self.segmenter_def, params["segmenter"])(maps, extra).logits

    def features(self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch) -> jax.Array:
        """The mean patch of the last map that the segmenter reads. -> [B, D] float32."""
        del extra
        maps = self._maps(params, frozen, self.spec.normalize(batch["image"], self.dtype), None)
        return jnp.mean(maps[-1].patches.astype(jnp.float32), axis=1)

    def optimizer(
        self, params: PyTree, *, steps_per_epoch: int, total_steps: int
    ) -> tuple[optax.GradientTransformation, optimizer.Schedule]:
        """The config's optimizer; neck and heads have the full learning rate."""
        return optimizer.from_config(
            self.config,
            params,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            no_decay=self._no_decay(),
            layer_scales=start.layer_scales(self.config, self.spec, params, head="segmenter"),
        )

    @property
    def trains_encoder(self) -> bool:
        """False where only the segmenter trains."""
        return not self.frozen

    def evaluators(self) -> list[evaluators.Evaluator]:
        """The mean IoU over held-out pictures of any size."""
        return self._evaluators

    def flops(self) -> flops.Flops | None:
        """FLOPs of a step, per image; those of a UPerNet on a frozen encoder are not known.

        Some of its first layers then need no gradient of their inputs.
        """
        if self.frozen and self.config.segment.decoder != "linear":
            return None
        encoder = flops.network(self.spec, trains=not self.frozen, remat=self.config.remat)
        return encoder + flops.segmenter(self.spec)

    def export(self, params: PyTree, extra: PyTree) -> tuple[ModelSpec, PyTree]:
        """The encoder, the segmenter and its running statistics."""
        encoder = self._transferred()["encoder"] if self.frozen else params["encoder"]
        return self.spec, {
            "encoder": encoder,
            "segmenter": params["segmenter"],
            "segmenter_statistics": extra,
        }

    def _maps(
        self, params: PyTree, frozen: PyTree, images: jax.Array, drops: jax.Array | None
    ) -> list[FeatureMap]:
        """The maps that the segmenter reads, after the final norm if the encoder has one."""
        weights = jax.lax.stop_gradient(frozen["encoder"]) if self.frozen else params["encoder"]
        spec, weights = self.spec.resized(weights, images.shape[1:3])
        definition = self.encoder_def
        if spec is not self.spec:
            definition, _ = spec.abstract(**self._encoder_runtime())
        encoder: Any = nnx.merge(definition, weights)
        assert self.spec.segmenter is not None
        return maps_of(encoder, images, self.spec.segmenter["blocks"], drops=drops)

    def _levels(self) -> Levels:
        if self.config.segment.decoder == "upernet":
            return levels(self.encoder)
        return Levels((self.encoder.depth - 1,), (self.encoder.width,), "none")

    def _no_decay(self) -> tuple[str, ...]:
        """Patterns of parameters without weight decay (docs/reference.md#quirk-decay-positions).

        The sources spare a ViT's class token and positions by their whole names, which never match
        behind the prefix "backbone."; a Swin's tables they spare by a part of their names.
        """
        if self.config.optim.decay_positions and isinstance(self.encoder, ViT):
            return ()
        return FAMILIES[self.spec.family].NO_DECAY

    def _transferred(self, *, report: bool = False) -> PyTree:
        """The encoder of `init_from` as this network starts from it; `report` prints it."""
        return start.load(self.config.init_from, self.changes, parts={"segmenter"}, report=report)

    def _encoder_runtime(self) -> dict[str, Any]:
        return {
            "drop_path": self.config.segment.drop_path,
            "init": "finetune",
            "attention": self.attention["encoder"],
            "remat": self.config.remat or None,
            **self._dtypes(),
        }

    def _dtypes(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "grad_dtype": jnp.dtype(self.config.grad_reduce_dtype)}


def outside(spec: ModelSpec) -> tuple[int, int, int]:
    """Grey levels, RGB, of the pixels of a crop that are outside of its picture.

    The sources pad after normalising, with 0. A batch holds grey levels, so this is the mean colour
    that becomes 0, rounded: off by at most half a grey level, 0.009 after ImageNet's
    normalisation.
    """
    red, green, blue = np.rint(np.asarray(spec.mean) / spec.pixel_scale).astype(int).tolist()
    return red, green, blue


def _segmenter(config: Config, where: Levels) -> dict[str, Any]:
    """The section `segmenter` of the spec."""
    segment = config.segment
    return {
        "classes": segment.classes,
        "neck": where.neck,
        "decoder": segment.decoder,
        "channels": segment.channels,
        "auxiliary_channels": segment.auxiliary_channels,
        "dropout": segment.dropout,
        "blocks": list(where.blocks),
    }
