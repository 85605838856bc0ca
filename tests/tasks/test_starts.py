"""Encoders that start from weights and train in part: students and fine-tuned networks."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from fd_jax import model_folder, settings, sharding
from fd_jax.data import global_batch
from fd_jax.errors import ConfigError
from fd_jax.models import trees
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.tasks.distill import DistillTask
from fd_jax.tasks.encoder import HELD
from fd_jax.training import program
from tests import tiny
from tests.cost.test_flops import convnext

LORA = {"lora.rank": 2, "lora.alpha": 6.0, "student.freeze_blocks": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, teacher):
    """A student of each family, by its name."""
    root = tmp_path_factory.mktemp("starts")
    spec = convnext(patch_size=8, widths=[16, 24], depths=[1, 2])
    encoder = jax.tree.map(lambda leaf: np.zeros(leaf.shape), spec.abstract()[1])
    model_folder.save(root / "convnext", spec, {"encoder": tiny.randomize(encoder, 1)})
    return {
        "vit": tiny.save_teacher(root / "vit", depth=3),
        "swin": tiny.save_swin(root / "swin"),
        "swin_v2": tiny.save_swin(root / "swin_v2", 2, position="shared_rpb"),
        "convnext": str(root / "convnext"),
        "student": tiny.save_student(root / "student"),
    }


def starting(teacher, folder, **fields):
    """A distillation whose student starts from a folder; all checks of a config pass."""
    config = tiny.config(teacher, **{"data.image_size": 32, "target.resample": "bilinear"})
    student = base.distillation(teacher="tiny", drop_path=0.2, init_from=folder).student
    config.student = {**student, "arch": {}}
    for name in [name for name in fields if name.startswith("student.arch.")]:
        config.student.arch[name.removeprefix("student.arch.")] = fields.pop(name)
    config.update_from_flattened_dict(fields)
    settings.check(config)
    return config


def tokens(spec, encoder, images):
    network = nnx.merge(spec.abstract()[0], encoder)
    return np.asarray(jax.jit(lambda x: network(x).tokens)(spec.normalize(images)))


@pytest.mark.parametrize("family", ["vit", "swin", "swin_v2", "convnext"])
def test_a_student_is_the_network_of_its_folder_at_the_size_of_the_data(
    family, folders, teacher, capsys
):
    config = starting(teacher, folders[family], **{"data.image_size": 64})
    task = DistillTask(config)
    initial = task.load_initial()
    spec, parts = model_folder.load(folders[family])
    assert task.student_spec.arch == {**spec.arch, "image_size": 64}
    assert task.student_spec.mean == spec.mean
    wanted, encoder = spec.resized(parts["encoder"], 64)
    images = tiny.batch(2, side=64)["image"]
    got = tokens(task.student_spec, initial["encoder"], images)
    np.testing.assert_array_equal(got, tokens(wanted, encoder, images))
    assert task.load_frozen().keys() == {"encoder"}
    said = capsys.readouterr().out
    assert f"init_from {folders[family]} (tiny):" in said
    assert "fresh    projector" in said and "from 32 px to 64 px" in said
    assert task.student_spec.source == "distilled by fd_jax from tiny, started from tiny"


def test_other_positions_start_fresh_and_are_reported(folders, teacher, capsys):
    config = starting(teacher, folders["vit"], **{"student.arch.position": "shared_rpb"})
    task = DistillTask(config)
    initial = task.load_initial()
    params = task.init(jax.random.key(0))[0]
    assert "rel_pos_bias" in params["encoder"] and "pos_embed" not in params["encoder"]
    missing = trees.paths(params["encoder"]) - trees.paths(initial["encoder"])
    assert missing == {"rel_pos_bias/table"} and "pos_embed" not in initial["encoder"]
    said = capsys.readouterr().out
    assert "fresh    encoder/rel_pos_bias/table, for 'shared_rpb' positions" in said
    assert "dropped  encoder/pos_embed" in said
    for part in ({"student.freeze_blocks": 1}, {"lora.rank": 2}):
        partly = starting(
            teacher, folders["vit"], **{"student.arch.position": "shared_rpb", **part}
        )
        with pytest.raises(ConfigError, match="starts fresh.*set student.freeze_blocks=0"):
            DistillTask(partly)


def test_a_shared_bias_is_copied_into_the_blocks(folders, teacher, capsys):
    task = DistillTask(starting(teacher, folders["student"], **{"student.arch.position": "rpb"}))
    initial = task.load_initial()
    said = capsys.readouterr().out
    assert "copied   the shared position bias into every block" in said
    assert "dropped  projector" in said and "fresh    projector" in said
    _, parts = model_folder.load(folders["student"])
    for block in initial["encoder"]["blocks"].values():
        table = block["attn"]["rel_pos_bias"]["table"]
        np.testing.assert_array_equal(table, parts["encoder"]["rel_pos_bias"]["table"])


@pytest.mark.parametrize(
    "family,fields,message",
    [
        (
            "vit",
            {"student.family": "swin", "student.arch.depths": (2, 1, 1)},
            "family is 'swin' in",
        ),
        (
            "vit",
            {"student.family": "vit", "student.arch.width": 64},
            "width is 64 in the config an",
        ),
        ("convnext", {"student.arch.position": "ape"}, "positions of its own kind only"),
        ("vit", {"student.arch.image_size": 48}, "data.image_size=32, but student.arch.image_size"),
        ("vit", {"data.image_size": 36}, "36 is not divisible by patch_size 8"),
        ("vit", {"student.freeze_blocks": 3}, "freeze_blocks=3, but the network has 3 blocks"),
        ("convnext", {"lora.rank": 2}, "no layer qkv and no proj in its blocks; it has fc1, fc2"),
    ],
)
def test_what_contradicts_the_folder_is_refused(family, fields, message, folders, teacher):
    with pytest.raises(ConfigError, match=message):
        DistillTask(starting(teacher, folders[family], **fields))


def test_the_description_of_the_config_may_agree_with_the_folder(folders, teacher):
    spec, _ = model_folder.load(folders["swin_v2"])
    same = {f"student.arch.{name}": spec.arch[name] for name in ("depths", "window", "image_size")}
    task = DistillTask(
        starting(teacher, folders["swin_v2"], **{"student.family": "swin_v2", **same})
    )
    assert task.student_spec.arch == spec.arch


def distilled(folders, teacher, family="vit", **fields):
    return DistillTask(starting(teacher, folders[family], **fields))


def tuned(folders, teacher, family="student", **fields):
    renamed = {name.replace("student.", "model."): value for name, value in fields.items()}
    config = tiny.fine_tuning(folders[family], **renamed)
    settings.check(config)
    return ClassifyTask(config)


def on_mesh(task, mesh_shape=(1, 1, 1)):
    """The program of a task, its first state, and its frozen weights."""
    data, fsdp, tensor = mesh_shape
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)
    run = program.build(task, task.config, mesh, steps_per_epoch=10, total_steps=100)
    state = run.create(jax.random.key(0), task.load_initial())
    return run, state, run.place_frozen(task.load_frozen())


def steps(task, mesh_shape=(1, 1, 1), count=2):
    """Trains on random batches. -> losses, the last state."""
    run, state, frozen = on_mesh(task, mesh_shape)
    placement = global_batch.Placement(run.mesh, task.config.batch_size)
    losses = []
    for step in range(count):
        batch = {**tiny.labelled_batch(seed=step), "stop": np.zeros(16, np.int32)}
        batch = placement.put({name: value[placement.rows] for name, value in batch.items()})
        state, metrics = run.train_step(state, frozen, batch, run.place_seed(0))
        total, count_ = jax.device_get(metrics["loss"])
        losses.append(total / count_)
    return np.array(losses), state


PARTS = {"frozen blocks": {"student.freeze_blocks": 1}, "updates": LORA}


@pytest.mark.parametrize(
    "part,make",
    [
        ("updates", distilled),
        ("frozen blocks", tuned),
        pytest.param("frozen blocks", distilled, marks=pytest.mark.slow),
        pytest.param("updates", tuned, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_is_held_stays_bit_for_bit_and_has_no_state(part, make, folders, teacher):
    task = make(folders, teacher, **PARTS[part])
    whole = make(folders, teacher)
    _, state = steps(task)
    held = trees.paths(task.load_frozen()[HELD])
    trained = trees.paths(state.params["encoder"])
    wanted = set(trees.paths(whole.init(jax.random.key(0))[0]["encoder"]))
    if part == "updates":
        assert held == wanted and all("/lora/" in path for path in trained)
    else:
        assert held | trained == wanted and not held & trained
        assert {path.split("/")[0] for path in held} >= {"patch_embed", "cls_token"}
        assert {path.split("/")[1] for path in held if path.startswith("blocks")} == {"0"}
    values = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert moments <= 2 * values + 4  # and two counters
    _, parts = task.export(state.params, state.extra)
    before = task._stored_encoder()
    assert trees.paths(parts["encoder"]) == wanted
    changed = {
        path
        for path in wanted
        if not np.array_equal(leaf_at(parts["encoder"], path), leaf_at(before, path))
    }
    layers = ("qkv/kernel", "proj/kernel", "fc1/kernel", "fc2/kernel")
    if part == "updates":
        assert changed == {path for path in wanted if path.endswith(layers)}
    else:
        assert changed == trained


def leaf_at(tree, path):
    return functools.reduce(lambda node, name: node[name], path.split("/"), tree)


@pytest.mark.slow
def test_updates_get_the_gradients_that_follow_from_those_of_the_kernels(folders, teacher):
    """With G the gradient of a merged kernel: dA = s G B^T and dB = s A^T G."""
    task = tuned(folders, teacher, **LORA)
    whole = tuned(folders, teacher)
    params = program.overlay(task.init(jax.random.key(0))[0], task.load_initial())
    params = {**params, "encoder": tiny.randomize(params["encoder"], 3, scale=0.1)}
    frozen = task.load_frozen()
    batch = whole.prepare(tiny.labelled_batch(), jax.random.key(5))
    _, parts = task.export(params, {})

    def gradients(task, params, frozen):
        return jax.jit(jax.value_and_grad(lambda p: task.loss(p, {}, frozen, batch)[0]))(params)

    loss, got = gradients(task, params, frozen)
    want_loss, full = gradients(whole, parts, {})
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    scale = 6.0 / 2
    for block in "01":
        for layer in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2"):
            path = f"blocks/{block}/{layer}"
            a, b = (np.float64(leaf_at(params["encoder"], f"{path}/lora/{n}")) for n in "ab")
            g = np.float64(leaf_at(full["encoder"], f"{path}/kernel")).reshape(len(a), -1)
            b, ours = b.reshape(2, -1), leaf_at(got["encoder"], f"{path}/lora")
            for name, value in (("a", scale * g @ b.T), ("b", scale * a.T @ g)):
                found = np.asarray(ours[name]).reshape(value.shape)
                np.testing.assert_allclose(found, value, atol=2e-5 * np.abs(value).max())


@pytest.mark.slow
def test_a_frozen_run_computes_fewer_flops(folders, teacher):
    """The compiler's count; that of the closed form is in tests/cost/test_flops.py."""
    counts = {}
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    for name, fields in {"whole": {}, **PARTS}.items():
        task = tuned(folders, teacher, **fields)
        run = program.build(task, task.config, mesh, steps_per_epoch=10, total_steps=100)
        counts[name] = run.compile_train_step().cost_analysis()["flops"]
    assert counts["frozen blocks"] < 0.75 * counts["whole"]
    assert counts["updates"] < 0.9 * counts["whole"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "swin_v2"])
