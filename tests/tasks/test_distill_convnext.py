"""ConvNeXt teachers and students: targets from the right stage and grid, against transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fd_jax import model_folder, sharding
from fd_jax.errors import ConfigError
from fd_jax.tasks.distill import DistillTask
from fd_jax.training import program
from tests import tiny
from tests.convert import oracles
from tests.models import convnexts
from tests.tasks.test_distill import whitened


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    return {
        kind: convnexts.save(root / kind, kind, image_size=64, classes=7 if kind == "v2" else 0)
        for kind in convnexts.KINDS
    }


def make(config):
    task = DistillTask(config)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    params = tiny.randomize(jax.tree.map(lambda leaf: np.zeros(leaf.shape), params), 5, scale=0.2)
    return task, params, jax.tree.map(jnp.asarray, task.load_frozen())


def config(folder, **fields):
    """A ViT student with patches of 32, which has the grid of the teacher, 2 x 2."""
    sizes = {"data.image_size": 64, "student.arch.image_size": 64, "student.arch.patch_size": 32}
    return tiny.config(folder, **{**sizes, **fields})


def target(task, frozen):
    return np.asarray(jax.jit(task.teacher_target)(frozen, tiny.batch(side=64)))


def theirs(kind, folder, scratch):
    """transformers' model, and the pictures of the tiny batch as it sees them."""
    spec, parts = model_folder.load(folder)
    model = convnexts.hf_model(kind, spec, parts["encoder"], scratch)
    return model, np.asarray(spec.normalize(tiny.batch(side=64)["image"]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", convnexts.KINDS)
def test_a_vit_learns_the_last_map(kind, folders, tmp_path):
    task, params, frozen = make(config(folders[kind]))
    model, images = theirs(kind, folders[kind], tmp_path)
    want = whitened(convnexts.hf_tokens(kind, model, images).astype(np.float64))
    assert want.shape == (16, 4, 24)
    np.testing.assert_allclose(target(task, frozen), want, atol=1e-4)
    if kind == "v2":
        batch = tiny.batch(side=64)
        grads = jax.jit(jax.grad(lambda p: task.loss(p, {}, frozen, batch)[0]))(params)
        assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_a_vit_learns_an_earlier_map(folders, tmp_path):
    """The second of four stages has one token for eight pixels."""
    fields = {"student.arch.patch_size": 8, "teacher.stages": 2}
    task, _, frozen = make(config(folders["v1"], **fields))
    model, images = theirs("v1", folders["v1"], tmp_path)
    want = whitened(convnexts.hf_blocks(model, images)[2].astype(np.float64))
    assert want.shape == (16, 64, 12)
    np.testing.assert_allclose(target(task, frozen), want, atol=1e-4)


def test_logits_are_learned_from_the_normalised_mean(folders, tmp_path):
    fields = {"target.kind": "logits", "student.arch.cls_token": False}
    task, params, frozen = make(config(folders["v2"], **fields))
    spec, parts = model_folder.load(folders["v2"])
    model = convnexts.hf_classifier("v2", spec, parts["encoder"], parts, tmp_path)
    images = np.asarray(spec.normalize(tiny.batch(side=64)["image"]))
    want = oracles.run(lambda x: model(x).logits, images)
    np.testing.assert_allclose(target(task, frozen)[:, 0], want, atol=1e-4)
    out = jax.eval_shape(task.predict, params, tiny.batch(side=64))
    assert out.shape == (16, 1, 7)


def test_what_the_teacher_lacks_is_refused(folders):
    with pytest.raises(ConfigError, match=r"\(2, 2\) != student grid \(8, 8\)"):
        DistillTask(config(folders["v1"], **{"student.arch.patch_size": 8}))
    with pytest.raises(ConfigError, match="teacher.stages=5, but the teacher has 4 stages"):
        DistillTask(config(folders["v1"], **{"teacher.stages": 5}))
    with pytest.raises(ConfigError, match="needs a class token on both sides"):
        DistillTask(config(folders["v1"], **{"target.kind": "cls"}))


STUDENT = {"student.family": "convnext", "student.drop_path": 0.5, "data.image_size": 64}


def student_config(folder):
    result = tiny.config(folder, **STUDENT)
    result.student.arch = convnexts.spec("v2", image_size=64).arch
    return result


def losses(mesh, folder):
    """Of three steps of a ConvNeXt that learns from another one."""
    made = student_config(folder)
    task = DistillTask(made)
    run = program.build(task, made, mesh, steps_per_epoch=10, total_steps=20)
    state = run.create(jax.random.key(0), {})
    frozen = run.place_frozen(task.load_frozen())
    batch = {**tiny.batch(side=64), "stop": np.zeros(16, np.int32)}
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    step, found = run.compile_train_step(), []
    for _ in range(3):
        state, metrics = step(state, frozen, batch, run.place_seed(0))
        total, count = metrics["loss"]
        found.append(float(total / count))
    return found


@pytest.mark.slow
def test_a_convnext_student_trains_alike_on_any_mesh(folders):
    devices = jax.devices()
    alone = losses(sharding.make_mesh(devices=devices[:1]), folders["dinov3"])
    split = losses(
        sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=devices[:8]), folders["dinov3"]
    )
    assert alone[2] < alone[0]
    np.testing.assert_allclose(split, alone, rtol=2e-5)


def test_a_network_without_attention_names_no_implementation(folders):
    task = DistillTask(config(folders["v1"]))
    assert task.attention == {"student": "xla", "teacher": "none"}
    made = student_config(folders["v1"])
    assert DistillTask(made).attention == {"student": "none", "teacher": "none"}


def test_the_spec_of_a_student_describes_it(folders):
    task = DistillTask(student_config(folders["v1"]))
    written = dataclasses.replace(task.student_spec, notes="")
    again = type(written).from_json(written.to_json(), where="")
    assert again.arch["widths"] == [8, 12, 20, 24]
