"""Several teachers and one student, against runs with each teacher and plain numpy."""

import jax
import numpy as np
import pytest
import scipy.special
import torch

from configs import base
from fd_jax import settings, sharding
from fd_jax.errors import ConfigError
from fd_jax.evaluation import agreement
from fd_jax.models.features import FeatureMap
from fd_jax.normalization import spectrum, statistics
from fd_jax.tasks.distill import DROPPING_DRAWS, DistillTask
from fd_jax.tasks.parts import in_parts
from fd_jax.training import program
from tests import programs, tiny

WIDTHS = {"first": 48, "second": 40}


@pytest.fixture(scope="module")
def folders(teacher, tmp_path_factory):
    """Model folders of two teachers, whose grids are 4 x 4 and 3 x 3."""
    folder = tmp_path_factory.mktemp("teachers") / "second"
    return {"first": teacher, "second": tiny.save_teacher(folder, width=40, image_size=24)}


def config(folders, *, names=("first", "second"), fields=None, **changes):
    """A config of both teachers; `changes` are those of the second one's section."""
    changes = {"target__resample": "bilinear", **changes}
    sections = [
        (name, base.teacher("tiny", path=folders[name], **(changes if name == "second" else {})))
        for name in names
    ]
    return tiny.several(sections, **(fields or {}))


def specs(*names):
    made = {"first": tiny.teacher_spec(), "second": tiny.teacher_spec(width=40, image_size=24)}
    return {name: made[name] for name in names or made}


def make(made):
    """A task of a config, random parameters, the state at step 0 and the frozen arrays."""
    settings.check(made)
    task = DistillTask(made)
    shapes, _ = jax.eval_shape(task.init, jax.random.key(1))
    params = tiny.randomize(jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes), 5, scale=0.1)
    return task, params, task.extra_of({}), task.load_frozen()


@pytest.fixture(scope="module")
def both(folders):
    """A task of both teachers, its arrays, a prepared batch and what its loss returns."""
    task, params, extra, frozen = make(config(folders, drop_path=0.5))
    batch = task.prepare(tiny.batch(), jax.random.key(2))
    result = jax.jit(task.loss)(params, extra, frozen, batch)
    return task, params, extra, frozen, batch, result


def alone(folders, name, **changes):
    """The task of one of the teachers, whose trees are not nested under a name."""
    changes = changes or {"drop_path": 0.5}
    return make(config(folders, names=[name], **changes))[0]


def test_the_loss_is_the_sum_of_the_losses_of_each_teacher_alone(both, folders):
    """Each teacher has its own input size, grid, drop path, weights and projector."""
    _, params, extra, frozen, batch, (loss, (_, metrics)) = both
    shapes = {name: leaf["kernel"].shape for name, leaf in params["projector"].items()}
    assert shapes == {name: (32, width) for name, width in WIDTHS.items()}
    wanted = {}
    for name in WIDTHS:
        own = {"encoder": params["encoder"], "projector": params["projector"][name]}
        drops = {"student_drops": batch["student_drops"]}
        if name == "second":
            drops["teacher_drops"] = batch["teacher_drops_second"]
        one = jax.jit(alone(folders, name).loss)
        wanted[name] = one(own, extra, frozen[name], {**tiny.batch(), **drops})[0]
        total, count = metrics[f"loss/{name}"]
        np.testing.assert_allclose(total / count, wanted[name], rtol=1e-6)
    np.testing.assert_allclose(loss, sum(wanted.values()), rtol=1e-6)
    assert wanted["first"] != wanted["second"] and metrics["loss"][1] == 16


def test_held_out_metrics_have_the_names_of_the_teachers(both):
    task, params, extra, frozen, *_ = both
    measured = jax.eval_shape(task.evaluate, params, extra, frozen, tiny.batch())
    names = {f"{metric}/{name}" for metric in ("loss", "cosine") for name in WIDTHS}
    assert measured.keys() == {"loss", *names}


def test_shapes_and_work_are_those_of_the_arrays_and_of_each_teacher(both, folders):
    task, params, _, frozen, *_ = both
    shapes = jax.tree.map(lambda leaf: leaf.shape, task.abstract_frozen())
    assert shapes == jax.tree.map(np.shape, frozen)
    sharding.param_shardings(params, sharding.make_mesh())  # every parameter matches one row
    each = [alone(folders, name).flops().forward for name in WIDTHS]
    student = task.flops().forward - sum(flops.forward for flops in task.goals.flops(32))
    assert task.flops().forward == pytest.approx(sum(each) - student)


