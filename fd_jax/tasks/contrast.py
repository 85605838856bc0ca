"""Contrastive training without labels: two views of an image have to find each other (SimCLR).

The method is that of arXiv 2002.05709. The ablations at CPU scale need a teacher that has not seen
the labels on which it is fine-tuned: configs/ablations_cpu.py.
"""

import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from fd_jax import losses, optimizer
from fd_jax.cost import flops
from fd_jax.data.base import Data
from fd_jax.errors import ConfigError
from fd_jax.evaluation import evaluators
from fd_jax.metrics import weighted
from fd_jax.models.heads import Projector
from fd_jax.models.keys import param_keys
from fd_jax.models.spec import FAMILIES, ModelSpec, split
from fd_jax.precision import compute_dtype
from fd_jax.typing import Batch, Config, Metrics, PyTree

LOG_ASPECT = (-0.2876821, 0.2876821)  # log of 3/4 and 4/3, as in the crops of the data pipeline


class ContrastiveTask:
    """The network and the contrast that a config describes.

    Two random crops of each image, with random brightness and contrast, have to be recognised as
    views of the same image among all views in the batch. A projector, two layers that each end with
    a BatchNorm, maps the class token to the vectors that are compared; it is not part of the
    trained network.
    """

    trains_encoder = True

    def __init__(self, config: Config):
        """Checks the config and defines the network.

        Args:
          config: a config with the section `contrast`, see configs/ablations_cpu.py.

        Raises:
          ConfigError: the batch is split into micro-batches, which would change the loss.
        """
        if config.accumulation > 1:
            raise ConfigError(
                f"accumulation={config.accumulation}: a contrast is over the whole batch; "
                "set it to 1"
            )
        self.config = config
        self.dtype = compute_dtype(config.dtype)
        self.spec = ModelSpec(
            config.contrast.family,
            config.contrast.arch.to_dict(),
            source=f"contrasted by fd_jax on {config.data.name}",
        )
        chosen = self.spec.choose_attention(config.attention, dtype=self.dtype)
        self.attention = {"encoder": chosen}
        self.encoder_def, shapes = self.spec.abstract(**self._runtime())
        self.encoder: Any = nnx.merge(self.encoder_def, shapes)
        self.projector_defs = {
            name: split(nnx.eval_shape(lambda layer=layer: layer(param_keys(0))))[0]
            for name, layer in self._layers().items()
        }

    def check_data(self, data: Data) -> None:
        """Checks that there are labels if `eval.knn` needs them; training reads none."""
        if self.config.eval.knn:
            data.number_labels()

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """A random network and a random projector."""
        encoder_key, *projector_keys = jax.random.split(key, 3)
        encoder = self.spec.build(rngs=param_keys(encoder_key), **self._runtime())
        layers = {
            name: split(layer(param_keys(layer_key)))[1]
            for (name, layer), layer_key in zip(self._layers().items(), projector_keys, strict=True)
        }
        return {"encoder": split(encoder)[1], "projector": layers}, {}

    def load_initial(self) -> PyTree:
        """Nothing: training starts from random weights."""
        return {}

    def load_frozen(self) -> PyTree:
        """Nothing: everything trains."""
        return {}

    def abstract_frozen(self) -> PyTree:
        """Shapes of `load_frozen`."""
        return {}

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Replaces "image" by two views, "first" and "second", float32 [B, S, S, 3] in 0..255."""
        batch = dict(batch)
        images = batch.pop("image")
        view = functools.partial(random_view, settings=self.config.contrast)
        for name, view_key in zip(("first", "second"), jax.random.split(key), strict=True):
            batch[name] = jax.vmap(view)(images, jax.random.split(view_key, len(images)))
        return batch

    def loss(
        self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """Mean cross entropy of finding the other view of each view."""
        del frozen
        total, count = self._contrast(params, batch)
        return total / count, (extra, {"loss": (total, count)})

    def evaluate(self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch) -> Metrics:
        """The loss on held-out images, whose views are the same at every evaluation."""
        del extra, frozen
        return {"loss": self._contrast(params, self.prepare(batch, jax.random.key(0)))}

    def features(self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch) -> jax.Array:
        """The class token after the final norm. -> [B, D] float32."""
        del extra, frozen
        return self._class_token(params, batch["image"])

    def optimizer(
        self, params: PyTree, *, steps_per_epoch: int, total_steps: int
    ) -> tuple[optax.GradientTransformation, optimizer.Schedule]:
        """The config's optimizer for the network and the projector."""
        return optimizer.from_config(
            self.config,
            params,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            no_decay=FAMILIES[self.spec.family].NO_DECAY,
        )

    def evaluators(self) -> list[evaluators.Evaluator]:
        """Held-out loss, and nearest neighbours if `eval.knn` is set."""
        return evaluators.from_config(self.config)

    def flops(self) -> flops.Flops:
        """FLOPs of a step, per image: two views, without their augmentation."""
        work = flops.network(self.spec, trains=True, remat=self.config.remat)
        width, out = self.encoder.width, self.config.contrast.width
        view = work + flops.linear(1, width, width) + flops.linear(1, width, out)
        return view + view

    def export(self, params: PyTree, extra: PyTree) -> tuple[ModelSpec, PyTree]:
        """The network without its projector."""
        del extra
        return self.spec, {"encoder": params["encoder"]}

    def _contrast(self, params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        weight = batch["weight"]
        views = jnp.concatenate([batch["first"], batch["second"]])
        vectors = self._vectors(params, views, jnp.tile(weight, 2))
        first, second = jnp.split(vectors, 2)
        each = contrast(first, second, weight, temperature=self.config.contrast.temperature)
        return weighted(each, weight)

    def _vectors(self, params: PyTree, images: jax.Array, weight: jax.Array) -> jax.Array:
        """The projected class tokens, unit length. [B, S, S, 3], [B] -> [B, D_p] float32."""
        vectors = self._class_token(params, images)
        for (name, definition), last in zip(
            self.projector_defs.items(), (False, True), strict=True
        ):
            vectors = nnx.merge(definition, params["projector"][name])(vectors)
            vectors = standardize(vectors, weight)
            vectors = vectors if last else jax.nn.gelu(vectors)
        return losses.l2_normalize(vectors)

    def _class_token(self, params: PyTree, images: jax.Array) -> jax.Array:
        encoder = nnx.merge(self.encoder_def, params["encoder"])
        features = encoder(self.spec.normalize(images, self.dtype))
        return features.cls_token.astype(jnp.float32)

    def _layers(self) -> dict[str, Any]:
        """The projector's layers by name, as functions of their random numbers."""
        width, grad_dtype = self.encoder.width, jnp.dtype(self.config.grad_reduce_dtype)
        widths = {"hidden": width, "out": self.config.contrast.width}
        return {
            name: lambda rngs, out=out: Projector(width, out, grad_dtype=grad_dtype, rngs=rngs)
            for name, out in widths.items()
        }

    def _runtime(self) -> dict[str, Any]:
        return {
            "init": "finetune",
            "dtype": self.dtype,
            "grad_dtype": jnp.dtype(self.config.grad_reduce_dtype),
            "attention": self.attention["encoder"],
            "remat": self.config.remat or None,
        }


def contrast(
    first: jax.Array, second: jax.Array, weight: jax.Array, *, temperature: float
) -> jax.Array:
    """SimCLR's loss of each image, averaged over its two views. -> [B] float32

    Args:
      first: unit vectors of one view of each image, [B, D] float32.
      second: those of the other view.
      weight: [B]; images with weight 0 are no candidates.
      temperature: divides the cosine similarities.
    """
    count = len(first)
    views = jnp.concatenate([first, second])
    logits = jnp.matmul(views, views.T, precision="highest") / temperature
    itself = jnp.eye(2 * count, dtype=bool)
    no_candidate = itself | (jnp.tile(weight, 2) == 0)[None, :]
    logits = jnp.where(no_candidate, -jnp.inf, logits)
    other = jnp.sum(first * second, axis=-1) / temperature
    each = jax.nn.logsumexp(logits, axis=-1) - jnp.tile(other, 2)
    return jnp.mean(each.reshape(2, count), axis=0)


def standardize(vectors: jax.Array, weight: jax.Array, *, eps: float = 1e-5) -> jax.Array:
    """BatchNorm over the global batch, without scale and bias; weight 0 does not count.

    At first the class tokens of all images are almost equal. Without this, their projections would
    be almost equal unit vectors, from which training hardly gets away. [B, D], [B] -> [B, D]
    """
    share = (weight / jnp.sum(weight))[:, None]
    centred = vectors - jnp.sum(share * vectors, axis=0)
    variance = jnp.sum(share * jnp.square(centred), axis=0)
    return centred * jax.lax.rsqrt(variance + eps)


def random_view(image: jax.Array, key: jax.Array, *, settings: Config) -> jax.Array:
    """A random crop, resized to the size of the image, with random contrast and brightness.

    The share of the area is uniform from `min_area` to 1, the logarithm of the aspect is uniform,
    and the crop is clipped to the image. [S, S, 3] -> [S, S, 3] float32, about 0 to 255.

    Args:
      image: one image, 0 to 255.
      key: source of the random numbers.
      settings: `min_area` of the crop, and `jitter`, by which contrast and brightness differ from 1
        at most.
    """
    area_key, aspect_key, place_key, colour_key = jax.random.split(key, 4)
    side = jnp.asarray(image.shape[:2], jnp.float32)
    area = jax.random.uniform(area_key, minval=settings.min_area)
    aspect = jnp.exp(jax.random.uniform(aspect_key, minval=LOG_ASPECT[0], maxval=LOG_ASPECT[1]))
    crop = jnp.minimum(side * jnp.sqrt(area * jnp.stack([1 / aspect, aspect])), side)
    corner = jax.random.uniform(place_key, (2,)) * (side - crop)
    scale = side / crop
    view = jax.image.scale_and_translate(
        image.astype(jnp.float32), image.shape, (0, 1), scale, -corner * scale, method="linear"
    )
    low, high = 1 - settings.jitter, 1 + settings.jitter
    contrast_, brightness = jax.random.uniform(colour_key, (2,), minval=low, maxval=high)
    mean = jnp.mean(view)
    return (view - mean) * contrast_ + mean * brightness