def test_updates_of_some_blocks_train_alike_on_every_mesh(family, folders, teacher):
    fields = {**LORA, "student.freeze_blocks": 1}
    task = distilled(folders, teacher, family, **fields)
    alone, together = (steps(task, shape) for shape in ((1, 1, 1), (2, 2, 2)))
    np.testing.assert_allclose(together[0], alone[0], rtol=2e-6)
    kernel = "blocks/1/mlp/fc1/lora/a" if family == "vit" else "stages/1/blocks/0/mlp/fc1/lora/a"
    placed = leaf_at(together[1].params["encoder"], kernel).sharding.spec
    assert placed[0] == "fsdp"
    assert not any("/0/blocks/0/" in path for path in trees.paths(together[1].params["encoder"]))


@pytest.mark.slow
def test_parts_in_bfloat16_compute_what_the_whole_network_does(folders, teacher):
    """Kernels are held in the compute dtype, and everything else in float32."""
    fields = {"dtype": "bfloat16"}
    whole = tuned(folders, teacher, **fields)
    part = tuned(folders, teacher, **fields, **PARTS["frozen blocks"])
    held = part.load_frozen()[HELD]
    assert held["blocks"]["0"]["attn"]["qkv"]["kernel"].dtype == jnp.bfloat16
    assert held["blocks"]["0"]["norm1"]["scale"].dtype == np.float32
    params = program.overlay(whole.init(jax.random.key(0))[0], whole.load_initial())
    trained = {**params, "encoder": part._encoder.divide(params["encoder"])[0]}
    batch = tiny.labelled_batch()
    np.testing.assert_array_equal(
        jax.jit(part.logits)(trained, {}, part.load_frozen(), batch),
        jax.jit(whole.logits)(params, {}, {}, batch),
    )
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), part.load_frozen())
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), part.abstract_frozen())


