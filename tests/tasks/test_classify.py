"""Fine-tuning and the linear probe: initial weights, losses, features and refused configs."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from configs import base
from fd_jax import inference, model_folder, optimizer
from fd_jax.data import mixing
from fd_jax.data.feed import Feed
from fd_jax.errors import ConfigError, DataError, ModelFolderError
from fd_jax.models import spec as specs
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.training import program
from tests import tiny
from tests.convert import oracles
from tests.models import test_vit
from tests.models.test_resize import scipy_rel_table

CLASSES = 10


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny.save_student(tmp_path_factory.mktemp("students") / "tiny")


def initialized(folder, **fields):
    """The task and its initial parameters, with a head large enough to compare logits."""
    task = ClassifyTask(tiny.fine_tuning(folder, **fields))
    params, extra = task.init(jax.random.key(0))
    params = program.overlay(params, task.load_initial())
    for name in ("head", "fc_norm"):
        if name in params:
            params[name] = tiny.randomize(params[name], 3)
    frozen = jax.tree.map(jnp.asarray, task.load_frozen())
    return task, params, extra, frozen


def beit_logits(folder, params, image_size, batch, where):
    """Logits of BeitForImageClassification with the student's weights; resizes its table itself."""
    spec, parts = model_folder.load(folder)
    encoder = parts["encoder"]
    grid, old = image_size // 8, spec.arch["image_size"] // 8
    table = encoder["rel_pos_bias"]["table"]
    if grid != old:
        table = scipy_rel_table(table, old, grid, extra=3)
    tensors = test_vit.to_hf(encoder, spec.arch["depth"], shared=True)
    tensors.pop("encoder.relative_position_bias.relative_position_bias_table")
    tensors = {f"beit.{name}": value for name, value in tensors.items() if "layernorm." not in name}
    for i in range(spec.arch["depth"]):
        at = f"beit.encoder.layer.{i}.attention.attention.relative_position_bias"
        tensors[f"{at}.relative_position_bias_table"] = table
    tensors |= {
        "beit.pooler.layernorm.weight": params["fc_norm"]["scale"],
        "beit.pooler.layernorm.bias": params["fc_norm"]["bias"],
        "classifier.weight": np.transpose(params["head"]["kernel"]),
        "classifier.bias": params["head"]["bias"],
    }
    config = transformers.BeitConfig(
        **oracles.config_fields({**spec.arch, "image_size": image_size}),
        use_relative_position_bias=True,
        use_mean_pooling=True,
        num_labels=CLASSES,
    )
    model = oracles.pretrained(transformers.BeitForImageClassification, config, tensors, where)
    images = (batch["image"] / 255.0 - specs.IMAGENET_MEAN) / specs.IMAGENET_STD
    return oracles.run(lambda x: model(x).logits, images.astype(np.float32))


@pytest.mark.parametrize("image_size", [32, 48])
def test_logits_equal_those_of_beit(student, tmp_path, image_size):
    task, params, extra, frozen = initialized(student, **{"data.image_size": image_size})
    batch = tiny.labelled_batch(side=image_size)
    want = beit_logits(student, params, image_size, batch, tmp_path)
    got = task.logits(params, extra, frozen, batch)
    assert test_vit.relative(got, want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [224, 288])
def test_full_size_logits_equal_those_of_beit(tmp_path, image_size):
    folder = tmp_path / "student"
    arch = base.student({**base.VIT_B16, "patch_size": 8}, image_size=112)
    spec = specs.ModelSpec("vit", arch, source="distilled")
    model_folder.save(folder, spec, {"encoder": test_vit.random_params(spec)})
    side = image_size // 2  # the grids of patch 16 at 224 and 288, at a quarter of the work
    task, params, extra, frozen = initialized(str(folder), **{"data.image_size": side})
    batch = tiny.labelled_batch(size=2, side=side)
    want = beit_logits(str(folder), params, side, batch, tmp_path / "hf")
    assert test_vit.relative(task.logits(params, extra, frozen, batch), want) < 1e-4


@pytest.mark.parametrize(
    "change",
    [{"model.final_norm": True}, {"model.pooling": "mean"}, {"model.pooling": "norm_mean"}],
    ids=str,
)
def test_a_wrong_norm_or_pooling_changes_the_logits(student, tmp_path, change):
    """Negative control: keeps the trained final norm, or swaps the order of norm and mean."""
    _, right, _, _ = initialized(student)
    task, params, extra, frozen = initialized(student, **change)
    params = {**params, "head": right["head"]}
    batch = tiny.labelled_batch()
    want = beit_logits(student, right, 32, batch, tmp_path)
    assert test_vit.relative(task.logits(params, extra, frozen, batch), want) > 1e-3