def test_a_single_named_teacher_has_the_program_of_an_unnamed_one():
    """Text for text, so also the one of earlier versions; another weight shows the difference."""

    def named(**fields):
        made = tiny.several([("clip", base.teacher("tiny"))], **fields)
        return programs.lowered(made, teacher_spec=tiny.teacher_spec())

    plain = programs.lowered(tiny.config(), teacher_spec=tiny.teacher_spec())
    assert named() == plain
    assert named(**{"teachers.clip.weight": 0.5}) != plain


def test_a_teacher_waits_for_the_one_before():
    """What this saves is measured for a TPU in tests/plan/test_several_teachers.py."""
    names = ("first", "second", "third")
    made = tiny.several([(n, base.teacher("tiny", path=n)) for n in names])
    task = DistillTask(made, teacher_specs=dict.fromkeys(names, tiny.teacher_spec()))
    shapes, batch = task.abstract_frozen(), {"image": tiny.batch()["image"]}

    def barriers(function, frozen):
        return jax.jit(function).lower(frozen, batch).as_text().count("optimization_barrier")

    assert barriers(task.targets, shapes) == 2
    assert barriers(task.of_teacher("first").teacher_target, shapes["first"]) == 0


@pytest.mark.slow
def test_parts_of_a_batch_have_the_targets_of_the_whole_in_less_memory(folders):
    whole = alone(folders, "second", drop_path=0.5)
    parts = alone(folders, "second", drop_path=0.5, parts=4)
    frozen = whole.load_frozen()
    batch = whole.prepare(tiny.batch(), jax.random.key(3))
    compiled = [
        jax.jit(task.teacher_target).lower(frozen, batch).compile() for task in (whole, parts)
    ]
    want, got = (step(frozen, batch) for step in compiled)
    np.testing.assert_allclose(got, want, atol=1e-5)
    memory = [step.memory_analysis().temp_size_in_bytes for step in compiled]
    assert memory[1] < 0.6 * memory[0]


def test_a_batch_that_the_parts_do_not_divide_has_fewer():
    rows = np.arange(6.0)
    seen = []

    def double(part, nothing):
        assert nothing is None
        seen.append(part.shape)
        return 2 * part[:, None]

    np.testing.assert_array_equal(in_parts(double, 4, rows, None)[:, 0], 2 * rows)
    assert seen[-1] == (3,)


# --- targets, projectors and losses ----------------------------------------------------------


def features(width, grid, seed=0):
    tokens = np.random.default_rng(seed).normal(size=(2, 1 + grid[0] * grid[1], width))
    return FeatureMap(tokens.astype(np.float32), cls=1, registers=0, grid=grid)


