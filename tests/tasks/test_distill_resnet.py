"""ResNet teachers and students: frozen statistics, and those that training measures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fd_jax import model_folder, sharding
from fd_jax.errors import ConfigError
from fd_jax.report import distillation as report
from fd_jax.tasks.base import EXTRA
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.tasks.distill import BATCH_NORM, DistillTask
from fd_jax.training import program
from tests import tiny
from tests.models import resnets
from tests.tasks.test_distill import whitened

SIDE = 64
SMALL = {"image_size": SIDE, "depths": [1, 1, 1], "stem_widths": [8]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A ResNet of three stages, which has 4 x 4 tokens at 64 pixels, and a ViT with that grid."""
    root = tmp_path_factory.mktemp("networks")
    vit = tiny.save_teacher(root / "vit", image_size=SIDE, patch_size=16)
    return {"resnet": resnets.save(root / "resnet", **SMALL), "vit": vit}


def config(teacher, **fields):
    """A ResNet student of a ViT."""
    result = tiny.config(teacher, **{"student.family": "resnet", "data.image_size": SIDE})
    result.student.arch = resnets.spec(**SMALL).arch
    result.update_from_flattened_dict(fields)
    return result


def test_a_vit_learns_the_map_of_a_frozen_resnet(folders, tmp_path):
    sizes = {"data.image_size": SIDE, "student.arch.image_size": SIDE}
    sizes["student.arch.patch_size"] = 16
    task = DistillTask(tiny.config(folders["resnet"], **sizes))
    spec, parts = model_folder.load(folders["resnet"])
    batch = tiny.batch(side=SIDE)
    model = resnets.hf_model(spec, parts["encoder"], tmp_path)
    want = resnets.hf_tokens(model, np.asarray(spec.normalize(batch["image"])))
    frozen = jax.tree.map(jnp.asarray, task.load_frozen())
    got = np.asarray(jax.jit(task.teacher_target)(frozen, batch))
    assert got.shape == (16, 16, 32)
    np.testing.assert_allclose(got, whitened(want.astype(np.float64)), atol=1e-4)
    assert BATCH_NORM not in task.init(jax.random.key(0))[1]  # it is the student's alone


@pytest.fixture(scope="module")
def trained(folders):
    """The task, its state after a step, and what the loss of the step was."""
    task = DistillTask(config(folders["vit"], **{"student.drop_path": 0.0}))
    params, extra = task.init(jax.random.key(1))
    params = tiny.randomize(params, 5, scale=0.05)
    frozen = jax.tree.map(jnp.asarray, task.load_frozen())
    loss, (after, _) = jax.jit(task.loss)(params, extra, frozen, tiny.batch(side=SIDE))
    return task, params, frozen, after, loss


def test_statistics_are_state_and_no_parameters(trained):
    task, params, _, after, _ = trained
    names = set(resnets.flat(params["encoder"]))
    measured = set(resnets.flat(after[BATCH_NORM]))
    assert not names & measured
    assert names | measured == set(resnets.flat(task.student_spec.abstract()[1]))
    assert all(name.endswith(("norm/mean", "norm/var")) for name in measured)
    assert any("shortcut" in name for name in measured)


def test_a_step_measures_what_the_network_does(trained):
    """The statistics after a step, and the loss, are those of `measured`, which another test
    compares with PyTorch; evaluation uses them and not those of its batch."""
    task, params, frozen, after, loss = trained
    batch = tiny.batch(side=SIDE)
    images = task.student_spec.normalize(batch["image"])
    whole = task.as_stored(params, task._init_extra())["encoder"]
    features, want = jax.jit(resnets.bind(task.student_spec, whole).measured)(images)
    for name, value in resnets.flat(want).items():
        got = resnets.flat(after[BATCH_NORM])[name]
        np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-6, err_msg=name)
    targets = jax.jit(task.targets)(frozen, batch)
    own = task.goals.distances(task._predicted(params, (features, [])), targets)[""]
    np.testing.assert_allclose(loss, np.mean(own), rtol=1e-5)
    half = {name: value[:8] for name, value in batch.items()}
    run = jax.jit(task.features)
    vectors = run(params, after, frozen, batch)
    np.testing.assert_allclose(run(params, after, frozen, half), vectors[:8], rtol=1e-4)
    fresh = run(params, task._init_extra(), frozen, batch)
    assert resnets.relative(vectors, fresh) > 1e-2


