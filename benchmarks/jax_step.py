"""One train step of fd_jax for benchmarks, with random weights and one batch on the devices.

It needs the core of fd_jax and optax, but no data set, no TFDS and no TensorFlow.
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from fd_jax import sharding
from fd_jax.data import elements
from fd_jax.tasks.distill import DistillTask
from fd_jax.training.program import STOP, build
from fd_jax.typing import Config


@dataclasses.dataclass
class JaxStep:
    """A compiled train step with its arguments; call it for one update.

    Attributes:
      task: the task that is trained.
      compiled: jax's compiled step, which donates the state.
      compile_seconds: compile time, including tracing and lowering.
    """

    task: DistillTask
    compiled: Any
    compile_seconds: float
    _state: Any
    _arguments: tuple[Any, ...]

    def __call__(self) -> Any:
        """Starts one update and returns its metrics, which the caller may wait for."""
        self._state, metrics = self.compiled(self._state, *self._arguments)
        return metrics


def distillation(task: DistillTask, config: Config, images: np.ndarray) -> JaxStep:
    """The step of a distillation on the first device.

    Args:
      task: the task to train.
      config: the run's config, with the batch size of `images`.
      images: uint8 [B, H, W, 3].
    """
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    program = build(task, config, mesh, steps_per_epoch=100, total_steps=1000)
    began = time.monotonic()
    compiled = program.compile_train_step()
    compile_seconds = time.monotonic() - began
    frozen = program.place_frozen(random_weights(task.abstract_frozen()))
    batch = jax.device_put(host_batch(images), sharding.batch_sharding(mesh))
    state = program.create(jax.random.key(0), {})
    arguments = (frozen, batch, program.place_seed(0))
    return JaxStep(task, compiled, compile_seconds, state, arguments)


def host_batch(images: np.ndarray) -> dict[str, np.ndarray]:
    """The batch that the loop passes to a step, with empty labels. All arrays have B rows."""
    entries = {**elements.of_batch(elements.labelled_image(images.shape[1])), "stop": STOP}
    batch = {name: np.zeros((len(images), *e.shape), e.dtype) for name, e in entries.items()}
    return batch | {"image": images, "weight": np.ones(len(images), np.float32)}


def random_weights(shapes: Any) -> Any:
    """Host arrays drawn from N(0, 0.02), with the shapes and dtypes of a tree."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (0.02 * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype), shapes
    )
