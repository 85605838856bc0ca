"""Masked students and several levels of a teacher, against plain numpy."""

import shutil

import jax
import numpy as np
import pytest

from configs import base, distill_maskalign_vit_b16
from fd_jax import load_model, model_folder, optimizer, settings, sharding
from fd_jax.errors import ConfigError
from fd_jax.models.levels import NO_DECAY, first_mixing
from fd_jax.tasks.distill import DistillTask
from fd_jax.tasks.masking import DRAWS, Mask
from fd_jax.training import loop, metric_writer, program
from tests import programs, tiny
from tests.models import numpy_vit, vits

ROWS, KEPT = 4, 5
# Five of the sixteen patches, by the attention of the second of the teacher's three blocks.
FIELDS = {
    "student.mask.keep": 0.32,
    "student.mask.by": "attention",
    "target.blocks": (0, 1),
    "target.after_norm": False,
    "student.drop_path": 0.0,
}
SPEC = tiny.teacher_spec(depth=3)


def planned(spec=SPEC, **fields):
    """A task without weights; `fields` replace those of FIELDS."""
    return DistillTask(tiny.config(**{**FIELDS, **fields}), teacher_spec=spec)


# --- the choice of patches -------------------------------------------------------------------


def test_random_patches_are_each_as_likely_and_their_number_is_exact():
    rows, mask = 4000, Mask(0.3)
    draws = np.random.default_rng(0).random((rows, 16), np.float32)
    places = np.asarray(mask.visible(draws, None))
    assert places.shape == (rows, 4) and (np.diff(places, axis=1) > 0).all()
    want = np.sort(np.argsort(-draws, axis=1)[:, :4], axis=1)
    np.testing.assert_array_equal(places, want)
    counts = np.bincount(places.ravel(), minlength=16)
    assert np.abs(counts - rows / 4).max() < 5 * np.sqrt(rows * 0.25 * 0.75)


def test_patches_are_drawn_in_proportion_to_the_attention():
    """Without replacement: two of five patches, whose chances follow from their shares."""
    rows, shares = 20_000, np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    draws = np.random.default_rng(1).random((rows, 5), np.float32)
    # Any common factor is left out, as the share of the class token is in a row of attention.
    attention = np.broadcast_to(0.7 * shares, (rows, 5)).astype(np.float32)
    places = np.asarray(Mask(0.4).visible(draws, attention))
    assert places.shape == (rows, 2)
    second = [
        sum(shares[j] * shares[i] / (1 - shares[j]) for j in range(5) if j != i) for i in range(5)
    ]
    chance = shares + second
    np.testing.assert_allclose(chance.sum(), 2)
    found = np.bincount(places.ravel(), minlength=5) / rows
    deviation = np.sqrt(chance * (1 - chance) / rows)
    assert (np.abs(found - chance) < 5 * deviation).all()
    assert np.abs(found - 0.4).max() > 50 * deviation.max()  # control: not at random
    assert np.abs(found - 2 * shares).max() > 20 * deviation.max()  # control: not with replacement


@pytest.mark.parametrize(
    "keep,grid,count",
    [(0.3, (14, 14), 58), (0.29, (10, 10), 29), (0.3, (1, 10), 3), (0.32, (4, 4), 5)],
)
def test_the_number_of_patches_is_rounded_down_but_not_by_rounding_errors(keep, grid, count):
    """58 of 196 as in the authors' code; 0.29 * 100 is 28.999999999999996."""
    assert Mask(keep).count(grid) == count


# --- a step ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """A task, its arrays, a prepared batch, and what its loss returns."""
    folder = tiny.save_teacher(tmp_path_factory.mktemp("teachers") / "deep", depth=3)
    config = tiny.config(folder, **FIELDS)
    settings.check(config)
    task = DistillTask(config)
    params = tiny.randomize(task.init(jax.random.key(0))[0], 5, scale=0.2)
    batch = task.prepare(tiny.batch(ROWS), jax.random.key(2))
    frozen = task.load_frozen()
    return task, folder, params, frozen, batch, jax.jit(task.loss)(params, {}, frozen, batch)


def levels_of(params, arch, images, blocks, **keep):
    """A network's tokens after some blocks, by plain numpy."""
    rest = {name: value for name, value in params.items() if name != "norm"}
    return [
        numpy_vit.forward(rest, {**arch, "depth": block + 1}, images, **keep) for block in blocks
    ]