SWIN_HELD = {
    1: {"patch_embed", "patch_norm", "stages/0/blocks/0", "stages/0/rel_pos_bias"},
    2: {"stages/0/blocks/1", "stages/0/downsample"},
    3: {"stages/1/blocks/0", "stages/1/rel_pos_bias", "stages/1/downsample"},
}


def test_what_the_first_blocks_read_is_held_with_them(folders, teacher):
    """Also the position bias that the blocks of a stage share, and the merging after them."""
    expected: set[str] = set()
    for blocks, more in SWIN_HELD.items():
        expected |= more
        task = distilled(folders, teacher, "swin_v2", **{"student.freeze_blocks": blocks})
        held = trees.paths(task.abstract_frozen()[HELD])
        every = trees.paths(task._encoder.shapes)
        assert held == {path for path in every if any(path.startswith(e) for e in expected)}
    task = distilled(folders, teacher, "convnext", **{"student.freeze_blocks": 1})
    held = trees.paths(task.abstract_frozen()[HELD])
    assert {path.rpartition("/")[0].partition("/blocks/")[0] for path in held} == {
        "patch_embed",
        "patch_norm",
        "stages/0",
    }
    task = distilled(folders, teacher, "student", **{"student.freeze_blocks": 1})
    assert "rel_pos_bias/table" in trees.paths(task.abstract_frozen()[HELD])
