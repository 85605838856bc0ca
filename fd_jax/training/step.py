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
    """Everything that changes from step to step. The frozen teacher is not among it.

    Attributes:
      step: int32 scalar, updates tried so far (skipped ones count).
      params: nested dict, float32.
      opt_state: of optax.
      extra: state that is not trained (BatchNorm statistics); {} for most tasks.
      ema: moving average of `params`, or None.
    """

    step: Any
    params: PyTree
    opt_state: PyTree
    extra: PyTree
    ema: PyTree | None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as a checkpoint holds them; None is left out."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "TrainState":
        """The state of `to_dict`."""
        return cls(**{"ema": None, **tree})


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    ema_decay: float | None = None,
) -> StepFn:
    """One update as a function (state, frozen, batch, seed) -> (state, metrics).

    The seed, a uint32 scalar, is an argument and no constant: the seeds of a study share a program.

    All randomness is drawn once, for the whole global batch, from the seed and the step, before
    anything is split into micro-batches; what follows is deterministic. So the result depends
    neither on the mesh nor on the host count nor on the accumulation, up to reduction order.

    An update whose loss or gradient is not finite leaves parameters, moments and averages as they
    were and is counted in the metric "nonfinite".
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
    """Loss, aux and gradient of the whole batch, computed in `micro_batches` equal parts."""
    if micro_batches == 1:
        return value_and_grad(params, extra, frozen, batch)

    def split(leaf):
        # Micro-batch j takes rows j, j + k, ...: every device keeps the rows it holds.
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
