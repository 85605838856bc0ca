"""Every mesh and every number of micro-batches gives the same losses, with all randomness on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fd_jax import settings, sharding
from fd_jax.data import global_batch
from fd_jax.data.feed import Feed
from fd_jax.errors import ConfigError
from fd_jax.evaluation import evaluators
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.tasks.distill import DistillTask
from fd_jax.training import program
from tests import tiny
from tests.models import evas

STEPS = 3
MESHES = {
    "1x1x1": (1, 1, 1),
    "2x1x1": (2, 1, 1),
    "1x2x1": (1, 2, 1),
    "1x1x2": (1, 1, 2),
    "4x2x1": (4, 2, 1),
}


class DeviceLocalNoise(DistillTask):
    """Negative control: each shard of the batch draws its own drop path, as with a key per host."""

    def prepare(self, batch, key):
        batch = super().prepare(batch, key)
        rows = batch["image"].shape[0]
        shards = rows // self.rows_per_shard
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(shards))
        shape = (self.rows_per_shard, self.student.depth, 2)
        drops = jax.vmap(lambda k: jax.random.uniform(k, shape))(keys)
        return {**batch, "student_drops": drops.reshape(rows, self.student.depth, 2)}


def train(mesh_shape, *, accumulation=1, make_task=DistillTask, config=None, steps=STEPS):
    config = config or tiny.config(accumulation=accumulation)
    data, fsdp, tensor = mesh_shape
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)
    task = make_task(config, teacher_spec=tiny.teacher_spec())
    run = program.build(task, config, mesh, steps_per_epoch=10, total_steps=100)
    encoder = tiny.randomize(
        jax.tree.map(lambda leaf: np.zeros(leaf.shape), task.abstract_frozen()["encoder"]), 3
    )
    frozen = run.place_frozen({"encoder": encoder})
    state = run.create(jax.random.key(0), {})
    rows = global_batch.local_rows(sharding.batch_sharding(mesh), config.batch_size)
    losses = []
    for step in range(steps):
        host = {**tiny.batch(seed=step), "stop": np.zeros(16, np.int32)}
        batch = global_batch.to_global(
            host, sharding.batch_sharding(mesh), rows=rows, batch_size=config.batch_size
        )
        state, metrics = run.train_step(state, frozen, batch, run.place_seed(config.seed))
        total, count = jax.device_get(metrics["loss"])
        losses.append(total / count)
    return np.array(losses), state


@pytest.fixture(scope="module")
def reference():
    return train((1, 1, 1))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) for name in list(MESHES)[1:4]] + list(MESHES)[4:],
)
def test_every_mesh_gives_the_losses_and_parameters_of_one_device(reference, name):
    losses, state = train(MESHES[name])
    np.testing.assert_allclose(losses, reference[0], rtol=1e-6)
    assert state.step == STEPS
    for got, want in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(reference[1].params), strict=True
    ):
        # Adam divides by the root of the second moment. The sign of a gradient near zero depends on
        # rounding, so the tolerance is relative to the largest parameter.
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max() + 1e-4)


@pytest.mark.slow
def test_gates_norms_rotations_and_partial_patches_train_alike_on_every_mesh():
    shape = {"width": 32, "mlp_width": 64, "depth": 1, "patch_size": 7, "partial_patches": "crop"}
    config = tiny.config("teacher")
    with config.unlocked():
        config.student.arch.update(evas.spec("EVA-02-CLIP", **shape).arch)
    settings.check(config)

    def make(config, **_):
        return DistillTask(config, teacher_spec=evas.spec("Perception Encoder", depth=1))

    alone, together = (
        train(mesh, make_task=make, config=config, steps=2) for mesh in ((1, 1, 1), (2, 2, 2))
    )
    np.testing.assert_allclose(together[0], alone[0], rtol=1e-6)
    leaves = (jax.tree.leaves(state.params) for _, state in (together, alone))
    for got, want in zip(*leaves, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max() + 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh,accumulation",
    [
        pytest.param("1x1x1", 2, marks=pytest.mark.slow),
        pytest.param("1x1x1", 4, marks=pytest.mark.slow),
        pytest.param("2x1x1", 2, marks=pytest.mark.slow),
        pytest.param("1x1x2", 2, marks=pytest.mark.slow),
        ("4x2x1", 2),
    ],
)
def test_accumulation_gives_the_losses_of_the_whole_batch(reference, mesh, accumulation):
    losses, _ = train(MESHES[mesh], accumulation=accumulation)
    np.testing.assert_allclose(losses, reference[0], rtol=2e-6)


@pytest.mark.slow
def test_device_local_randomness_would_change_the_losses():
    """Negative control: noise drawn once and noise drawn by each of two shards differ."""

    def losses(shards):
        def make(config, **kwargs):
            task = DeviceLocalNoise(config, **kwargs)
            task.rows_per_shard = 16 // shards
            return task

        return train((shards, 1, 1), make_task=make)[0]

    assert np.abs(losses(2) / losses(1) - 1).max() > 1e-4


GIANT = {
    "pretrained_windows": (6, 6, 3),
    "extra_norm_every": 2,
}


@pytest.mark.slow
def test_a_small_swin_giant_trains_the_same_on_a_mesh_of_three_axes():
    """It has shifted and clipped windows and extra norms; heads are split over the tensor axis."""
    config = tiny.swin_config(**{"target.resample": "bilinear"})
    config.student.arch = tiny.swin_spec(2, **GIANT).arch
    losses = {}
    for mesh in ((1, 1, 1), (2, 2, 2)):
        losses[mesh], state = train(mesh, config=config, steps=4)
    np.testing.assert_allclose(losses[2, 2, 2], losses[1, 1, 1], rtol=5e-6)
    assert losses[2, 2, 2][-1] < losses[2, 2, 2][0]
    attn = state.params["encoder"]["stages"]["0"]["blocks"]["0"]["attn"]
    shard = attn["qkv"]["kernel"].addressable_shards[0].data
    assert (attn["qkv"]["kernel"].shape, shard.shape) == ((16, 3, 16), (8, 3, 8))
    assert "extra_norm" in state.params["encoder"]["stages"]["0"]["blocks"]["1"]


@pytest.mark.slow
def test_parameters_and_moments_are_split_over_fsdp():
    _, state = train((1, 8, 1))
    kernel = state.params["encoder"]["blocks"]["0"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (4, 64)
    moments = [
        leaf for leaf in jax.tree.leaves(state.opt_state) if getattr(leaf, "shape", ()) == (32, 64)
    ]
    # First and second moments of fc1 in both blocks.
    assert len(moments) == 4
    assert {leaf.addressable_shards[0].data.shape for leaf in moments} == {(4, 64)}


def test_every_parameter_matches_one_row_of_the_sharding_table():
    for position in ("ape", "rpb", "shared_rpb"):
        arch = {**tiny.TEACHER, "position": position, "layer_scale": 0.1, "qkv_bias": "qv"}
        params = tiny.teacher_spec(**arch).abstract()[1]
        sharding.param_shardings({"encoder": params}, sharding.make_mesh())


@pytest.mark.parametrize(
    "sizes,expected",
    [
        ({"data": -1, "fsdp": 1, "tensor": 1}, (8, 1, 1)),
        ({"data": -1, "fsdp": 4, "tensor": 1}, (2, 4, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
    ],
)
def test_minus_one_in_a_mesh_becomes_the_remaining_devices(sizes, expected):
    assert sharding.resolve_mesh(sizes, 8) == expected


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 3, "fsdp": 1, "tensor": 1},
        {"data": -1, "fsdp": 3, "tensor": 1},
        {"data": -1, "fsdp": -1, "tensor": 1},
        {"data": 0, "fsdp": 1, "tensor": -1},
    ],
)
def test_impossible_meshes_are_refused(sizes):
    with pytest.raises(ConfigError, match="mesh"):
        sharding.resolve_mesh(sizes, 8)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The attributes of a GPU that a mesh uses; jax gives each machine its own slice_index."""

    id: int
    slice_index: int
    platform: str = "gpu"


