"""Weighted k-nearest-neighbour accuracy of frozen features, as DINO measures it.

Bank and queries are sharded over the batch axes of the mesh. Each batch of queries is compared with
every device's shard of the bank, the best k of each shard are gathered, and the best k of these
vote. The result is exact for any number of devices, and each device sends at most k candidates per
query.
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
from fd_jax.evaluation.classification import reported
from fd_jax.metrics import Mean
from fd_jax.sharding import BATCH_AXES

TEMPERATURE = 0.07


class Features(NamedTuple):
    """Feature vectors of a dataset, as a list of batches.

    Attributes:
      vectors: features, [B, D] float32 per batch, sharded over the batch axes of the mesh.
      labels: labels, [B] int32 per batch.
      weights: weights, [B] per batch, 0 for padding.
    """

    vectors: Sequence[jax.Array]
    labels: Sequence[jax.Array]
    weights: Sequence[jax.Array]


def accuracy(
    bank: Features, queries: Features, *, mesh: Mesh, classes: int, k: int
) -> dict[str, float]:
    """Top-1 and top-5 accuracy of the neighbours' vote; only top-1 of five classes or fewer.

    Args:
      bank: labelled examples.
      queries: examples to classify.
      mesh: mesh that holds both.
      classes: number of classes.
      k: number of neighbours that vote, each with weight exp(cosine / 0.07).

    Raises:
      ConfigError: the bank has fewer than k examples.
    """
    # As separate batches, the bank would be gathered again for every batch of queries; as one
    # array it stays in place.
    whole_bank = [_concatenate(batches, mesh) for batches in bank]
    size = int(jnp.sum(whole_bank[2]))
    if not 0 < k <= size:
        raise ConfigError(
            f"eval.knn={k}, but the bank has {size} examples; set it to between 1 and {size}"
        )
    vote = jax.jit(functools.partial(votes, mesh=mesh, classes=classes, k=k))
    total = Mean()
    for vector, label, weight in zip(*queries, strict=True):
        total.add(_correct(vote(*whole_bank, vector), label, weight))
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
    """The total vote for each class from the k nearest neighbours of each query.

    Args:
      bank: features, [N, D].
      labels: labels of the bank, [N].
      weights: weights of the bank, [N]; 0 for padding, which is never a neighbour.
      queries: features, [Q, D].
      mesh: mesh over whose batch axes the bank is sharded.
      classes: number of classes, C.
      k: number of neighbours that vote.

    Returns:
      [Q, C] float32.
    """
    bank, queries = losses.l2_normalize(bank), losses.l2_normalize(queries)

    def nearest_in_shard(bank, labels, weights, queries):
        cosine = jnp.einsum("qd,nd->qn", queries, bank, precision="highest")
        cosine = jnp.where(weights > 0, cosine, -jnp.inf)
        best, position = jax.lax.top_k(cosine, min(k, cosine.shape[1]))
        return best, labels[position]

    split, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    nearest = shard_map(
        nearest_in_shard,
        mesh=mesh,
        in_specs=(split, split, split, whole),
        out_specs=PartitionSpec(None, BATCH_AXES),
    )
    cosine, label = nearest(bank, labels, weights, queries)  # [Q, k per shard]
    best, position = jax.lax.top_k(cosine, k)
    label = jnp.take_along_axis(label, position, axis=1)
    voters = jax.nn.one_hot(label, classes) * jnp.exp(best / TEMPERATURE)[..., None]
    return jnp.sum(voters, axis=1)


@jax.jit
def _correct(vote: jax.Array, label: jax.Array, weight: jax.Array):
    own = jnp.take_along_axis(vote, jnp.maximum(label, 0)[:, None], axis=1)
    better = jnp.sum(vote > own, axis=1)
    # A class without any vote is never correct, even if few classes have more votes.
    voted = own[:, 0] > 0
    return {
        f"knn_top{n}": (jnp.sum(((better < n) & voted) * weight), jnp.sum(weight))
        for n in reported(vote.shape[-1])
    }


def _concatenate(batches: Sequence[jax.Array], mesh: Mesh) -> jax.Array:
    sharding = jax.NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return jax.block_until_ready(jax.jit(jnp.concatenate, out_shardings=sharding)(list(batches)))
