"""Distillation targets, predictions and losses, against plain numpy and torch."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fd_jax import model_folder
from fd_jax.errors import ConfigError
from fd_jax.models import spec as specs
from fd_jax.tasks.distill import DistillTask
from fd_jax.tasks.teacher import resize_images
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_teacher(tmp_path_factory.mktemp("teachers") / "tiny", classes=7)


def make(folder, **fields):
    task = DistillTask(tiny.config(folder, **fields))
    params, _ = task.init(jax.random.key(0))
    params = tiny.randomize(params, 5, scale=0.05)
    frozen = jax.tree.map(jnp.asarray, task.load_frozen())
    return task, params, frozen


def teacher_tokens(folder, *, final_norm=True):
    spec, parts = model_folder.load(folder)
    network = nnx.merge(spec.abstract()[0], parts["encoder"])
    images = spec.normalize(tiny.batch()["image"])
    return np.asarray(network(images, final_norm=final_norm).tokens, np.float64), parts


def whitened(tokens):
    centred = tokens - tokens.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def test_full_target_is_the_whitened_class_token_and_patches(folder):
    task, _, frozen = make(folder)
    got = task.teacher_target(frozen, tiny.batch())
    want = whitened(teacher_tokens(folder)[0])
    assert got.shape == (16, 17, 48)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("kind", ["cls", "gap"])
def test_single_token_targets(folder, kind):
    task, params, frozen = make(folder, **{"target.kind": kind})
    tokens = teacher_tokens(folder)[0]
    pooled = tokens[:, 0] if kind == "cls" else tokens[:, 1:].mean(1)
    np.testing.assert_allclose(
        task.teacher_target(frozen, tiny.batch())[:, 0], whitened(pooled), atol=2e-5
    )
    assert task.predict(params, tiny.batch()).shape == (16, 1, 48)


@pytest.mark.parametrize("normalize", ["l2", "none"])
def test_l2_and_raw_targets_equal_numpy(folder, normalize):
    task, _, frozen = make(folder, **{"target.normalize": normalize})
    tokens = teacher_tokens(folder)[0]
    if normalize == "l2":
        tokens = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    got = task.teacher_target(frozen, tiny.batch())
    np.testing.assert_allclose(got, tokens, atol=1e-5 * np.abs(tokens).max())


def test_target_before_the_final_norm(folder):
    """PRED_FEAT_AFTERNORM False (docs/reference.md#after-norm) differs from the default."""
    task, _, frozen = make(folder, **{"target.after_norm": False})
    got = task.teacher_target(frozen, tiny.batch())
    np.testing.assert_allclose(
        got, whitened(teacher_tokens(folder, final_norm=False)[0]), atol=2e-5
    )
    assert np.abs(got - whitened(teacher_tokens(folder)[0])).max() > 0.1


def test_logits_are_matched_by_cross_entropy(folder):
    task, params, frozen = make(folder, **{"target.kind": "logits"})
    tokens, parts = teacher_tokens(folder)
    logits = tokens[:, 0] @ parts["head"]["kernel"] + parts["head"]["bias"]
    batch = tiny.batch()
    np.testing.assert_allclose(task.teacher_target(frozen, batch)[:, 0], logits, rtol=1e-4)
    student = np.asarray(task.predict(params, batch)[:, 0], np.float64)
    assert student.shape == (16, 7)
    target = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    log_p = student - np.log(np.exp(student).sum(-1, keepdims=True))
    loss, _ = task.loss(params, {}, frozen, batch)
    np.testing.assert_allclose(loss, -(target * log_p).sum(-1).mean(), rtol=1e-5)


def test_logits_of_a_head_on_the_normalised_mean(tmp_path):
    """The fc_norm and head of a fine-tuned teacher read the mean patch, not the class token."""
    path = tiny.save_teacher(tmp_path / "tiny", classes=7, final_norm=False)
    spec, parts = model_folder.load(path)
    rng = np.random.default_rng(4)
    norm = {name: rng.normal(1, 0.3, 48).astype(np.float32) for name in ("scale", "bias")}
    spec = dataclasses.replace(spec, pooling="mean_norm")
    model_folder.save(tmp_path / "tuned", spec, {**parts, "fc_norm": norm})
    task, params, frozen = make(str(tmp_path / "tuned"), **{"target.kind": "logits"})
    mean = teacher_tokens(path)[0][:, 1:].mean(1)
    centred = mean - mean.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    pooled = scaled * norm["scale"] + norm["bias"]
    want = pooled @ parts["head"]["kernel"] + parts["head"]["bias"]
    got = task.teacher_target(frozen, tiny.batch())[:, 0]
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    assert task.predict(params, tiny.batch()).shape == (16, 1, 7)


def test_a_student_without_class_token_learns_logits_from_its_mean(folder):
    fields = {"target.kind": "logits", "student.arch.cls_token": False}
    task, params, _ = make(folder, **fields)
    assert task.predict(params, tiny.batch()).shape == (16, 1, 7)


def test_loss_is_the_mean_over_every_element(folder):
    task, params, frozen = make(folder)
    batch = tiny.batch()
    want = torch.nn.functional.smooth_l1_loss(
        torch.from_numpy(np.array(task.predict(params, batch))),
        torch.from_numpy(np.array(task.teacher_target(frozen, batch))),
        beta=2.0,
    )
    loss, (_, metrics) = task.loss(params, {}, frozen, batch)
    np.testing.assert_allclose(loss, float(want), rtol=1e-6)
    total, count = metrics["loss"]
    np.testing.assert_allclose(total / count, loss, rtol=1e-6)


@pytest.mark.slow
def test_padding_does_not_change_the_metrics(folder):
    task, params, frozen = make(folder)
    batch = tiny.batch()
    weight = np.arange(16) < 5
    padded = {**batch, "weight": weight.astype(np.float32)}
    short = {name: value[:5] for name, value in batch.items()}
    for name, (total, count) in task.evaluate(params, {}, frozen, padded).items():
        want_total, want_count = task.evaluate(params, {}, frozen, short)[name]
        np.testing.assert_allclose(total / count, want_total / want_count, rtol=5e-6)
        assert count == 5


def test_no_gradient_reaches_the_teacher(folder):
    task, params, frozen = make(folder)
    grads = jax.grad(lambda frozen: task.loss(params, {}, frozen, tiny.batch())[0])(frozen)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))
    grads = jax.grad(lambda params: task.loss(params, {}, frozen, tiny.batch())[0])(params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_drop_path_is_drawn_for_each_side_that_has_it(folder):
    key = jax.random.key(3)
    task, params, frozen = make(folder, **{"student.drop_path": 0.5})
    prepared = task.prepare(tiny.batch(), key)
    assert prepared["student_drops"].shape == (16, 2, 2)
    assert "teacher_drops" not in prepared
    assert not np.allclose(
        task.loss(params, {}, frozen, prepared)[0], task.loss(params, {}, frozen, tiny.batch())[0]
    )
    task, params, frozen = make(folder, **{"student.drop_path": 0.0, "teacher.drop_path": 0.5})
    prepared = task.prepare(tiny.batch(), key)
    assert "student_drops" not in prepared
    plain = task.teacher_target(frozen, tiny.batch())
    assert not np.allclose(task.teacher_target(frozen, prepared), plain)


def test_registers_are_never_in_the_target(tmp_path):
    folder = tiny.save_teacher(tmp_path / "registers", registers=3)
    task, _, frozen = make(folder)
    tokens = teacher_tokens(folder)[0]
    want = whitened(np.concatenate([tokens[:, :1], tokens[:, 4:]], axis=1))
    np.testing.assert_allclose(task.teacher_target(frozen, tiny.batch()), want, atol=2e-5)


def test_only_patches_are_compared_if_one_side_has_no_class_token(tmp_path):
    folder = tiny.save_teacher(tmp_path / "patches", cls_token=False)
    task, params, frozen = make(folder)
    target = task.teacher_target(frozen, tiny.batch())
    assert target.shape == task.predict(params, tiny.batch()).shape == (16, 16, 48)


def test_the_teacher_uses_its_own_pixel_statistics(tmp_path):
    spec = dataclasses.replace(tiny.teacher_spec(), mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    encoder = tiny.randomize(specs.split(spec.build(rngs=nnx.Rngs(0)))[1], 0)
    model_folder.save(tmp_path / "odd", spec, {"encoder": encoder})
    task, _, frozen = make(str(tmp_path / "odd"))
    images = tiny.batch()["image"] / 255.0
    images = ((images - np.array(spec.mean)) / np.array(spec.std)).astype(np.float32)
    tokens = nnx.merge(spec.abstract()[0], encoder)(images).tokens
    np.testing.assert_allclose(
        task.teacher_target(frozen, tiny.batch()), whitened(np.asarray(tokens)), atol=5e-5
    )


def test_teacher_at_its_own_size_sees_resized_images(tmp_path):
    """As for CLIP-L with a 256/16 student: equal grids, but different image sizes."""
    folder = tiny.save_teacher(tmp_path / "small", image_size=24, patch_size=6)
    task, _, frozen = make(folder)
    assert task.goal.teacher.image_size == 24
    assert task.teacher_target(frozen, tiny.batch()).shape == (16, 17, 48)


def test_resized_images_equal_torch():
    images = tiny.batch(2)["image"]
    for size in (24, 40):
        want = torch.nn.functional.interpolate(
            torch.from_numpy(images.transpose(0, 3, 1, 2)).float(),
            size=(size, size),
            mode="bilinear",
            antialias=True,
        )
        got = np.asarray(resize_images(images, size)).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(got, want.numpy(), atol=1e-3)


def test_a_teacher_from_another_source_is_refused(folder):
    with pytest.raises(ConfigError, match="converted from 'tiny', but the config distils 'dino'"):
        make(folder, **{"teacher.source": "dino"})


def test_a_student_continues_from_a_model_folder(folder, tmp_path):
    task, params, _ = make(folder)
    spec, parts = task.export(params, {})
    model_folder.save(tmp_path / "student", spec, parts)
    again, _, _ = make(folder, init_from=str(tmp_path / "student"))
    jax.tree.map(np.testing.assert_array_equal, again.load_initial(), parts)
    other, _, _ = make(
        folder, **{"init_from": str(tmp_path / "student"), "student.arch.position": "ape"}
    )
    with pytest.raises(ConfigError, match="init_from="):
        other.load_initial()


def test_a_distilled_student_can_be_a_teacher(folder, tmp_path):
    task, params, _ = make(folder)
    spec, parts = task.export(params, {})
    model_folder.save(tmp_path / "student", spec, parts)
    task, params, frozen = make(str(tmp_path / "student"), **{"teacher.source": ""})
    loss, _ = task.loss(params, {}, frozen, tiny.batch())
    assert np.isfinite(loss)
