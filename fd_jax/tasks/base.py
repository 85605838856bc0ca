"""The interface between a task and the training loop."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from flax import nnx
import jax
import optax

from fd_jax.cost.flops import Flops
from fd_jax.data.base import Data
from fd_jax.evaluation.evaluators import Evaluator
from fd_jax.models.spec import ModelSpec
from fd_jax.optimizer import Schedule
from fd_jax.typing import Batch, Metrics, PyTree

# The part of `Task.load_initial` that is no part of params.
EXTRA = "extra"


class Task(Protocol):
    """The static definition of a training task. It holds no arrays, so jit can close over it.

    Batches are {"image": uint8 [B, H, W, 3], "label": int32 [B], "weight": float32 [B],
    "index": int32 [B]}, plus any other elements that the data defines; weight is 0 for padding.

    Attributes:
      attention: name of the attention implementation of each network, the trained network first.
    """

    attention: dict[str, str]

    @property
    def trains_encoder(self) -> bool:
        """Whether gradients go through a whole encoder.

        If they do, activation checkpointing saves memory, and a batch can be split into
        micro-batches.
        """
        ...

    def check_data(self, data: Data) -> None:
        """Raises an error for data that this task cannot use, before anything is computed.

        A task with a head numbers the classes of the data, and keeps their names for `export`.
        """
        ...

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Fresh (params, extra). The loop jits this, so that the arrays are created sharded."""
        ...

    def load_initial(self) -> PyTree:
        """Host arrays that replace parts of the fresh params, as a nested dict; {} if none do.

        Those in the part `EXTRA` replace parts of the fresh state that is not trained.
        """
        ...

    def load_frozen(self) -> PyTree:
        """Host arrays that a step uses but does not train (teacher, held weights), or {}."""
        ...

    def abstract_frozen(self) -> PyTree:
        """Shapes and dtypes of `load_frozen`, without reading weights."""
        ...

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Adds all random numbers to a whole global batch, in arrays with one row per example."""
        ...

    def loss(
        self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """(mean loss, (new extra state, metrics)) of a prepared batch. Deterministic."""
        ...

    def evaluate(self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch) -> Metrics:
        """Metrics of an unprepared batch; padding has weight 0 and does not count."""
        ...

    def features(self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch) -> jax.Array:
        """One feature vector per image, for nearest neighbours. -> [B, D] float32."""
        ...

    def optimizer(
        self, params: PyTree, *, steps_per_epoch: int, total_steps: int
    ) -> tuple[optax.GradientTransformation, Schedule]:
        """The optimizer for a tree of arrays or shapes, and the learning-rate schedule to log."""
        ...

    def evaluators(self) -> Sequence[Evaluator]:
        """The evaluators to run on held-out data, in the order in which they are reported."""
        ...

    def flops(self) -> Flops | None:
        """FLOPs of a step, per image, in closed form; None if no closed form is known."""
        ...

    def export(self, params: PyTree, extra: PyTree) -> tuple[ModelSpec, PyTree]:
        """The spec and parameters that are saved in the model folder at the end."""
        ...


@runtime_checkable
class Predicts(Protocol):
    """What a task offers besides if its evaluators need more than metrics of a batch."""

    def predict(self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch) -> jax.Array:
        """What the network says about the images of an unprepared batch. -> [B, ...] float32."""
        ...


@runtime_checkable
class Resizes(Protocol):
    """What a task offers besides if its training images may have several sizes."""

    def flops_at(self, image_size: int) -> Flops:
        """FLOPs of a step, for each image whose side is `image_size` pixels."""
        ...


def apply_frozen(definition: nnx.GraphDef, params: PyTree, *args, **kwargs) -> Any:
    """Calls a network so that no gradient reaches its parameters or its inputs."""
    module = nnx.merge(definition, jax.lax.stop_gradient(params))
    return jax.lax.stop_gradient(module(*args, **kwargs))
