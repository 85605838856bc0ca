"""AdamW and LARS with schedule, weight decay, layer-wise decay and clipping, built from optax."""

from collections.abc import Callable
import dataclasses
import re
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from fd_jax.typing import Config, PyTree

Optimizer = Literal["adamw", "lars"]
Moments = Literal["float32", "bfloat16", "factored"]
PolynomialVariant = Literal["mmcv", "mmengine"]


class Schedule(Protocol):
    """A learning rate as a function of the optimizer step."""

    def __call__(self, step: jax.Array | int, scale: jax.Array | float = 1.0) -> jax.Array:
        """Learning rate of optimizer step `step` (from 0) for a layer with the given scale."""
        ...


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then cosine decay, in optimizer steps and absolute learning rates.

    See docs/reference.md#lr-schedule.

    Attributes:
      start, peak, minimum: absolute learning rates.
      warmup_steps: number of warm-up steps.
      total_steps: number of all steps; from then on, the rate is `minimum`.
      lag: optimizer step i uses position max(i - lag, 0) of the schedule. The original advances its
        schedule after the step, so its lag is 1 (docs/reference.md#quirk-lr-lag).
      scale_floors: whether layer-wise decay scales `start` and `minimum` too. The original scales
        only `peak` (docs/reference.md#quirk-lr-floors), so the rate of its lowest layers can fall
        during warm-up and rise afterwards.
    """

    start: float
    peak: float
    minimum: float
    warmup_steps: int
    total_steps: int
    lag: int = 1
    scale_floors: bool = False

    def __call__(self, step: jax.Array | int, scale: jax.Array | float = 1.0) -> jax.Array:
        """See `Schedule`."""
        floor = scale if self.scale_floors else 1.0
        start, peak, minimum = self.start * floor, self.peak * scale, self.minimum * floor
        position = jnp.maximum(jnp.asarray(step, jnp.float32) - self.lag, 0.0)
        warm = start + position * (peak - start) / max(self.warmup_steps, 1)
        span = max(self.total_steps - self.warmup_steps, 1)
        progress = jnp.clip((position - self.warmup_steps) / span, 0.0, 1.0)
        cosine = minimum + (peak - minimum) / 2 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(position < self.warmup_steps, warm, cosine)


@dataclasses.dataclass(frozen=True)
class Polynomial:
    """Linear warm-up, then a straight line to 0 (docs/reference.md#ade20k-schedule).

    Attributes:
      peak: learning rate that the warm-up rises to.
      warmup_factor: share of the rate in the first step.
      warmup_steps: number of warm-up steps.
      total_steps: number of all steps; from then on, the rate is 0.
      variant: "mmcv": the line falls from the first step on, and the warm-up is a factor on it, so
        `peak` is never reached. "mmengine": the line starts at `peak` after the warm-up, and both
        end on their last step, which has the rate 0.
    """

    peak: float
    warmup_factor: float
    warmup_steps: int
    total_steps: int
    variant: PolynomialVariant = "mmcv"

    def __call__(self, step: jax.Array | int, scale: jax.Array | float = 1.0) -> jax.Array:
        """See `Schedule`."""
        position = jnp.asarray(step, jnp.float32)
        start, inclusive = (0, 0) if self.variant == "mmcv" else (self.warmup_steps, 1)
        last = self.total_steps - inclusive
        line = _share(last - position, last - start)
        warm = _share(position, self.warmup_steps - inclusive)
        factor = self.warmup_factor + (1 - self.warmup_factor) * warm
        factor = jnp.where(position < self.warmup_steps, factor, 1.0)
        return self.peak * scale * factor * line


def _share(steps: jax.Array, of: int) -> jax.Array:
    return jnp.clip(steps / max(of, 1), 0.0, 1.0)


def from_config(
    config: Config,
    params: PyTree,
    *,
    steps_per_epoch: int,
    total_steps: int,
    no_decay: tuple[str, ...],
    layer_scales: PyTree | None = None,
) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimizer of `config.optim` and its schedule, for a tree of arrays or shapes.

    The config is one that `settings.check` accepts.
    """
    optim = config.optim
    schedule = _schedule(config, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    if optim.name == "lars":
        tx = lars(
            schedule,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            clip_norm=optim.clip_norm or None,
        )
        return tx, schedule
    tx = adamw(
        schedule,
        params,
        betas=tuple(optim.betas),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip_norm=optim.clip_norm or None,
        no_decay=no_decay,
        decay_vectors=optim.decay_vectors,
        layer_scales=layer_scales,
        moments=optim.moments,
    )
    return tx, schedule


def _schedule(config: Config, *, steps_per_epoch: int, total_steps: int) -> Schedule:
    """The schedule of `config.optim`.

    Learning rates in the config are per `optim.lr_batch` images (512 in the original); only this
    function scales them to the global batch.
    """
    optim = config.optim
    scale = config.batch_size / optim.lr_batch
    if "polynomial" in optim:
        return Polynomial(
            peak=optim.peak_lr * scale,
            warmup_factor=optim.warmup_factor,
            warmup_steps=optim.warmup_steps,
            total_steps=total_steps,
            variant=optim.polynomial,
        )
    return Cosine(
        start=optim.start_lr * scale,
        peak=optim.peak_lr * scale,
        minimum=optim.min_lr * scale,
        warmup_steps=round(optim.warmup_epochs * steps_per_epoch),
        total_steps=total_steps,
        lag=optim.lag,
        scale_floors=optim.scale_floors,
    )


def adamw(
    schedule: Schedule,
    params: PyTree,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_norm: float | None,
    no_decay: tuple[str, ...],
    decay_vectors: bool = False,
    layer_scales: PyTree | None = None,
    moments: Moments = "float32",
) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay, clipping as in torch, and a learning rate per layer.

    Args:
      schedule: learning-rate schedule.
      params: tree of arrays or shapes to optimize.
      betas: decay rates of the two moments.
      eps: number added to the denominator, outside the square root.
      weight_decay: weight decay; `decay_mask` defines which parameters have none.
      clip_norm: maximum global gradient norm, or None.
      no_decay: patterns of parameter paths without weight decay, from the model family.
      decay_vectors: whether biases, norms and other vectors are decayed too.
      layer_scales: tree of floats like `params` (see `layer_scales`), or None for 1 everywhere.
      moments: "float32"; "bfloat16" keeps the first moment in bfloat16 (a quarter less state, but
        small updates are rounded away near convergence); "factored" keeps row and column means of
        the second moment and no first moment (almost no state, but another optimizer: Adafactor).
    """
    if moments == "factored":
        precondition = optax.scale_by_factored_rms(decay_rate=betas[1], epsilon=eps)
    else:
        mu_dtype = jnp.bfloat16 if moments == "bfloat16" else None
        precondition = optax.scale_by_adam(*betas, eps=eps, mu_dtype=mu_dtype)
    mask = decay_mask(params, no_decay, vectors=decay_vectors)
    return optax.chain(
        clip_by_norm(clip_norm) if clip_norm is not None else optax.identity(),
        precondition,
        optax.add_decayed_weights(weight_decay, mask=mask),
        scale_by_schedule(schedule, layer_scales),
    )


def lars(
    schedule: Schedule,
    *,
    momentum: float,
    weight_decay: float,
    clip_norm: float | None = None,
    trust: float = 0.001,
) -> optax.GradientTransformation:
    """LARS as MAE's linear probe defines it (docs/reference.md#lars).

    Tensors with more than one dimension get weight decay and a trust ratio; the others use plain
    SGD with momentum.
    """

    def local_rate(update, param):
        if param.ndim <= 1:
            return update
        update = update + weight_decay * param
        p_norm, u_norm = jnp.linalg.norm(param), jnp.linalg.norm(update)
        ratio = jnp.where((p_norm > 0) & (u_norm > 0), trust * p_norm / u_norm, 1.0)
        return update * ratio

    return optax.chain(
        clip_by_norm(clip_norm) if clip_norm is not None else optax.identity(),
        optax.stateless(lambda updates, params: jax.tree.map(local_rate, updates, params)),
        optax.trace(decay=momentum),
        scale_by_schedule(schedule, None),
    )


def clip_by_norm(limit: float) -> optax.GradientTransformation:
    """Scales all gradients by min(1, limit / (global norm + 1e-6)), as torch does."""

    def clip(updates, params=None):
        del params
        factor = jnp.minimum(1.0, limit / (optax.global_norm(updates) + 1e-6))
        return jax.tree.map(lambda update: update * factor, updates)

    return optax.stateless(clip)


class ScheduleState(NamedTuple):
    """Number of updates so far."""

    count: jax.Array


def scale_by_schedule(schedule: Schedule, scales: PyTree | None) -> optax.GradientTransformation:
    """Multiplies each update by minus the learning rate of its layer."""

    def init(params):
        del params
        return ScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params
        each = scales if scales is not None else jax.tree.map(lambda _: 1.0, updates)
        updates = jax.tree.map(lambda u, s: -schedule(state.count, s) * u, updates, each)
        return updates, ScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def decay_mask(params: PyTree, no_decay: tuple[str, ...], *, vectors: bool = False) -> PyTree:
    """True where weight decay applies (docs/reference.md#weight-decay).

    It does not apply to tensors with at most one dimension, unless `vectors` is set, and to
    parameters whose path (such as "blocks/0/attn/qkv/kernel") matches a pattern in `no_decay`.
    """

    def decays(path, leaf):
        name = path_name(path)
        return (vectors or leaf.ndim > 1) and not any(
            re.search(pattern, name) for pattern in no_decay
        )

    return jax.tree_util.tree_map_with_path(decays, params)


def layer_scales(
    params: PyTree, layer_id: Callable[[str], int], *, last: int, decay: float
) -> PyTree:
    """Learning-rate scale decay^(last - id) of each parameter (docs/reference.md#layer-decay).

    Args:
      params: tree of arrays or shapes.
      layer_id: parameter path -> layer id, from 0 at the input to `last` at the head.
      last: highest layer id.
      decay: factor per layer.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: decay ** (last - layer_id(path_name(path))), params
    )


def path_name(path: tuple[Any, ...]) -> str:
    """Formats a key path of a nested dict as "blocks/0/norm1/scale"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