def test_what_is_exported_computes_what_is_evaluated(trained, tmp_path):
    task, params, frozen, after, _ = trained
    spec, parts = task.export(params, after)
    model_folder.save(tmp_path / "m", spec, parts)
    _, stored = model_folder.load(tmp_path / "m")
    batch = tiny.batch(side=SIDE)
    want = jax.jit(task.features)(params, after, frozen, batch)
    images = spec.normalize(batch["image"])
    tokens = jax.jit(resnets.bind(spec, stored["encoder"]))(images).tokens
    np.testing.assert_allclose(np.mean(tokens, axis=1), want, rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, task.extra_of(stored), jax.device_get(after))
    # A folder's own statistics count, whatever the state is.
    stored = {name: stored[name] for name in ("encoder", "projector")}
    run = jax.jit(lambda params, extra: task.predictions(params, batch, None, extra)[""])
    want = run(params, after)
    np.testing.assert_allclose(run(stored, task._init_extra()), want, rtol=1e-5, atol=1e-6)


def test_a_student_starts_from_the_statistics_of_its_folder(folders, tmp_path):
    made = config(folders["vit"], **{"student.family": "", "student.drop_path": 0.0})
    made.student.arch = {}
    made.student.init_from = folders["resnet"]
    task = DistillTask(made)
    stored = model_folder.load(folders["resnet"])[1]["encoder"]
    initial = task.load_initial()
    found = {**resnets.flat(initial["encoder"]), **resnets.flat(initial[EXTRA][BATCH_NORM])}
    assert found.keys() == resnets.flat(stored).keys()
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    run = program.build(task, made, mesh, steps_per_epoch=10, total_steps=20)
    state = run.create(jax.random.key(0), initial)
    for part in (state.params["encoder"], state.extra[BATCH_NORM]):
        for name, value in resnets.flat(part).items():
            np.testing.assert_array_equal(value, resnets.flat(stored)[name], err_msg=name)
    before = report.initial(task, 0)["encoder"]
    assert resnets.flat(before).keys() == resnets.flat(stored).keys()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accumulation": 2}, "accumulation=2: the BatchNorms of a student of the family 'resnet'"),
        ({"student.freeze_blocks": 1}, "a student with BatchNorm .'resnet'. trains as a whole"),
        ({"target.kind": "cls"}, "needs a class token on both sides"),
        ({"student.arch.stem_widths": [8, 8]}, "expected the channels of one convolution"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message, folders):
    with pytest.raises(ConfigError, match=message):
        DistillTask(config(folders["vit"], **fields))


@pytest.mark.slow
def test_other_runs_keep_the_statistics_of_their_folder(folders):
    """Neither a gradient nor decay reaches them, as in `FrozenBatchNorm2d` of torchvision."""
    task = ClassifyTask(
        tiny.fine_tuning(folders["resnet"], **{"data.image_size": SIDE, "model.pooling": "mean"})
    )
    params, extra = task.init(jax.random.key(0))
    params = {**params, "encoder": task.load_initial()["encoder"]}
    batch = task.prepare(tiny.labelled_batch(side=SIDE), jax.random.key(0))
    grads = jax.jit(jax.grad(lambda p: task.loss(p, extra, {}, batch)[0]))(params)
    tx, _ = task.optimizer(params, steps_per_epoch=10, total_steps=20)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    for name, value in resnets.flat(updates["encoder"]).items():
        assert bool(np.any(value)) != name.endswith(("norm/mean", "norm/var")), name


def losses(mesh, folder):
    """Of three steps, and the statistics after them."""
    made = config(folder, **{"student.drop_path": 0.5})
    task = DistillTask(made)
    run = program.build(task, made, mesh, steps_per_epoch=10, total_steps=20)
    state = run.create(jax.random.key(0), {})
    frozen = run.place_frozen(task.load_frozen())
    batch = {**tiny.batch(side=SIDE), "stop": np.zeros(16, np.int32)}
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    step, found = run.compile_train_step(), []
    for _ in range(3):
        state, metrics = step(state, frozen, batch, run.place_seed(0))
        total, count = metrics["loss"]
        found.append(float(total / count))
    return found, resnets.flat(jax.device_get(state.extra[BATCH_NORM]))


@pytest.mark.slow
def test_a_resnet_student_trains_alike_on_any_mesh(folders):
    """Statistics are those of the global batch: of a device's own share they would differ."""
    devices = jax.devices()
    alone, one = losses(sharding.make_mesh(devices=devices[:1]), folders["vit"])
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=devices[:8])
    split, eight = losses(mesh, folders["vit"])
    assert alone[2] < alone[0]
    np.testing.assert_allclose(split, alone, rtol=2e-5)
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