@pytest.mark.parametrize("fsdp", [8, 16, 64])
def test_fsdp_spans_machines_of_gpus(fsdp):
    devices = [Gpu(number, slice_index=number // 8) for number in range(64)]
    mesh = sharding.make_mesh(fsdp=fsdp, devices=devices)
    assert mesh.devices.shape == (64 // fsdp, fsdp, 1)
    assert [device.id for device in mesh.devices.flat] == list(range(64))


@pytest.mark.parametrize(
    "batch_size,accumulation,message",
    [
        (12, 1, r"batch_size 12 .* 8 batch shards.*use 8 or 16"),
        (4, 2, r"x 2 micro-batches; use 16$"),
        (0, 1, "batch_size=0: expected a whole number above 0"),
        (-8, 1, "batch_size=-8"),
        (8, 0, "accumulation=0"),
    ],
)
def test_batch_size_that_does_not_split_is_refused(batch_size, accumulation, message):
    mesh = sharding.make_mesh()
    with pytest.raises(ConfigError, match=message):
        sharding.check_batch(batch_size, accumulation, mesh)


def test_parameter_that_its_mesh_axis_does_not_divide_is_refused():
    mesh = sharding.make_mesh(data=1, fsdp=8)
    params = tiny.teacher_spec(width=36, heads=4, mlp_width=64).abstract()[1]
    with pytest.raises(ConfigError, match="36 is not divisible by mesh.fsdp=8"):
        sharding.param_shardings(params, mesh)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return tiny.save_student(tmp_path_factory.mktemp("students") / "tiny")


def fine_tune(folder, devices, *, accumulation=1, steps=STEPS, fsdp=1, tensor=1, **fields):
    """Losses of a classification with mixup, cutmix, erasing and drop path."""
    mesh = sharding.make_mesh(fsdp=fsdp, tensor=tensor, devices=jax.devices()[:devices])
    config = tiny.fine_tuning(folder, accumulation=accumulation, **fields)
    task = ClassifyTask(config)
    run = program.build(task, config, mesh, steps_per_epoch=10, total_steps=100)
    state = run.create(jax.random.key(0), task.load_initial())
    frozen = run.place_frozen(task.load_frozen())
    rows = global_batch.local_rows(sharding.batch_sharding(mesh), config.batch_size)
    losses = []
    for step in range(steps):
        host = {**tiny.labelled_batch(seed=step), "stop": np.zeros(16, np.int32)}
        batch = global_batch.to_global(
            host, sharding.batch_sharding(mesh), rows=rows, batch_size=config.batch_size
        )
        state, metrics = run.train_step(state, frozen, batch, run.place_seed(config.seed))
        total, count = jax.device_get(metrics["loss"])
        losses.append(total / count)
    return np.array(losses)


PROBE = {"model.trains": "head", "model.untie_positions": False, "model.head_scale": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"model.head_scale": 1.0}, PROBE], ids=["all", "head"])
def test_classification_on_every_mesh_gives_the_losses_of_one_device(classifier, fields):
    want = fine_tune(classifier, 1, **fields)
    np.testing.assert_allclose(fine_tune(classifier, 8, **fields), want, rtol=3e-6)
    sharded = fine_tune(classifier, 8, fsdp=2, tensor=2, **fields)
    np.testing.assert_allclose(sharded, want, rtol=3e-6)


@pytest.mark.slow
def test_classification_with_accumulation_gives_the_losses_of_the_whole_batch(classifier):
    want = fine_tune(classifier, 1, **{"model.head_scale": 1.0})
    got = fine_tune(classifier, 2, accumulation=2, **{"model.head_scale": 1.0})
    np.testing.assert_allclose(got, want, rtol=3e-6)
    other = fine_tune(classifier, 1, **{"model.head_scale": 1.0, "seed": 1})
    assert np.abs(other / want - 1).max() > 1e-4


def test_two_seeds_share_one_compiled_program(classifier):
    """The test above shows that their losses differ."""

    def lowered(seed):
        config = tiny.fine_tuning(classifier, seed=seed)
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        run = program.build(ClassifyTask(config), config, mesh, steps_per_epoch=10, total_steps=100)
        return run.train_step.lower(run.state, run.frozen, run.batch, run.seed).as_text()

    assert lowered(0) == lowered(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "devices,batch_size",
    [
        pytest.param(1, 16, marks=pytest.mark.slow),
        (3, 12),
        pytest.param(8, 16, marks=pytest.mark.slow),
    ],
)
def test_evaluation_gives_the_accuracy_of_a_plain_loop(
    classifier, embedded_data, devices, batch_size
):
    """The number of examples is prime, so no mesh divides it."""
    fields = {
        "data.data_dir": embedded_data,
        "data.eval_split": "test[:97]",
        "batch_size": batch_size,
        "model.head_scale": 1.0,
        "mixing.mixup": 0.0,
        "mixing.cutmix": 0.0,
    }
    config = tiny.fine_tuning(classifier, **fields)
    task = ClassifyTask(config)
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    run = program.build(task, config, mesh, steps_per_epoch=1, total_steps=1)
    state = run.create(jax.random.key(0), task.load_initial())
    feed = Feed(**config.data)
    got = evaluators.HeldOut(config.batch_size)(
        run, evaluators.Weights(state.params, state.extra, {}), feed
    )

    dataset, params = feed.eval_dataset, jax.device_get(state.params)
    assert dataset is not None
    assert len(dataset) == 97
    right = []
    for index in range(97):
        row = feed.eval_transform(dataset[index], np.random.default_rng(0))
        picture, label = np.asarray(row["image"])[None], row["label"]
        logits = np.asarray(task.logits(params, {}, {}, {"image": picture}))[0]
        right.append([label == logits.argmax(), label in np.argsort(-logits)[:5]])
    assert [got["top1"], got["top5"]] == [np.mean([r[k] for r in right]) for k in (0, 1)]
