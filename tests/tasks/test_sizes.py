"""Training at several sizes: positions, targets and FLOPs of each, and runs that resume."""

import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fd_jax import model_folder, settings
from fd_jax.errors import ConfigError
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.tasks.distill import DistillTask
from fd_jax.training import loop, metric_writer, program
from tests import tiny
from tests.cost.test_flops import traced
from tests.tasks.test_distill import teacher_tokens, whitened
from tests.tasks.test_starts import starting

SIZES = {"data.sizes": (24, 32)}
FOLLOW = {**SIZES, "teacher.follow": True}


def distilling(teacher, **fields):
    config = tiny.config(teacher, **fields)
    settings.check(config)
    return DistillTask(config)


def values(task):
    params, _ = task.init(jax.random.key(0))
    return tiny.randomize(params, 5, scale=0.05)


def test_a_student_at_another_size_is_the_network_with_resized_positions(teacher):
    task = distilling(teacher, **FOLLOW)
    params, batch = values(task), tiny.batch(side=24)
    spec, encoder = task.student_spec.resized(params["encoder"], 24)
    network = nnx.merge(spec.abstract()[0], encoder)
    want = network(spec.normalize(batch["image"]))
    got = jax.jit(task.predict)(params, batch)
    kernel, bias = params["projector"]["kernel"], params["projector"]["bias"]
    np.testing.assert_allclose(got, want.full @ kernel + bias, atol=2e-5)
    assert got.shape == (16, 10, 48)


def test_a_teacher_that_follows_sees_the_students_grid(teacher):
    task = distilling(teacher, **FOLLOW)
    frozen, batch = jax.tree.map(jnp.asarray, task.load_frozen()), tiny.batch(side=24)
    spec, parts = model_folder.load(teacher)
    spec, encoder = spec.resized(parts["encoder"], 24)
    network = nnx.merge(spec.abstract()[0], encoder)
    want = whitened(np.float64(network(spec.normalize(batch["image"])).tokens))
    got = jax.jit(task.teacher_target)(frozen, batch)
    np.testing.assert_allclose(got, want, atol=5e-5)
    # At its own size it is what it is without a schedule.
    np.testing.assert_allclose(
        jax.jit(task.teacher_target)(frozen, tiny.batch()),
        whitened(teacher_tokens(teacher)[0]),
        atol=2e-5,
    )


def test_a_teacher_that_stays_is_resampled_to_the_students_grid(teacher):
    task = distilling(teacher, **{**SIZES, "target.resample": "bilinear"})
    frozen, batch = jax.tree.map(jnp.asarray, task.load_frozen()), tiny.batch(side=24)
    got = jax.jit(task.teacher_target)(frozen, batch)
    assert got.shape == (16, 10, 48)
    assert task.goal.teacher.image_size == 32
    assert got.shape == jax.jit(task.predict)(values(task), batch).shape


def test_gradients_of_other_sizes_reach_the_positions(teacher):
    task = distilling(teacher, **FOLLOW)
    frozen = task.load_frozen()
    grads = jax.jit(jax.grad(lambda p: task.loss(p, {}, frozen, tiny.batch(side=24))[0]))(
        values(task)
    )
    table = np.asarray(grads["encoder"]["rel_pos_bias"]["table"])
    assert table.shape == (7 * 7 + 3, 4) and np.abs(table).max() > 0


@pytest.mark.parametrize(
    "fields,message",
    [
        (SIZES, r"images of 24 px.*\(3, 3\) patches, but the teacher has \(4, 4\): set teacher.fo"),
        (
            {**FOLLOW, "data.sizes": (20, 32)},
            "images of 20 px.*20 is not divisible by patch_size 8",
        ),
    ],
)
def test_sizes_that_cannot_be_compared_are_refused(fields, message, teacher):
    with pytest.raises(ConfigError, match=message):
        distilling(teacher, **fields)


def test_a_teacher_that_cannot_follow_is_refused(tmp_path):
    teacher = tiny.save_teacher(tmp_path / "t", image_size=56, patch_size=14)  # 4 x 4, as at 32
    task = distilling(teacher, **FOLLOW)
    assert task.goal.teacher.image_size == 56 and task.flops_at(24).model < task.flops().model
    coarse = tiny.save_teacher(tmp_path / "c", image_size=32, patch_size=16)
    fields = {**FOLLOW, "target.kind": "cls", "data.sizes": (24, 32)}
    with pytest.raises(ConfigError, match="the teacher.*24 is not divisible by patch_size 16"):
        distilling(coarse, **fields)