def resized(tokens, old, new):
    """Class token and patches, resized by torch. [B, 1 + h*w, D] -> [B, 1 + H*W, D]"""
    patches = tokens[:, 1:].reshape(len(tokens), *old, -1).transpose(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(
        torch.from_numpy(patches), size=new, mode="bilinear", antialias=True
    ).numpy()
    flat = patches.transpose(0, 2, 3, 1).reshape(len(tokens), -1, tokens.shape[-1])
    return np.concatenate([tokens[:, :1], flat], axis=1)


def test_the_students_map_can_be_resized_to_the_teachers_grid(folders):
    """Then the target is the teacher's own map, and the prediction has its grid."""
    task, params, _, _ = make(config(folders, names=["second"], target__resample="student"))
    found = features(32, (4, 4))
    got = task.goal.predict(params["projector"], found)
    projector = params["projector"]
    want = resized(found.tokens, (4, 4), (3, 3)) @ projector["kernel"] + projector["bias"]
    np.testing.assert_allclose(got, want, atol=2e-5)
    other = alone(folders, "second")
    shapes = [
        jax.eval_shape(each.teacher_target, each.abstract_frozen(), tiny.batch()).shape
        for each in (task, other)
    ]
    assert shapes == [(16, 10, 40), (16, 17, 40)]
    assert other.goal.predict(projector, found).shape == (2, 17, 40)


def test_projectors_of_two_layers_are_separate_for_class_token_and_patches(folders):
    shape = {"projector__kind": "mlp", "projector__hidden": 20, "projector__separate": True}
    task, params, _, _ = make(config(folders, names=["second"], **shape))
    found = features(32, (4, 4))
    got = task.goal.predict(params["projector"], found)

    def mlp(layers, x):
        x = x @ layers["hidden"]["kernel"] + layers["hidden"]["bias"]
        x = x * 0.5 * (1 + scipy.special.erf(x / np.sqrt(2)))
        return x @ layers["out"]["kernel"] + layers["out"]["bias"]

    parts = params["projector"]
    want = mlp(parts["patch"], found.tokens)
    np.testing.assert_allclose(got[:, 1:], want[:, 1:], atol=1e-5)
    np.testing.assert_allclose(got[:, :1], mlp(parts["cls"], found.tokens[:, :1]), atol=1e-5)
    assert np.abs(got[:, 0] - want[:, 0]).max() > 1e-2  # negative control: they are not shared
    assert parts["cls"]["hidden"]["kernel"].shape == (32, 20)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_weights_of_losses_of_the_class_token_and_of_a_teacher(folders, share):
    weights = {"loss__smooth_l1": 0.25, "loss__cosine": 0.75, "weight": 2.0, "loss__beta": 0.5}
    task = alone(folders, "second", loss__class_share=share, **weights)
    rng = np.random.default_rng(2)
    p, t = rng.normal(size=(2, 3, 17, 40))

    def loss(p, t):
        apart = np.abs(p - t)
        smooth = np.where(apart < 0.5, apart**2, apart - 0.25).mean(axis=(1, 2))
        lengths = np.linalg.norm(p, axis=-1) * np.linalg.norm(t, axis=-1)
        return 0.25 * smooth + 0.75 * (1 - (p * t).sum(-1) / lengths).mean(axis=1)

    want = loss(p, t)
    if share:
        want = share * loss(p[:, :1], t[:, :1]) + (1 - share) * loss(p[:, 1:], t[:, 1:])
        assert np.abs(want - loss(p, t)).max() > 1e-3
    np.testing.assert_allclose(
        task.goal.distance(p.astype(np.float32), t.astype(np.float32)), 2 * want, rtol=1e-6
    )


def test_any_name_of_a_teacher_has_a_sharding():
    """Names of layers too, whose kernels have other axes."""
    names = ("conv", "deconv1", "classifier", "projection", "dwconv", "head", "mlp", "my_dwconv")
    layers = {"kernel": np.zeros((8, 8)), "hidden": {"kernel": np.zeros((8, 8))}}
    found = sharding.param_shardings(
        {"projector": dict.fromkeys(names, layers)}, sharding.make_mesh()
    )
    specs = {str(leaf.spec) for leaf in jax.tree.leaves(found)}
    assert specs == {str(jax.sharding.PartitionSpec("fsdp", None))}


# --- statistics ------------------------------------------------------------------------------


def test_standardized_targets_have_the_running_mean_and_variance(folders):
    """Class tokens and patches apart; after `freeze_after` steps the statistics stay."""
    changes = {"target__normalize": "standardize", "target__freeze_after": 2}
    task, params, extra, frozen = make(config(folders, names=["second"], **changes))
    raw = alone(folders, "second", target__normalize="none")
    step, tokens_of = jax.jit(task.loss), jax.jit(raw.teacher_target)
    batches = [tiny.batch(seed=seed) for seed in range(3)]
    seen = [np.asarray(tokens_of(frozen, batch), np.float64) for batch in batches]
    for batch in batches:
        batch = task.prepare(batch, jax.random.key(0))
        _, (extra, _) = step(params, extra, frozen, batch)
    known = np.concatenate(seen[:2])
    assert extra["steps"] == 3
    target = np.asarray(task.targets(frozen, batches[0], extra)[""])
    for group, at in {"cls": slice(0, 1), "patch": slice(1, None)}.items():
        rows = known[:, at].reshape(-1, 40)
        np.testing.assert_allclose(extra["standardized"][group]["mean"], rows.mean(0), atol=1e-5)
        want = (seen[0][:, at] - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
        np.testing.assert_allclose(target[:, at], want, atol=2e-4)
    everything = np.concatenate(seen).reshape(-1, 40)  # negative control: not frozen
    apart = np.abs(extra["standardized"]["patch"]["mean"] - everything.mean(0))
    assert apart.max() > 1e-3


@pytest.fixture(scope="module")
def measured(folders, tmp_path_factory):
    """A file of statistics of the second teacher, of tokens that are not its own."""
    path = tmp_path_factory.mktemp("statistics") / "second.npz"
    spec = DistillTask(config(folders, names=["second"])).goal.teacher.spec
    rng = np.random.default_rng(0)
    spectra = {}
    for group, count in {"cls": 30, "patch": 900}.items():
        tokens = rng.normal(size=(count, 40)) @ rng.normal(size=(40, 40)) + 3
        spectra[group] = spectrum.Spectrum.of(count, tokens.mean(0), np.cov(tokens.T, bias=True))
    origin = statistics.Origin.of(folders["second"], spec, stages=0, after_norm=True)
    statistics.save(statistics.epath.Path(path), origin, spectra, data={})
    return str(path), spectra


def test_fitted_targets_use_the_statistics_of_each_group_of_tokens(folders, measured):
    path, spectra = measured
    changes = {"target__normalize": "phi_s", "target__statistics": path}
    task, _, _, frozen = make(config(folders, names=["second"], **changes))
    raw = alone(folders, "second", target__normalize="none")
    got = np.asarray(jax.jit(task.teacher_target)(frozen, tiny.batch()))
    tokens = np.asarray(jax.jit(raw.teacher_target)(frozen, tiny.batch()), np.float64)
    for group, at in {"cls": slice(0, 1), "patch": slice(1, None)}.items():
        found = spectra[group]
        # A rotation and one scale: distances from the mean shrink alike.
        want = np.linalg.norm(tokens[:, at] - found.mean, axis=-1) / np.sqrt(found.values.mean())
        np.testing.assert_allclose(np.linalg.norm(got[:, at], axis=-1), want, rtol=1e-5)
    shapes = jax.tree.map(lambda leaf: leaf.shape, task.abstract_frozen())
    assert shapes == jax.tree.map(np.shape, frozen)


def test_statistics_that_do_not_fit_are_refused_with_both_sides(folders, measured):
    path, _ = measured

    def load(name, **changes):
        made = config(folders)
        made.teachers[name].target.update(statistics=path, **changes)
        DistillTask(made).load_frozen()

    with pytest.raises(ConfigError, match="weights: measured .*, here .*|image_size: measured 24"):
        load("first", normalize="phi_s")
    with pytest.raises(ConfigError, match="after_norm: measured True, here False"):
        load("second", normalize="phi_s", after_norm=False)
    with pytest.raises(ConfigError, match="second.npz, cls: 30 tokens .* 40 directions, and 'zca'"):
        load("second", normalize="zca")
    with pytest.raises(ConfigError, match="statistics of cls, patch tokens, but .* gap tokens"):
        load("second", normalize="phi_s", kind="gap")
    with pytest.raises(ConfigError, match=r"teachers.second: .*normalize='pca' is fitted"):
        DistillTask(config(folders, target__normalize="pca"))
    with pytest.raises(ConfigError, match="but target.normalize='whiten' reads none"):
        DistillTask(config(folders, target__statistics=path))


# --- refusals and reports --------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"target__resample": "none"}, "set teachers.second.image_size to 32, or teachers.second"),
        ({"loss__class_share": 0.5}, "teachers.second.loss.class_share=0.5 needs a class token"),
        ({"projector__separate": True}, "teachers.second.projector.separate=True needs a class"),
        ({"target__kind": "cls"}, "teachers.second.target.kind='cls' needs a class token"),
    ],
)
def test_students_and_teachers_that_do_not_fit_are_refused(changes, message):
    found = {**specs("first"), "second": tiny.teacher_spec(image_size=24, cls_token=False)}
    made = config({"first": "a", "second": "b"}, **changes)
    with pytest.raises(ConfigError, match=message):
        DistillTask(made, teacher_specs=found)


