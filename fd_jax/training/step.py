"""The train state and the jitted step: pure functions, no input or output."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fd_jax.tasks.base import Task
from fd_jax.typing import Metrics, PyTree

StepFn = Callable[["TrainState", PyTree, PyTree, jax.Array], tuple["TrainState", Metrics]]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "extra", "ema"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step. The frozen teacher is not part of it.

    Attributes:
      step: number of updates so far, int32 scalar; skipped updates count.
      params: trained parameters, nested dict of float32 arrays.
      opt_state: state of the optax optimizer.
      extra: state that is not trained, e.g. batch statistics; {} for most tasks.
      ema: moving average of `params`, or None.
    """

    step: Any
    params: PyTree
    opt_state: PyTree
    extra: PyTree
    ema: PyTree | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields by name, as a checkpoint stores them; None is left out."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "TrainState":
        """Inverts `to_dict`."""
        return cls(**{"ema": None, **tree})


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    ema_decay: float | None = None,
) -> StepFn:
    """Returns a function (state, frozen, batch, seed) -> (state, metrics) that does one update.

    The seed, a uint32 scalar, is an argument rather than a constant, so that runs with different
    seeds share one compiled program.

    All random numbers are drawn from the seed and the step for the whole global batch, before it is
    split into micro-batches. The rest is deterministic, so the result depends neither on the mesh
    nor on the number of hosts nor on the accumulation, except for the order of reductions.

    If the loss or a gradient is not finite, the update is skipped: parameters, moments and averages
    stay as they were, and the metric "nonfinite" counts the step.

    Args:
      task: task that prepares the batch and computes the loss.
      tx: optimizer.
      accumulation: number of micro-batches that the global batch is split into.
      ema_decay: decay of the moving average of the parameters; None for no average.
    """
    value_and_grad = jax.value_and_grad(task.loss, has_aux=True)
    decay = ema_decay or 0.0

    def step(
        state: TrainState, frozen: PyTree, batch: PyTree, seed: jax.Array
    ) -> tuple[TrainState, Metrics]:
        batch = dict(batch)
        stop = batch.pop("stop", None)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        batch = task.prepare(batch, key)
        (loss, (extra, metrics)), grads = _accumulate(
            value_and_grad, accumulation, state.params, state.extra, frozen, batch
        )
        norm = optax.global_norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)

        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        one = jnp.ones((), jnp.float32)
        metrics = {
            **metrics,
            "grad_norm": (norm, one),
            "param_norm": (optax.global_norm(params), one),
            "nonfinite": (1 - finite.astype(jnp.float32), one),
        }
        if stop is not None:
            metrics["stop"] = (jnp.sum(stop).astype(jnp.float32), one)
        new_state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
            extra=keep(extra, state.extra),
            ema=None if ema is None else keep(ema, state.ema),
        )
        return new_state, metrics

    return step


def _accumulate(value_and_grad, micro_batches, params, extra, frozen, batch):
    """Computes loss, aux and gradient of the whole batch in `micro_batches` equal parts."""
    if micro_batches == 1:
        return value_and_grad(params, extra, frozen, batch)

    def split(leaf):
        # Micro-batch j takes rows j, j + k, ..., so that no row has to move to another device.
        parts = leaf.reshape(-1, micro_batches, *leaf.shape[1:])
        return jnp.moveaxis(parts, 1, 0)

    def add(carry, micro):
        extra, grads = carry
        (loss, (extra, metrics)), more = value_and_grad(params, extra, frozen, micro)
        return (extra, jax.tree.map(jnp.add, grads, more)), (loss, metrics)

    start = (extra, jax.tree.map(jnp.zeros_like, params))
    (extra, grads), (losses, metrics) = jax.lax.scan(add, start, jax.tree.map(split, batch))
    grads = jax.tree.map(lambda grad: grad / micro_batches, grads)
    metrics = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), metrics)
    return (jnp.mean(losses), (extra, metrics)), grads