def test_images_of_a_size_that_is_not_in_the_schedule_are_refused(teacher):
    """Negative control: nothing is resized in silence."""
    task = distilling(teacher, **FOLLOW)
    with pytest.raises(ValueError, match=r"images of \(40, 40\) pixels"):
        jax.eval_shape(task.predict, values(task), tiny.batch(side=40))
    with pytest.raises(ValueError, match=r"images of \(24, 24\) pixels"):
        jax.eval_shape(distilling(teacher).predict, values(task), tiny.batch(side=24))


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_a_swin_is_fine_tuned_at_several_sizes(version, tmp_path):
    folder = tiny.save_swin(tmp_path / "swin", version)
    fields = {"model.pooling": "mean", "model.final_norm": True, "data.sizes": (16, 32)}
    task = ClassifyTask(tiny.fine_tuning(folder, **fields))
    params = program.overlay(task.init(jax.random.key(0))[0], task.load_initial())
    spec, encoder = task.spec.resized(params["encoder"], 16)
    batch = tiny.labelled_batch(side=16)
    tokens = nnx.merge(spec.abstract()[0], encoder)(spec.normalize(batch["image"])).tokens
    want = tokens.mean(axis=1) @ params["head"]["kernel"] + params["head"]["bias"]
    got = jax.jit(task.logits)(params, {}, {}, batch)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("size", [24, 40])
def test_flops_of_each_size_are_those_of_the_traced_step(size):
    """`traced` takes the batch of the largest size, so that each is the largest of its schedule."""
    fields = {"data.sizes": (16, size), "data.image_size": 32, "teacher.follow": True}
    task = DistillTask(tiny.config(**fields), teacher_spec=tiny.teacher_spec())
    # Besides the closed form, positions are resized once per step.
    extra = traced(task) / task.flops_at(size).executed
    assert 1 < extra < 1.2
    tuned = ClassifyTask(
        tiny.fine_tuning(**{"data.sizes": (16, size), "model.untie_positions": False}),
        init_spec=tiny.teacher_spec(position="none"),
    )
    assert tuned.flops_at(size).executed == pytest.approx(traced(tuned), rel=1e-9)


RUN = {
    "data.sizes": (24, 32),
    "student.freeze_blocks": 1,
    "lora.rank": 2,
    "teacher.follow": True,
    "profile_steps": 0,
    "seed": 1,  # whose first four draws are 24, 24, 32 and 24
}


@pytest.mark.slow
def test_a_run_of_parts_and_sizes_resumes_bit_for_bit(
    teacher, embedded_data, tmp_path, capsys, monkeypatch
):
    """Low-rank updates of the blocks after the first, one program per size, stopped half-way."""
    folder = tiny.save_teacher(tmp_path / "student", depth=2, width=32, mlp_width=64)
    config = starting(teacher, folder, **{"data.data_dir": embedded_data, "steps": 4, **RUN})
    config.eval.every = 4
    config.data.threads = 1
    compiled = []
    compile_train_step = program.Program.compile_train_step

    def counting(self, size=None, **options):
        compiled.append(size)
        return compile_train_step(self, size, **options)

    monkeypatch.setattr(program.Program, "compile_train_step", counting)
    whole, half = tmp_path / "whole", tmp_path / "half"
    loop.fit(DistillTask(config), config, whole)
    said = capsys.readouterr().out
    assert compiled == [24, 32] and "compiled the steps of 24, 32 px" in said
    assert "16 pictures of 24 or 32 px" in said
    rows = [row for row in metric_writer.read(whole) if "loss" in row]
    sizes = [row["image_size"] for row in rows]
    assert set(sizes) == {24, 32}
    shutil.copytree(whole, half)
    for gone in ("checkpoints/4", "model"):
        shutil.rmtree(half / gone)
    loop.fit(DistillTask(config), config, half)
    assert compiled[2:] == sorted({int(size) for size in sizes[2:]})
    again = [row for row in metric_writer.read(half) if "loss" in row]
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    (spec, one), (_, other) = (model_folder.load(run / "model") for run in (whole, half))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert spec.arch["image_size"] == 32
    # What the run held is that of its folder, and the export is a plain network.
    _, start = model_folder.load(folder)
    for name in ("pos_embed", "cls_token"):
        np.testing.assert_array_equal(one["encoder"][name], start["encoder"][name])
    jax.tree.map(
        np.testing.assert_array_equal,
        one["encoder"]["blocks"]["0"],
        start["encoder"]["blocks"]["0"],
    )
    kernels = [p["encoder"]["blocks"]["1"]["mlp"]["fc1"]["kernel"] for p in (one, start)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0