def whitened(tokens):
    centred = tokens - tokens.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def test_a_masked_step_equals_plain_numpy(step):
    """Attention, choice, both networks, mixing, projectors and loss."""
    task, folder, params, frozen, batch, (loss, _) = step
    spec, parts = model_folder.load(folder)
    pixels = np.asarray(batch["image"])
    images = np.asarray(spec.normalize(pixels))
    (attention,) = vits.bind(spec, parts["encoder"]).attention_maps(images, [1])
    weights = np.asarray(attention.weights())[:, :, 0, 1:].mean(axis=1)
    times = -np.log(np.asarray(batch[DRAWS])) / weights
    visible = np.sort(np.argsort(times, axis=1)[:, :KEPT], axis=1)
    targets = [
        np.stack([row[[0, *(1 + kept)]] for row, kept in zip(tokens, visible, strict=True)])
        for tokens in levels_of(parts["encoder"], spec.arch, images, (0, 1))
    ]

    def predicted(visible):
        arch = task.student_spec.arch
        images = np.asarray(task.student_spec.normalize(pixels))
        maps = levels_of(params["encoder"], arch, images, (0, 1), keep=visible)
        mixing, projectors = (params["projector"][name] for name in ("mixing", "projectors"))
        for column, block in enumerate("01"):
            mixed = sum(
                weight * level for weight, level in zip(mixing[:, column], maps, strict=True)
            )
            yield mixed @ projectors[block]["kernel"] + projectors[block]["bias"]

    def loss_of(visible):
        apart = [np.abs(p - whitened(t)) for p, t in zip(predicted(visible), targets, strict=True)]
        return np.mean([np.where(d < 2, d**2 / 4, d - 1) for d in apart])

    assert loss == pytest.approx(loss_of(visible), rel=2e-6)
    # Control: the patches beside the right ones.
    assert abs(loss - loss_of(np.sort((visible + 1) % 16, axis=1))) > 1e-3 * loss
    assert {"kernel": (32, 48), "bias": (48,)} == jax.tree.map(
        np.shape, params["projector"]["projectors"]["1"]
    )


def test_held_out_images_are_seen_as_a_whole(step):
    """Text for text as in a task without a mask; negative control: that is not so in training."""
    task, folder, params, frozen, batch, _ = step
    whole = DistillTask(tiny.config(folder, **{**FIELDS, "student.mask.keep": 1.0}))

    def text(function, batch):
        return jax.jit(function).lower(params, {}, frozen, batch).as_text()

    assert text(task.evaluate, tiny.batch(ROWS)) == text(whole.evaluate, tiny.batch(ROWS))
    assert text(task.loss, batch) != text(whole.loss, batch)


def test_reports_see_the_last_level(step):
    task, _, params, frozen, batch, _ = step
    view = task.of_teacher("")
    targets, last = (
        jax.jit(function)(frozen, batch) for function in (task.teacher_target, view.teacher_target)
    )
    assert targets.shape == (ROWS, 2, 17, 48)
    np.testing.assert_array_equal(last, targets[:, 1])
    assert jax.eval_shape(view.predict, params, batch).shape == (ROWS, 17, 48)


@pytest.mark.parametrize("kind,tokens", [("full", 1 + KEPT), ("cls", 1), ("gap", 1)])
def test_every_kind_of_target_works_with_and_without_levels(kind, tokens):
    for blocks in ((), (0, 2)):
        task = planned(
            **{"target.kind": kind, "target.blocks": blocks, "student.mask.by": "random"}
        )
        shapes, _ = jax.eval_shape(task.init, jax.random.key(0))
        batch = task.prepare(tiny.batch(ROWS), jax.random.key(0))
        visible = jax.ShapeDtypeStruct((ROWS, KEPT), "int32")
        predicted = jax.eval_shape(
            lambda params, visible, task=task, batch=batch: task.predictions(
                params, batch, {}, visible=visible
            ),
            shapes,
            visible,
        )
        assert predicted[""].shape == (ROWS, *([2] if blocks else []), tokens, 48)
        jax.eval_shape(task.loss, shapes, {}, task.abstract_frozen(), batch)