def test_a_relation_needs_two_tokens():
    arch = {"patch_size": 32, "cls_token": False}
    made = config({"second": "b"}, names=["second"], loss__relation=1.0)
    made.student.arch.update(arch)
    spec = tiny.teacher_spec(**arch)
    with pytest.raises(ConfigError, match="compares tokens with each other, and .* has only 1"):
        DistillTask(made, teacher_spec=spec)


def test_a_config_with_both_kinds_of_teachers_is_refused(folders):
    made = config(folders)
    made.teacher = tiny.config().teacher
    with pytest.raises(ConfigError, match=r"has teachers \(first, second\), and also teacher"):
        DistillTask(made)


@pytest.mark.slow
def test_agreement_is_measured_with_each_teacher(both):
    task, params, extra, frozen, *_ = both
    for name in WIDTHS:
        view = task.of_teacher(name, extra)
        totals = agreement.measure(view, {"a": params}, frozen[name], [tiny.batch()])
        target = np.asarray(task.targets(frozen, tiny.batch())[name], np.float64)
        np.testing.assert_allclose(totals["patch"].square, (target[:, 1:] ** 2).sum(), rtol=1e-5)
        assert totals["patch"].mean.shape == (WIDTHS[name],)


def test_dropping_changes_the_loss_and_keeps_the_running_losses(both, folders):
    _, params, _, frozen, batch, (whole, _) = both
    fields = {"dropping.rate": 0.5, "dropping.by": "running"}
    task = DistillTask(config(folders, drop_path=0.5, fields=fields))
    extra = task.extra_of({})
    drawn = task.prepare(tiny.batch(), jax.random.key(2))
    assert drawn[DROPPING_DRAWS].shape == (16, 2)
    np.testing.assert_array_equal(drawn["student_drops"], batch["student_drops"])
    loss, (extra, metrics) = jax.jit(task.loss)(params, extra, frozen, drawn)
    means = [total / count for total, count in (metrics["loss/first"], metrics["loss/second"])]
    np.testing.assert_allclose(extra["dropping"]["loss"], means, rtol=1e-6)
    np.testing.assert_allclose(sum(means), whole, rtol=1e-6)
    furthest = ("first", "second")[int(np.argmax(means))]
    assert metrics[f"kept/{furthest}"][0] == 16
    kept = [float(metrics[f"kept/{name}"][0]) for name in WIDTHS]
    assert sum(kept) < 32 and abs(loss - whole) > 1e-4 * whole