def test_a_fresh_head_is_initialized_like_the_original(student):
    task = ClassifyTask(tiny.fine_tuning(student, **{"model.classes": 1000}))
    params, _ = task.init(jax.random.key(0))
    assert set(params) == {"encoder", "fc_norm", "head"}
    np.testing.assert_array_equal(params["fc_norm"]["scale"], 1)
    assert float(jnp.std(params["head"]["kernel"])) == pytest.approx(2e-5, rel=0.02)
    np.testing.assert_array_equal(params["head"]["bias"], 0)


def test_load_initial_prints_what_was_resized_copied_and_dropped(student, capsys):
    ClassifyTask(tiny.fine_tuning(student, **{"data.image_size": 48})).load_initial()
    output = capsys.readouterr().out
    assert "resized  position tables from 32 px to 48 px" in output
    assert "copied   the shared position bias into every block" in output
    assert "dropped  encoder/norm, projector" in output
    assert "fresh    fc_norm, head" in output


def test_parameter_counts_equal_the_papers():
    """See docs/reference.md#parameter-counts: 1000 classes, a table per block."""
    for shape, count in ((base.VIT_B16, 86_530_984), (base.VIT_L14, 304_335_336)):
        config = base.fine_tuning(drop_path=0.1, layer_decay=0.65, peak_lr=1e-3, floor_lr=1e-6)
        spec = specs.ModelSpec("vit", base.student(shape, image_size=224), source="distilled")
        params, _ = jax.eval_shape(ClassifyTask(config, init_spec=spec).init, jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


@pytest.mark.parametrize(
    "shape,decay,lowest", [(base.VIT_B16, 0.65, 3.697206e-3), (base.VIT_L14, 0.75, 7.525435e-4)]
)
def test_every_parameter_has_the_published_layer_decay(shape, decay, lowest):
    """The full expected table, written out from docs/reference.md#layer-decay."""
    config = base.fine_tuning(drop_path=0.1, layer_decay=decay, peak_lr=1e-3, floor_lr=1e-6)
    spec = specs.ModelSpec("vit", base.student(shape, image_size=224), source="distilled")
    task = ClassifyTask(config, init_spec=spec)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    family = specs.FAMILIES["vit"]
    scales = optimizer.layer_scales(
        params,
        lambda path: family.layer_id(path.removeprefix("encoder/"), task.spec.arch),
        last=shape["depth"] + 1,
        decay=decay,
    )
    flat = {
        optimizer.path_name(path): scale
        for path, scale in jax.tree_util.tree_leaves_with_path(scales)
    }
    expected = {}
    last = shape["depth"] + 1
    for name in ("cls_token", "patch_embed/kernel", "patch_embed/bias"):
        expected[f"encoder/{name}"] = decay**last
    for i in range(shape["depth"]):
        for name in (
            *("norm1/scale", "norm1/bias", "norm2/scale", "norm2/bias", "gamma_1", "gamma_2"),
            *("attn/qkv/kernel", "attn/q_bias", "attn/v_bias", "attn/rel_pos_bias/table"),
            *("attn/proj/kernel", "attn/proj/bias", "mlp/fc1/kernel", "mlp/fc1/bias"),
            *("mlp/fc2/kernel", "mlp/fc2/bias"),
        ):
            expected[f"encoder/blocks/{i}/{name}"] = decay ** (last - i - 1)
    for name in ("fc_norm/scale", "fc_norm/bias", "head/kernel", "head/bias"):
        expected[name] = 1.0
    assert flat == pytest.approx(expected)
    assert len(flat) == {12: 199, 24: 391}[shape["depth"]]
    assert flat["encoder/cls_token"] == pytest.approx(lowest, rel=1e-6)


NO_MIXING = {"mixing.mixup": 0.0, "mixing.cutmix": 0.0, "mixing.erasing": 0.0}


def test_loss_equals_torch_with_label_smoothing(student):
    task, params, extra, frozen = initialized(student, **NO_MIXING, **{"model.drop_path": 0.0})
    raw = tiny.labelled_batch()
    loss, _ = task.loss(params, extra, frozen, task.prepare(raw, jax.random.key(1)))
    logits = torch.from_numpy(np.array(task.logits(params, extra, frozen, raw)))
    labels = torch.from_numpy(raw["label"]).long()
    want = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    np.testing.assert_allclose(loss, float(want), rtol=2e-6)


def test_mixing_commutes_with_normalisation(student):
    task, *_ = initialized(student, **{"mixing.erasing": 0.0})
    raw, key = tiny.labelled_batch(), jax.random.key(1)
    prepared = task.prepare(raw, key)
    target = mixing.smooth_one_hot(raw["label"], CLASSES, 0.1)
    normalised = task.spec.normalize(raw["image"])
    mixed, _ = task.mixing(jax.random.split(key, 3)[0], normalised, target)
    np.testing.assert_allclose(prepared["image"], mixed, atol=1e-5)


def test_mixing_erasing_and_drop_path_are_on_in_training_and_off_in_evaluation(student):
    task, params, extra, frozen = initialized(student)
    raw = tiny.labelled_batch()
    prepared = task.prepare(raw, jax.random.key(1))
    assert prepared["drops"].shape == (16, 2, 2)
    assert prepared["target"].shape == (16, CLASSES)
    plain = task.spec.normalize(raw["image"])
    assert np.abs(prepared["image"] - plain).max() > 0.1
    again = task.prepare(raw, jax.random.key(1))
    np.testing.assert_array_equal(prepared["image"], again["image"])
    other = task.prepare(raw, jax.random.key(2))
    assert np.abs(prepared["image"] - other["image"]).max() > 0.1
    first = task.evaluate(params, extra, frozen, raw)
    assert first == task.evaluate(params, extra, frozen, raw)


def test_reference_quirks_evaluate_with_the_pixel_statistics_of_clip(student):
    quirky, params, extra, frozen = initialized(student, reference_quirks=True)
    raw = tiny.labelled_batch()
    swapped = {**raw, "image": raw["image"]}
    shifted = (raw["image"] / 255.0 - specs.CLIP_MEAN) / specs.CLIP_STD
    as_imagenet = (shifted * specs.IMAGENET_STD + specs.IMAGENET_MEAN) * 255.0
    plain, _, _, _ = initialized(student)
    want = plain.logits(params, extra, frozen, {**swapped, "image": as_imagenet})
    got = quirky.logits(params, extra, frozen, raw)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(got - plain.logits(params, extra, frozen, raw)).max() > 1e-3
    # Training keeps the network's own statistics.
    np.testing.assert_array_equal(
        quirky.prepare(raw, jax.random.key(0))["image"],
        plain.prepare(raw, jax.random.key(0))["image"],
    )


def probe_fields(**fields):
    return {
        **NO_MIXING,
        "model.trains": "head",
        "model.head_scale": 1.0,
        "model.untie_positions": False,
        "mixing.smoothing": 0.0,
        "optim.name": "lars",
        **fields,
    }


def test_probe_equals_torch_batch_norm_and_linear(student):
    """Two training batches, then evaluation with the running statistics."""
    task, params, extra, frozen = initialized(student, **probe_fields())
    assert set(params) == {"head"}
    assert set(frozen) == {"encoder"}
    norm = torch.nn.BatchNorm1d(32, eps=1e-6, momentum=0.1, affine=False)
    linear = torch.nn.Linear(32, CLASSES)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(np.array(params["head"]["kernel"]).T))
        linear.bias.copy_(torch.from_numpy(np.array(params["head"]["bias"])))
    for seed in range(2):
        raw = tiny.labelled_batch(seed=seed)
        features = torch.from_numpy(np.array(task.features(params, {}, frozen, raw)))
        want = torch.nn.functional.cross_entropy(
            linear(norm(features)), torch.from_numpy(raw["label"]).long()
        )
        prepared = task.prepare(raw, jax.random.key(seed))
        loss, (extra, _) = task.loss(params, extra, frozen, prepared)
        np.testing.assert_allclose(loss, want.item(), rtol=1e-5)
    np.testing.assert_allclose(extra["mean"], norm.running_mean.numpy(), atol=1e-6)
    np.testing.assert_allclose(extra["var"], norm.running_var.numpy(), rtol=1e-5)
    norm.eval()
    with torch.no_grad():
        want = linear(norm(features)).numpy()
    np.testing.assert_allclose(
        task.logits(params, extra, frozen, raw), want, atol=1e-5 * np.abs(want).max()
    )


