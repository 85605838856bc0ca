"""Swin teachers and students: targets from the right stage and grid, against plain torch."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fd_jax import model_folder
from fd_jax.errors import ConfigError
from fd_jax.tasks.distill import DistillTask
from tests import tiny
from tests.models import swins
from tests.tasks.test_distill import whitened


@pytest.fixture(scope="module")
def esvit(tmp_path_factory):
    return tiny.save_swin(tmp_path_factory.mktemp("teachers") / "esvit")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return tiny.save_teacher(tmp_path_factory.mktemp("teachers") / "vit")


def make(config):
    task = DistillTask(config)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    params = tiny.randomize(jax.tree.map(lambda leaf: np.zeros(leaf.shape), params), 5, scale=0.2)
    return task, params, jax.tree.map(jnp.asarray, task.load_frozen())


def target(task, frozen):
    return np.asarray(jax.jit(task.teacher_target)(frozen, tiny.batch()))


def plain_torch(folder):
    """Features of the tiny batch: (after every block, after the final norm)."""
    spec, parts = model_folder.load(folder)
    images = np.asarray(spec.normalize(tiny.batch()["image"]))
    return swins.plain_torch(spec, parts["encoder"], images)


def test_swin_student_learns_the_last_map_of_a_swin(esvit):
    task, params, frozen = make(tiny.swin_config(esvit))
    want = whitened(plain_torch(esvit)[1].astype(np.float64))
    assert want.shape == (16, 4, 64)
    np.testing.assert_allclose(target(task, frozen), want, atol=1e-4)
    assert jax.eval_shape(task.predict, params, tiny.batch()).shape == want.shape
    grads = jax.jit(jax.grad(lambda p: task.loss(p, {}, frozen, tiny.batch())[0]))(params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_vit_student_learns_an_earlier_map_without_class_tokens(esvit):
    """See docs/reference.md#stage-3-target: the first stages, then a fresh norm."""
    task, params, frozen = make(tiny.config(esvit, **{"teacher.stages": 2}))
    blocks, _ = plain_torch(esvit)
    fresh = whitened(
        blocks[2].astype(np.float64)
    )  # two blocks of the first stage, one of the second
    learned = target(task, frozen)
    assert learned.shape == (16, 16, 32)
    np.testing.assert_allclose(learned, whitened(fresh), atol=1e-4)
    student = nnx.merge(task.student_def, params["encoder"])
    projector = nnx.merge(task.goal.projector_def, params["projector"])
    images = task.student_spec.normalize(tiny.batch()["image"])
    features = jax.jit(lambda images: student(images))(images)
    assert features.cls == 1
    want = projector(features.tokens[:, 1:])
    np.testing.assert_allclose(jax.jit(task.predict)(params, tiny.batch()), want, atol=1e-5)


def test_keeping_all_stages_equals_the_whole_network(esvit):
    whole, _, frozen = make(tiny.swin_config(esvit))
    same, _, again = make(tiny.swin_config(esvit, **{"teacher.stages": 3}))
    np.testing.assert_array_equal(target(whole, frozen), target(same, again))


def interpolated(tokens, grid):
    """torch's antialiased bilinear interpolation of a square map. [B, N, D] -> [B, grid^2, D]"""
    side = round(tokens.shape[1] ** 0.5)
    image = torch.from_numpy(tokens).permute(0, 2, 1).reshape(len(tokens), -1, side, side)
    image = torch.nn.functional.interpolate(
        image, size=(grid, grid), mode="bilinear", antialias=True
    )
    return image.flatten(2).permute(0, 2, 1).numpy()


@pytest.mark.slow
def test_swin_student_of_a_vit_learns_its_map_on_a_coarser_grid(vit):
    task, params, frozen = make(tiny.swin_config(vit, **{"target.resample": "bilinear"}))
    spec, parts = model_folder.load(vit)
    images = spec.normalize(tiny.batch()["image"])
    patches = np.array(nnx.merge(spec.abstract()[0], parts["encoder"])(images).tokens)[:, 1:]
    got = target(task, frozen)
    np.testing.assert_allclose(got, whitened(interpolated(patches, 2)), atol=5e-5)
    # Negative control: a target that is whitened before it is averaged has less than unit variance.
    before = interpolated(whitened(patches.astype(np.float64)), 2)
    assert np.abs(got - before).max() > 0.1
    assert jax.eval_shape(task.predict, params, tiny.batch()).shape == got.shape == (16, 4, 48)


