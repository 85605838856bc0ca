"""Weighted nearest neighbours on frozen features, as DINO measures them.

Bank and queries lie on the mesh, split over the batch axes. Every chunk of queries is compared with
each device's part of the bank, the best k of each part are gathered, and the best k of those vote:
exact for any number of devices, with no more than k candidates per device moved.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
from jax import shard_map
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from fd_jax import losses
from fd_jax.errors import ConfigError
from fd_jax.metrics import Mean
from fd_jax.sharding import BATCH_AXES

TEMPERATURE = 0.07


class Features(NamedTuple):
    """Feature vectors of a dataset, in batches as they came.

    Attributes:
      vectors: of each batch, [B, D] float32, split over the batch axes of the mesh.
      labels: of each batch, [B] int32.
      weights: of each batch, [B], 0 for padding.
    """

    vectors: Sequence[jax.Array]
    labels: Sequence[jax.Array]
    weights: Sequence[jax.Array]


def accuracy(
    bank: Features, queries: Features, *, mesh: Mesh, classes: int, k: int
) -> dict[str, float]:
    """Top-1 and top-5 accuracy of the neighbours' vote.

    Args:
      bank: labelled examples.
      queries: examples to classify.
      mesh: on which both lie.
      classes: number of labels.
      k: neighbours that vote, each with exp(cosine / 0.07).

    Raises:
      ConfigError: fewer than k examples in the bank.
    """
    # Batch by batch the bank would be gathered anew for every query; joined it stays in place.
    joined = [_join(parts, mesh) for parts in bank]
    size = int(jnp.sum(joined[2]))
    if not 0 < k <= size:
        raise ConfigError(f"eval.knn={k} neighbours asked for, but the bank has {size} examples")
    vote = jax.jit(functools.partial(votes, mesh=mesh, classes=classes, k=k))
    total = Mean()
    for vector, label, weight in zip(*queries, strict=True):
        total.add(_hits(vote(*joined, vector), label, weight))
    return total.result()


def votes(
    bank: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    queries: jax.Array,
    *,
    mesh: Mesh,
    classes: int,
    k: int,
) -> jax.Array:
    """The weight of each class among the k nearest of each query.

    Args:
      bank: [N, D].
      labels: [N] of the bank.
      weights: [N], 0 for padding, which never is a neighbour.
      queries: [Q, D].
      mesh: over whose batch axes the bank is split.
      classes: number of labels, C.
      k: neighbours that vote.

    Returns:
      [Q, C] float32.
    """
    bank, queries = losses.l2_normalize(bank), losses.l2_normalize(queries)

    def nearest_of_part(bank, labels, weights, queries):
        cosine = jnp.einsum("qd,nd->qn", queries, bank, precision="highest")
        cosine = jnp.where(weights > 0, cosine, -jnp.inf)
        best, position = jax.lax.top_k(cosine, min(k, cosine.shape[1]))
        return best, labels[position]

    split, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    nearest = shard_map(
        nearest_of_part,
        mesh=mesh,
        in_specs=(split, split, split, whole),
        out_specs=PartitionSpec(None, BATCH_AXES),
    )
    cosine, label = nearest(bank, labels, weights, queries)  # [Q, k of each part]
    best, position = jax.lax.top_k(cosine, k)
    label = jnp.take_along_axis(label, position, axis=1)
    voters = jax.nn.one_hot(label, classes) * jnp.exp(best / TEMPERATURE)[..., None]
    return jnp.sum(voters, axis=1)


@jax.jit
def _hits(vote: jax.Array, label: jax.Array, weight: jax.Array):
    own = jnp.take_along_axis(vote, jnp.maximum(label, 0)[:, None], axis=1)
    better = jnp.sum(vote > own, axis=1)
    # A class without a vote is no answer, however few have more votes.
    voted = own[:, 0] > 0
    return {
        f"knn_top{n}": (jnp.sum(((better < n) & voted) * weight), jnp.sum(weight)) for n in (1, 5)
    }


def _join(parts: Sequence[jax.Array], mesh: Mesh) -> jax.Array:
    sharding = jax.NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return jax.block_until_ready(jax.jit(jnp.concatenate, out_shardings=sharding)(list(parts)))