# --- whole runs ------------------------------------------------------------------------------

MIXED = {
    "target__normalize": "standardize",
    "target__freeze_after": 2,
    "projector__kind": "mlp",
    "projector__separate": True,
    "loss__cosine": 0.5,
    "loss__relation": 0.5,
}
RUNNING = {"dropping.rate": 0.5, "dropping.by": "running"}


@pytest.mark.slow
def test_every_mesh_gives_the_losses_of_one_device():
    """With all that is measured over the batch, and parts of it."""
    made = config({"first": "a", "second": "b"}, fields=RUNNING, parts=2, **MIXED)
    settings.check(made)

    def losses(shape):
        devices = jax.devices()[: int(np.prod(shape))]
        mesh = sharding.make_mesh(data=shape[0], fsdp=shape[1], tensor=shape[2], devices=devices)
        task = DistillTask(made, teacher_specs=specs())
        run = program.build(task, made, mesh, steps_per_epoch=10, total_steps=100)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), task.abstract_frozen())
        frozen = run.place_frozen(tiny.randomize(zeros, 3))
        state, found = run.create(jax.random.key(0), {}), []
        for step in range(4):
            host = {**tiny.batch(seed=step), "stop": np.zeros(16, np.int32)}
            batch = jax.device_put(host, sharding.batch_sharding(mesh))
            state, metrics = run.train_step(state, frozen, batch, run.place_seed(0))
            found.append({n: float(t / c) for n, (t, c) in jax.device_get(metrics).items() if c})
        return found, jax.device_get(state.extra)

    (want, want_extra), (got, got_extra) = losses((1, 1, 1)), losses((2, 2, 2))
    for one, other in zip(want, got, strict=True):
        for name in ("loss", "loss/first", "loss/second", "kept/first", "kept/second"):
            np.testing.assert_allclose(other[name], one[name], rtol=5e-6, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got_extra, want_extra
    )
