"""A task on a mesh: shapes, shardings and jitted functions, defined before any array exists.

The loop runs a program; the planner compiles the same program ahead of time, without the chips.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from fd_jax import sharding
from fd_jax.data.elements import Element, Elements
from fd_jax.models import kernels
from fd_jax.optimizer import Schedule
from fd_jax.tasks import registry
from fd_jax.tasks.base import EXTRA, Predicts, Task
from fd_jax.training.step import TrainState, make_train_step
from fd_jax.typing import Config, PyTree

# Element that the loop adds to each batch: 1 in the rows of a host that received SIGTERM.
STOP = Element((), "int32")


@dataclasses.dataclass(frozen=True)
class Program:
    """The functions and shapes of a run. `build` makes one.

    Attributes:
      mesh: device mesh.
      total_steps: number of updates of the whole run.
      schedule: learning rate as a function of the optimizer step.
      state, frozen, batch, seed: shapes with their shardings.
      train_batches: shapes of training batches by the side of their images, where it varies.
      create: (key, initial host arrays) -> TrainState, created already sharded.
      train_step: jitted (state, frozen, batch, seed) -> (state, metrics); donates the state.
      eval_step: jitted (params, extra, frozen, batch) -> metrics.
      features: jitted (params, extra, frozen, batch) -> [B, D] float32, split over the batch.
      predict: jitted (params, extra, frozen, batch) -> what a task that `Predicts` makes of the
        images, split over the batch; None for other tasks.
    """

    mesh: Mesh
    total_steps: int
    schedule: Schedule
    state: TrainState
    frozen: PyTree
    batch: PyTree
    train_batches: dict[int, PyTree]
    seed: jax.ShapeDtypeStruct
    create: Callable[[jax.Array, PyTree], TrainState]
    train_step: Any
    eval_step: Any
    features: Any
    predict: Any

    def place_frozen(self, host: PyTree) -> PyTree:
        """Puts the frozen weights onto the mesh, sharded by the same rules as the student's."""
        return jax.tree.map(_put, host, self.frozen)

    def place_seed(self, seed: int) -> jax.Array:
        """Returns the seed as an argument for the step: uint32 scalar, on all devices."""
        value = np.uint32(seed)
        return jax.make_array_from_callback((), self.seed.sharding, lambda _: value)

    def compile_train_step(
        self, image_size: int | None = None, **compiler_options
    ) -> jax.stages.Compiled:
        """Lowers and compiles the train step for the devices of the mesh.

        Args:
          image_size: side of the images, one of those of `train_batches`; None for `batch`.
          **compiler_options: of XLA.
        """
        batch = self.batch if image_size is None else self.train_batches[image_size]
        lowered = self.train_step.lower(self.state, self.frozen, batch, self.seed)
        return lowered.compile(compiler_options or None)


def build(
    task: Task,
    config: Config,
    mesh: Mesh,
    *,
    steps_per_epoch: int,
    total_steps: int,
    elements: Elements | None = None,
    train_elements: Mapping[int, Elements] | None = None,
) -> Program:
    """Defines a run of `task` on `mesh`, without computing anything.

    Args:
      task: task to train.
      config: config of the run, which `settings.check` accepts.
      mesh: device mesh.
      steps_per_epoch: number of full batches in an epoch.
      total_steps: number of updates.
      elements: specification of the batches; derived from the config if None.
      train_elements: that of training batches by the side of their images, where it varies.

    Raises:
      ConfigError: the batch does not split over the mesh.
    """
    if elements is None:
        elements = registry.kind_of(config).elements(config)
    sharding.check_batch(config.batch_size, config.accumulation, mesh)
    whole = sharding.replicated(mesh)
    params, extra = jax.eval_shape(task.init, jax.random.key(0))
    tx, schedule = task.optimizer(params, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    opt_state = jax.eval_shape(tx.init, params)
    ema_decay = config.ema_decay or None
    params = _with_shardings(params, sharding.param_shardings(params, mesh))
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        params=params,
        opt_state=_with_shardings(
            opt_state, sharding.optimizer_shardings(tx, opt_state, params, mesh)
        ),
        extra=jax.tree.map(lambda leaf: _struct(leaf, whole), extra),
        ema=params if ema_decay else None,
    )
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    frozen = task.abstract_frozen()

    def create(key: jax.Array, initial: PyTree) -> TrainState:
        shardings = (state_shardings.params, state_shardings.extra)
        params, extra = jax.jit(task.init, out_shardings=shardings)(key)
        params, extra = overlay(params, initial), overlay(extra, initial.get(EXTRA, {}))
        opt_state = jax.jit(tx.init, out_shardings=state_shardings.opt_state)(params)
        ema = jax.tree.map(jnp.copy, params) if ema_decay else None
        step = jax.device_put(jnp.zeros((), jnp.int32), whole)
        return TrainState(step=step, params=params, opt_state=opt_state, extra=extra, ema=ema)

    def on_mesh(function: Callable) -> Callable:
        @functools.wraps(function)
        def traced(*args):
            with kernels.split_over(mesh, batch=sharding.BATCH_AXES, heads="tensor"):
                return function(*args)

        return traced

    split = sharding.batch_sharding(mesh)
    step = make_train_step(task, tx, accumulation=config.accumulation, ema_decay=ema_decay)
    return Program(
        mesh=mesh,
        total_steps=total_steps,
        schedule=jax.jit(schedule),  # twenty small operations, each a program of its own
        state=state,
        frozen=_with_shardings(frozen, sharding.param_shardings(frozen, mesh)),
        batch=_abstract_batch(elements, config.batch_size, mesh),
        train_batches={
            side: _abstract_batch(each, config.batch_size, mesh)
            for side, each in (train_elements or {}).items()
        },
        seed=jax.ShapeDtypeStruct((), jnp.uint32, sharding=whole),
        create=create,
        train_step=jax.jit(on_mesh(step), donate_argnums=0, out_shardings=(state_shardings, whole)),
        eval_step=jax.jit(on_mesh(task.evaluate), out_shardings=whole),
        features=jax.jit(on_mesh(task.features), out_shardings=split),
        predict=jax.jit(on_mesh(task.predict), out_shardings=split)
        if isinstance(task, Predicts)
        else None,
    )


def overlay(params: PyTree, initial: PyTree) -> PyTree:
    """Returns `params` with the arrays in `initial` in place of those with the same path.

    Each new array gets the dtype and sharding of the one that it replaces.
    """
    if not isinstance(params, dict):
        return _put(initial, params)
    return {
        name: overlay(value, initial[name]) if name in initial else value
        for name, value in params.items()
    }


def _put(host: Any, like: Any) -> jax.Array:
    if host.shape != like.shape:
        raise ValueError(f"an array has shape {host.shape}, expected {like.shape}")
    return sharding.place(host.astype(like.dtype), like.sharding)


def _abstract_batch(elements: Elements, rows: int, mesh: Mesh) -> PyTree:
    split = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((rows, *element.shape), element.dtype, sharding=split)
        for name, element in {**elements, "stop": STOP}.items()
    }


def _with_shardings(tree: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(_struct, tree, shardings)


def _struct(leaf: Any, placement: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)
