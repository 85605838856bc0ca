"""Teacher dropping: an image learns from the teacher it is furthest from and, by chance, others.

The rule is that of UNIC (arXiv 2408.05088): in each image the teacher with the largest loss stays,
and every other one is left out with the same probability. Two things are ours: the comparison by
running losses, and the scale, by which nothing left out gives the sum over the teachers.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from fd_jax.typing import PyTree

By = Literal["image", "running"]


@dataclasses.dataclass(frozen=True)
class Dropping:
    """Which teachers an image learns from.

    Attributes:
      rate: probability with which a teacher that is not the furthest is left out.
      by: "image" compares the losses of the image itself, "running" their averages over the steps
        so far, which a single odd image does not change.
      decay: share of a running loss that is kept at every step.
    """

    rate: float
    by: By = "image"
    decay: float = 0.99

    def init(self, teachers: int) -> PyTree:
        """State before the first step; {} if there is none to keep."""
        if self.by == "image":
            return {}
        return {"loss": jnp.zeros(teachers), "steps": jnp.zeros((), jnp.int32)}

    def average(self, state: PyTree, losses: jax.Array, weight: jax.Array) -> PyTree:
        """The state after a step. `losses`: [B, K] of K teachers; `weight`: [B]."""
        if self.by == "image":
            return state
        mean = weight @ losses / jnp.sum(weight)
        before = jnp.where(state["steps"] == 0, mean, state["loss"])
        loss = self.decay * before + (1 - self.decay) * mean
        return {"loss": loss, "steps": state["steps"] + 1}

    def kept(self, state: PyTree, losses: jax.Array, draws: jax.Array) -> jax.Array:
        """Which teachers each image learns from, as 0 and 1. -> [B, K] float32

        Args:
          state: result of `average` of the step.
          losses: of each image and teacher. [B, K]
          draws: uniform random numbers from 0 to 1. [B, K]
        """
        compared = losses if self.by == "image" else jnp.broadcast_to(state["loss"], losses.shape)
        furthest = jnp.argmax(compared, axis=1)[:, None] == jnp.arange(losses.shape[1])
        return (furthest | (draws >= self.rate)).astype(jnp.float32)


def loss_of_kept(losses: jax.Array, kept: jax.Array, weight: jax.Array) -> jax.Array:
    """K times the mean over the kept pairs of image and teacher. [B, K], [B, K], [B] -> scalar"""
    counts = kept * weight[:, None]
    return losses.shape[1] * jnp.sum(counts * losses) / jnp.sum(counts)
