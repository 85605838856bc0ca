"""What the loop asks of a task."""

from collections.abc import Sequence
from typing import Any, Protocol

from flax import nnx
import jax
import optax

from fd_jax.cost.flops import Flops
from fd_jax.data.base import Data
from fd_jax.evaluation.evaluators import Evaluator
from fd_jax.models.spec import ModelSpec
from fd_jax.optimizer import Schedule
from fd_jax.typing import Batch, Metrics, PyTree


class Task(Protocol):
    """Static definitions of one thing to train: no arrays inside, so it can be closed over.

    Batches are {"image": uint8 [B, H, W, 3], "label": int32 [B], "weight": float32 [B],
    "index": int32 [B]} and whatever else the data's elements name; weight is 0 for padding.

    Attributes:
      attention: implementation of attention by network, the one that trains first.
    """

    attention: dict[str, str]

    @property
    def trains_encoder(self) -> bool:
        """Whether gradients go through a whole encoder.

        Then activation checkpointing saves memory, and a batch can be taken in parts.
        """
        ...

    def check_data(self, data: Data) -> None:
        """Refuses data that this task cannot use, before anything is computed."""
        ...

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Fresh (params, extra); traced by jit, so that they are created sharded."""
        ...

    def load_initial(self) -> PyTree:
        """Host arrays that replace parts of the fresh params, as a nested dict; {} for none."""
        ...

    def load_frozen(self) -> PyTree:
        """Host arrays that take part but do not train (teacher, probed encoder); {} for none."""
        ...

    def abstract_frozen(self) -> PyTree:
        """Shapes and dtypes of `load_frozen`, without reading weights."""
        ...

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Adds everything random to a whole global batch, each array with rows per example."""
        ...

    def loss(
        self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        """Mean loss of a prepared batch, new extra state and metrics. Deterministic."""
        ...

    def evaluate(self, params: PyTree, extra: PyTree, frozen: PyTree, batch: Batch) -> Metrics:
        """Metrics of a batch as it comes from the data, padding excluded by its weight."""
        ...

    def features(self, params: PyTree, frozen: PyTree, batch: Batch) -> jax.Array:
        """One vector per image, for nearest neighbours. -> [B, D] float32."""
        ...

    def optimizer(
        self, params: PyTree, *, steps_per_epoch: int, total_steps: int
    ) -> tuple[optax.GradientTransformation, Schedule]:
        """The transformation for a tree of shapes, and the rate to report."""
        ...

    def evaluators(self) -> Sequence[Evaluator]:
        """What is measured on held-out data, in the order of its report."""
        ...

    def flops(self) -> Flops | None:
        """Of a step, per image, in closed form; None where no closed form is known."""
        ...

    def export(self, params: PyTree, extra: PyTree) -> tuple[ModelSpec, PyTree]:
        """What goes into the model folder at the end."""
        ...


def apply_frozen(definition: nnx.GraphDef, params: PyTree, *args, **kwargs) -> Any:
    """Calls a network without letting a gradient into it or its input."""
    module = nnx.merge(definition, jax.lax.stop_gradient(params))
    return jax.lax.stop_gradient(module(*args, **kwargs))