def test_vit_student_of_a_swin_learns_its_map_on_a_finer_grid(esvit):
    task, _, frozen = make(tiny.config(esvit, **{"target.resample": "bilinear"}))
    want = whitened(interpolated(plain_torch(esvit)[1], 4))
    np.testing.assert_allclose(target(task, frozen), want, atol=5e-4)


def test_resampling_leaves_equal_grids_alone(vit):
    plain, _, frozen = make(tiny.config(vit))
    asked, _, _ = make(tiny.config(vit, **{"target.resample": "bilinear"}))
    np.testing.assert_array_equal(target(plain, frozen), target(asked, frozen))
    assert target(plain, frozen).shape[1] == 17  # with its class token


def test_unequal_grids_are_refused_with_numbers(vit, esvit):
    with pytest.raises(ConfigError, match=r"\(4, 4\) != student grid \(2, 2\).*to 16, or target"):
        DistillTask(tiny.swin_config(vit))
    with pytest.raises(ConfigError, match=r"\(2, 2\) != student grid \(4, 4\).*to 64"):
        DistillTask(tiny.config(esvit))
    with pytest.raises(ConfigError, match=r"teacher.stages=4, but the teacher has 3 stages"):
        DistillTask(tiny.config(esvit, **{"teacher.stages": 4}))


def test_class_token_targets_are_refused_without_class_tokens(esvit):
    with pytest.raises(ConfigError, match="needs a class token on both sides; student has 0"):
        DistillTask(tiny.swin_config(esvit, **{"target.kind": "cls"}))


@pytest.mark.slow
def test_logits_of_a_swin_are_learned_from_mean_tokens(esvit, tmp_path):
    """Without class tokens, the heads of teacher and student read the mean patch token."""
    spec, parts = model_folder.load(esvit)
    rng = np.random.default_rng(2)
    head = {"kernel": rng.normal(size=(64, 7)), "bias": rng.normal(size=7)}
    head = {name: value.astype(np.float32) for name, value in head.items()}
    spec = dataclasses.replace(spec, classes=7, pooling="mean")
    model_folder.save(tmp_path / "tuned", spec, {**parts, "head": head})
    config = tiny.swin_config(str(tmp_path / "tuned"), **{"target.kind": "logits"})
    task, params, frozen = make(config)
    want = plain_torch(esvit)[1].mean(1) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(target(task, frozen)[:, 0], want, atol=1e-4)
    assert jax.eval_shape(task.predict, params, tiny.batch()).shape == (16, 1, 7)


@pytest.mark.slow
def test_drop_path_is_drawn_for_the_blocks_of_all_stages(esvit):
    rates = {"student.drop_path": 0.5, "teacher.drop_path": 0.5}
    task, params, frozen = make(tiny.swin_config(esvit, **rates))
    prepared = task.prepare(tiny.batch(), jax.random.key(3))
    assert prepared["student_drops"].shape == prepared["teacher_drops"].shape == (16, 4, 2)
    loss = jax.jit(lambda batch: task.loss(params, {}, frozen, batch)[0])
    evaluated = loss(tiny.batch())
    for side in ("student_drops", "teacher_drops"):  # each is used
        assert not np.allclose(loss({**tiny.batch(), side: prepared[side]}), evaluated)


def test_a_distilled_swin_student_can_be_a_teacher(esvit, tmp_path):
    task, params, _ = make(tiny.swin_config(esvit))
    model_folder.save(tmp_path / "student", *task.export(params, {}))
    again, _, frozen = make(tiny.swin_config(str(tmp_path / "student"), **{"teacher.source": ""}))
    assert again.goal.teacher.spec.family == "swin_v2"
    assert np.isfinite(target(again, frozen)).all()