def test_several_teachers_share_the_patches_that_one_of_them_attends_to():
    sections = [
        ("clip", base.teacher("tiny", target__blocks=(0, 1), target__after_norm=False, parts=2)),
        ("dino", base.teacher("tiny", target__resample="bilinear", parts=2)),
    ]
    mask = {
        "student.mask.keep": 0.32,
        "student.mask.by": "attention",
        "student.mask.teacher": "clip",
    }
    config = tiny.several(sections, **mask)
    settings.check(config)
    specs = {"clip": SPEC, "dino": tiny.teacher_spec(image_size=24)}
    task = DistillTask(config, teacher_specs=specs)
    assert task.mask == Mask(0.32, "clip")
    params, extra = jax.eval_shape(task.init, jax.random.key(0))
    batch = task.prepare(tiny.batch(ROWS), jax.random.key(0))
    _, (_, metrics) = jax.eval_shape(task.loss, params, extra, task.abstract_frozen(), batch)
    assert {"loss", "loss/clip", "loss/dino"} == metrics.keys()
    sharding.param_shardings(params, sharding.make_mesh())  # every parameter matches one row


# --- programs and settings -------------------------------------------------------------------


def lowered(config):
    return programs.lowered(config, teacher_spec=tiny.teacher_spec())


def test_a_run_without_masking_has_the_program_of_one_without_these_settings():
    """Text for text; such are the configs of earlier versions. A mask shows the difference."""
    earlier = tiny.config("teacher")
    del earlier.student.mask, earlier.target.blocks
    settings.check(earlier)
    plain = lowered(earlier)
    assert lowered(tiny.config(**{"student.mask.by": "attention"})) == plain
    assert lowered(tiny.config(**{"student.mask.keep": 0.5})) != plain


def test_levels_are_first_mixed_as_in_the_authors_code():
    """The identity and 0.01; of unequal depths, the student's block at the same height."""
    last = np.eye(12, dtype=np.float32)[:, 7:] + np.float32(0.01)
    np.testing.assert_array_equal(first_mixing(12, (7, 8, 9, 10, 11), 12), last)
    assert first_mixing(2, (0, 1, 2, 11), 12).argmax(axis=0).tolist() == [0, 0, 0, 1]
    assert first_mixing(24, (0, 5, 11), 12).argmax(axis=0).tolist() == [1, 11, 23]
    params, _ = jax.eval_shape(planned().init, jax.random.key(0))
    decays = optimizer.decay_mask(params["projector"], NO_DECAY)
    assert decays["mixing"]  # the pattern is that of the whole tree
    assert not optimizer.decay_mask(params, NO_DECAY)["projector"]["mixing"]
    assert optimizer.decay_mask(params, NO_DECAY)["projector"]["projectors"]["1"]["kernel"]


def test_the_config_has_the_values_of_the_authors_command():
    config = distill_maskalign_vit_b16.get_config()
    optim, (section,) = config.optim, config.teachers.values()
    factor = config.batch_size / optim.lr_batch
    rates = [factor * rate for rate in (optim.start_lr, optim.peak_lr, optim.min_lr)]
    assert rates == pytest.approx([0, 6e-4, 1e-5])
    assert (config.epochs, optim.warmup_epochs, optim.betas) == (200, 20, (0.9, 0.95))
    assert (config.student.mask.keep, config.student.mask.by) == (0.3, "attention")
    assert (config.student.drop_path, optim.weight_decay, config.data.min_area) == (0.1, 0.05, 0.2)
    # Twice PyTorch's smooth L1, of the last five of twelve blocks before the final norm.
    assert (section.weight, section.loss.beta) == (2, 1)
    assert section.target.blocks == (7, 8, 9, 10, 11) and not section.target.after_norm


NO_CLASS = {"cls_token": False}


@pytest.mark.parametrize(
    "spec,fields,message",
    [
        (
            {},
            {"student.mask.keep": 0.01},
            "0.01 of the 4 x 4 patches of images of 32 px are 0, but",
        ),
        (
            {},
            {"student.mask.keep": 0.0624, "data.sizes": (32, 64), "teacher.follow": True},
            "of images of 32 px are 0, but there have to be 1 at least .* set it to 0.0625 or more",
        ),
        ({}, {"target.resample": "student"}, "leaves patches out, but target.resample='student'"),
        ({}, {"target.blocks": (1, 3)}, r"blocks=\(1, 3\), but the teacher has 3 blocks.* up to 2"),
        (
            NO_CLASS,
            {},
            "class token, but the teacher, a vit, has none: set student.mask.by='random'",
        ),
        (
            {"image_size": 24},
            {"target.resample": "bilinear"},
            "4 x 4 in images of 32 px, by the teacher's attention, but that has 3 x 3 patches",
        ),
        (
            {},
            {"student.mask.teacher": "clip"},
            "teacher='clip', but .* follows one of the teachers '', the only one: set",
        ),
    ],
)
def test_masks_and_levels_that_cannot_be_are_refused(spec, fields, message):
    with pytest.raises(ConfigError, match=message):
        planned(tiny.teacher_spec(depth=3, **spec), **fields)