def test_probe_features_are_the_normalised_mean_before_the_trained_norm(student):
    """See docs/reference.md#probe-head: mean patch before the final norm, fc_norm (1, 0)."""
    task, params, _, frozen = initialized(student, **probe_fields())
    model = inference.load_model(student)
    raw = tiny.labelled_batch()
    definition, _ = model.spec.abstract()
    network = nnx.merge(definition, model.params["encoder"])
    patches = np.asarray(network(model.preprocess(raw["image"]), final_norm=False).patches)
    mean = patches.mean(1).astype(np.float64)
    centred = mean - mean.mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(task.features(params, {}, frozen, raw), want, atol=1e-4)


def test_no_gradient_reaches_the_probed_encoder(student):
    task, params, extra, frozen = initialized(student, **probe_fields())
    batch = task.prepare(tiny.labelled_batch(), jax.random.key(0))
    grads = jax.grad(lambda frozen: task.loss(params, extra, frozen, batch)[0])(frozen)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_exported_probe_gives_the_same_logits(student, tmp_path):
    """The probe's BatchNorm is folded into the weights of the exported head."""
    task, params, extra, frozen = initialized(student, **probe_fields())
    rng = np.random.default_rng(0)
    extra = {"mean": rng.normal(size=32) * 0.1, "var": rng.uniform(0.5, 2, size=32)}
    extra = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), extra)
    spec, parts = task.export(params, extra)
    model_folder.save(tmp_path / "probed", spec, parts)
    fields = {"model.head": "keep", "model.untie_positions": False}
    again = ClassifyTask(tiny.fine_tuning(str(tmp_path / "probed"), **fields))
    kept = program.overlay(again.init(jax.random.key(1))[0], again.load_initial())
    raw = tiny.labelled_batch()
    np.testing.assert_allclose(
        again.logits(kept, {}, {}, raw), task.logits(params, extra, frozen, raw), atol=1e-4
    )


