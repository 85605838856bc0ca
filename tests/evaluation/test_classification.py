"""Accuracy metrics, confusion matrix and tables against torch and plain loops."""

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fd_jax.evaluation import classification
from fd_jax.show import pictures, tables

CLASSES, COUNT = 9, 37


def data():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(COUNT, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, COUNT).astype(np.int32)
    weight = (rng.random(COUNT) < 0.8).astype(np.float32)
    return logits, labels, weight


def test_accuracy_metrics_equal_torch():
    logits, labels, weight = data()
    real = weight > 0
    got = classification.accuracy_metrics(
        jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(weight)
    )
    kept = torch.from_numpy(logits[real])
    target = torch.from_numpy(labels[real]).long()
    loss = torch.nn.functional.cross_entropy(kept, target).item()
    best = kept.topk(5).indices
    hits = (best == target[:, None]).numpy()
    expected = {"loss": loss, "top1": hits[:, 0].mean(), "top5": hits.any(1).mean()}
    for name, value in expected.items():
        total, count = got[name]
        assert count == real.sum()
        np.testing.assert_allclose(total / count, value, rtol=1e-6)


def test_padding_with_label_minus_one_does_not_change_the_metrics():
    logits, labels, weight = data()
    padded = np.where(weight > 0, labels, -1)
    plain = classification.accuracy_metrics(
        jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(weight)
    )
    with_padding = classification.accuracy_metrics(
        jnp.asarray(logits), jnp.asarray(padded), jnp.asarray(weight)
    )
    assert jax.device_get(plain) == jax.device_get(with_padding)


def test_logits_that_are_not_numbers_are_wrong_answers():
    logits = np.zeros((4, CLASSES), np.float32)
    logits[:, 2] = 1
    logits[1] = np.nan  # the whole row
    logits[2, 2] = np.nan  # the label's own
    logits[3, 0] = -np.inf  # another class, which is no reason to doubt the answer
    labels = np.full(4, 2, np.int32)
    got = classification.accuracy_metrics(
        jnp.asarray(logits), jnp.asarray(labels), jnp.ones(4, jnp.float32)
    )
    assert got["top1"] == (2, 4) and got["top5"] == (2, 4)


def test_confusion_matrix_equals_a_loop(tmp_path):
    logits, labels, weight = data()
    want = np.zeros((CLASSES, CLASSES))
    for row, label, w in zip(logits, labels, weight, strict=True):
        want[label, row.argmax()] += w
    got = classification.confusion(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(weight))
    np.testing.assert_array_equal(got, want)
    pictures.confusion(want, epath.Path(tmp_path) / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_per_class_table_shows_the_most_frequent_mistake():
    table = tables.per_class(np.array([[3.0, 0, 1], [0, 0, 0], [0, 2, 2]]))
    assert table.splitlines()[2:] == [
        "| 0 | 4 | 0.7500 | 2 (1) |",
        "| 1 | 0 |  |  |",
        "| 2 | 4 | 0.5000 | 1 (2) |",
    ]


def test_the_table_has_the_names_of_classes_where_there_are_any():
    names = ["ant", "", "a|b\udce9"]
    table = tables.per_class(np.array([[3.0, 0, 1], [0, 0, 0], [0, 2, 2]]), names)
    rows = table.splitlines()[2:]
    assert rows[0].startswith("| ant | 4 |") and rows[0].endswith(r"| a\|b� (1) |")
    assert rows[1].startswith("| 1 | 0 |")  # no class was trained on this output
    assert table.encode("utf-8")


@pytest.mark.parametrize("classes,names", [(5, {"loss", "top1"}), (6, {"loss", "top1", "top5"})])
def test_there_is_no_top5_of_five_classes(classes, names):
    logits, labels = jnp.zeros((2, classes)), jnp.zeros(2, jnp.int32)
    assert classification.accuracy_metrics(logits, labels, jnp.ones(2)).keys() == names