def test_networks_with_stages_are_refused_by_name():
    swin, spec = tiny.swin_config(), tiny.teacher_spec(patch_size=16)
    swin.update_from_flattened_dict({"student.mask.keep": 0.5})
    with pytest.raises(ConfigError, match="keep=0.5 leaves patches out, but the student is a swin"):
        DistillTask(swin, teacher_spec=spec)
    levels = {"student.mask.keep": 1.0, "target.blocks": (0,), "target.after_norm": False}
    swin.update_from_flattened_dict(levels)
    with pytest.raises(ConfigError, match="the student has 3 stages, whose maps differ in size"):
        DistillTask(swin, teacher_spec=spec)
    config = tiny.config(**{**levels, "target.resample": "bilinear"})
    with pytest.raises(ConfigError, match="the teacher has 3 stages, whose maps differ in size"):
        DistillTask(config, teacher_spec=tiny.swin_spec(1))


def test_a_mask_of_several_teachers_has_to_say_whose_attention():
    sections = [(name, base.teacher("tiny", path=name)) for name in ("clip", "dino")]
    for name in ("", "mae"):
        mask = {"student.mask.by": "attention", "student.mask.teacher": name}
        config = tiny.several(sections, **{"student.mask.keep": 0.5, **mask})
        with pytest.raises(ConfigError, match=f"teacher='{name}', but .* teachers 'clip', 'dino'"):
            DistillTask(config, teacher_specs=dict.fromkeys(("clip", "dino"), SPEC))


def test_a_relation_needs_two_of_the_patches():
    section = base.teacher("tiny", loss__relation=1.0, loss__class_share=0.5)
    config = tiny.several([("clip", section)], **{"student.mask.keep": 0.1})
    with pytest.raises(ConfigError, match="are 1, but there have to be 2 at least for .*relation"):
        DistillTask(config, teacher_spec=SPEC)


# --- whole runs ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_masked_run_resumes_bit_for_bit_and_exports_an_ordinary_vit(embedded_data, tmp_path):
    folder = tiny.save_teacher(tmp_path / "deep", depth=3)
    fields = {**FIELDS, "steps": 4, "profile_steps": 0, "data.data_dir": embedded_data}
    config = tiny.config(folder, **{**fields, "student.drop_path": 0.2, "data.threads": 1})
    whole, half = tmp_path / "whole", tmp_path / "half"
    loop.fit(DistillTask(config), config, whole)
    shutil.copytree(whole, half)
    for gone in ("checkpoints/4", "model"):
        shutil.rmtree(half / gone)
    loop.fit(DistillTask(config), config, half)
    rows = [[r["loss"] for r in metric_writer.read(run) if "loss" in r] for run in (whole, half)]
    assert len(rows[0]) == 4 and rows[0] == rows[1]
    (spec, one), (_, other) = (model_folder.load(run / "model") for run in (whole, half))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert spec.family == "vit" and spec.arch == DistillTask(config).student_spec.arch
    model = load_model(whole / "model")
    images = tiny.batch(2)["image"]
    assert model(model.preprocess(images)).patches.shape == (2, 16, 32)
    # The final norm is behind the levels, so that it stays as it was.
    np.testing.assert_array_equal(one["encoder"]["norm"]["scale"], 1)


@pytest.mark.slow
def test_every_mesh_gives_the_losses_of_one_device():
    config = tiny.config(**{**FIELDS, "student.drop_path": 0.2})

    def losses(shape):
        devices = jax.devices()[: int(np.prod(shape))]
        mesh = sharding.make_mesh(data=shape[0], fsdp=shape[1], tensor=shape[2], devices=devices)
        task = DistillTask(config, teacher_spec=SPEC)
        run = program.build(task, config, mesh, steps_per_epoch=10, total_steps=100)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), task.abstract_frozen())
        frozen = run.place_frozen(tiny.randomize(zeros, 3))
        state, found = run.create(jax.random.key(0), {}), []
        for step in range(3):
            host = {**tiny.batch(seed=step), "stop": np.zeros(16, np.int32)}
            batch = jax.device_put(host, sharding.batch_sharding(mesh))
            state, metrics = run.train_step(state, frozen, batch, run.place_seed(0))
            total, count = jax.device_get(metrics)["loss"]
            found.append(float(total / count))
        return found

    np.testing.assert_allclose(losses((2, 2, 2)), losses((1, 1, 1)), rtol=5e-6)
