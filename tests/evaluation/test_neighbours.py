"""Nearest neighbours against a plain loop, on several meshes, with padding."""

import jax
import numpy as np
import pytest

from fd_jax import sharding
from fd_jax.errors import ConfigError
from fd_jax.evaluation import neighbours

CLASSES = 7


def data(count, seed, width=12):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    centres = np.random.default_rng(0).normal(size=(CLASSES, width))
    return (centres[labels] + 1.2 * rng.normal(size=(count, width))).astype(np.float32), labels


def plain_accuracy(bank, labels, queries, wanted, k):
    bank = bank.astype(np.float64) / np.linalg.norm(bank, axis=1, keepdims=True)
    hits = np.zeros(2)
    for query, label in zip(queries.astype(np.float64), wanted, strict=True):
        cosine = bank @ (query / np.linalg.norm(query))
        votes = np.zeros(CLASSES)
        for place in np.argsort(-cosine)[:k]:
            votes[labels[place]] += np.exp(cosine[place] / 0.07)
        ranked = [c for c in np.argsort(-votes) if votes[c] > 0]
        hits += [label in ranked[:1], label in ranked[:5]]
    return hits / len(wanted)


def batched(vectors, labels, mesh, size):
    """Global batches of one size, the last one padded with rubbish of weight 0."""
    split = sharding.batch_sharding(mesh)
    batches = []
    for start in range(0, len(vectors), size):
        rows = slice(start, start + size)
        padding = size - len(vectors[rows])
        batches.append(
            (
                np.concatenate([vectors[rows], np.full((padding, 12), 9.0, np.float32)]),
                np.concatenate([labels[rows], np.full(padding, -1)]).astype(np.int32),
                np.concatenate([np.ones(size - padding), np.zeros(padding)]).astype(np.float32),
            )
        )
    arrays = [[jax.device_put(leaf, split) for leaf in batch] for batch in batches]
    return neighbours.Features(*zip(*arrays, strict=True))


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("count,queries,k", [(53, 31, 5), (101, 17, 20), (24, 7, 24)])
def test_accuracy_is_that_of_a_plain_loop(devices, count, queries, k):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    bank, held_out = data(count, 1), data(queries, 2)
    got = neighbours.accuracy(
        batched(*bank, mesh, 16), batched(*held_out, mesh, 16), mesh=mesh, classes=CLASSES, k=k
    )
    want = plain_accuracy(*bank, *held_out, k)
    np.testing.assert_allclose([got["knn_top1"], got["knn_top5"]], want, rtol=1e-12)


def test_features_tell_the_classes_apart_and_shuffled_labels_do_not():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    (bank, labels), held_out = data(200, 1), data(100, 2)
    args = {"mesh": mesh, "classes": CLASSES, "k": 10}
    right = neighbours.accuracy(
        batched(bank, labels, mesh, 50), batched(*held_out, mesh, 50), **args
    )
    wrong = batched(bank, np.random.default_rng(3).permutation(labels), mesh, 50)
    assert right["knn_top1"] > 0.6
    assert neighbours.accuracy(wrong, batched(*held_out, mesh, 50), **args)["knn_top1"] < 0.35


def test_more_neighbours_than_examples_are_refused():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    bank = batched(*data(10, 1), mesh, 16)
    with pytest.raises(ConfigError, match="eval.knn=11 neighbours asked for, but the bank has 10"):
        neighbours.accuracy(bank, bank, mesh=mesh, classes=CLASSES, k=11)