def test_unlabelled_or_too_many_classes_are_refused(student, embedded_data, tmp_path):
    config = tiny.fine_tuning(student, **{"model.classes": 7, "data.data_dir": embedded_data})
    with pytest.raises(DataError, match=r"digits/train has 10 classes.*model.classes=7"):
        ClassifyTask(config).check_data(Feed(**config.data))
    (tmp_path / "a.png").write_bytes(b"")
    config.data.update(name=f"folder:{tmp_path}", eval_split="")
    with pytest.raises(DataError, match="has no class labels"):
        ClassifyTask(config).check_data(Feed(**config.data))


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"data.image_size": 36}, "36 is not divisible by patch_size 8; use 32 or 40"),
        ({"model.pooling": "max"}, "model.pooling='max'|pooling='max'"),
        ({"model.head": "keep"}, "has a head of 0 classes"),
        ({"batch_size": 15}, "batch_size=15 is odd; use 16"),
        ({"mixing.mixup": -1.0}, "mixing.mixup=-1.0"),
        ({"init_from": "nowhere"}, "no model folder at nowhere"),
        ({"init_from": ""}, "init_from is empty"),
        ({"init_from": "", "model.trains": "head", "model.family": "vit"}, "probes a trained"),
    ],
    ids=str,
)
def test_impossible_configs_are_refused(student, fields, message):
    with pytest.raises((ConfigError, ModelFolderError), match=message):
        ClassifyTask(tiny.fine_tuning(**{"init_from": student, **fields}))


def test_keeping_a_head_of_another_size_is_refused(student, tmp_path):
    teacher = tiny.save_teacher(tmp_path / "deit", classes=7)
    fields = {"model.head": "keep", "model.pooling": "cls", "model.final_norm": True}
    with pytest.raises(ConfigError, match=r"head of 7 classes.*model.classes=10"):
        ClassifyTask(tiny.fine_tuning(teacher, **fields))
    assert ClassifyTask(tiny.fine_tuning(teacher, **{**fields, "model.classes": 7})).load_initial()


def test_keeping_a_missing_final_norm_is_refused(tmp_path):
    folder = tiny.save_teacher(tmp_path / "plain", final_norm=False)
    with pytest.raises(ConfigError, match="ends without one"):
        ClassifyTask(tiny.fine_tuning(folder, **{"model.final_norm": True}))


def test_fine_tuning_keeps_pre_norm_and_absolute_positions(tmp_path):
    """Fine-tuning a teacher directly, without distillation: its architecture does not change."""
    folder = tiny.save_teacher(tmp_path / "clip", ln_pre=True, activation="quick_gelu")
    task = ClassifyTask(tiny.fine_tuning(folder, **{"data.image_size": 48}))
    assert task.spec.arch["position"] == "ape"
    initial = task.load_initial()
    assert initial["encoder"]["pos_embed"].shape == (1, 37, 48)
    assert "ln_pre" in initial["encoder"]
