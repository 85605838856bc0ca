"""Segmentation: training steps against torch, the frozen encoder, the recipe, the refusals."""

import dataclasses
import functools
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import torch
from torch.nn import functional
from transformers.models.beit import modeling_beit

from configs import base
from fd_jax import inference, model_folder, optimizer, sharding
from fd_jax.data import elements
from fd_jax.errors import ConfigError, DataError
from fd_jax.models import spec as specs
from fd_jax.tasks.segment import SegmentTask
from fd_jax.training import program
from tests import tiny
from tests.models import test_segmentation as modules
from tests.models import vits

SHAPE = {"image_size": 32, "patch_size": 8, "width": 16, "depth": 6, "heads": 2, "mlp_width": 32}
STEPS = 5
RECIPE = {
    "segment.channels": modules.WIDTH,
    "segment.auxiliary_channels": modules.AUXILIARY,
    "segment.drop_path": 0.0,
    "segment.dropout": 0.0,
    "steps": STEPS,
    "batch_size": 4,
    "optim.lr_batch": 4,
    "optim.peak_lr": 1e-2,
    "optim.weight_decay": 2.0,
    # Where a gradient is 0 but for rounding, as that of a bias in front of a BatchNorm, Adam would
    # scale the rounding up to a whole step.
    "optim.eps": 1e-4,
}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny.save_student(tmp_path_factory.mktemp("students") / "tiny", depth=3)


def initialized(folder, **fields):
    """The task, its parameters with nothing at its neutral start, its statistics and the rest."""
    task = SegmentTask(tiny.segmentation(folder, **fields))
    params, extra = task.init(jax.random.key(0))
    params = program.overlay(params, task.load_initial())
    params["segmenter"] = tiny.randomize(params["segmenter"], 3)
    frozen = jax.tree.map(jnp.asarray, task.load_frozen())
    return task, params, extra, frozen


# Whole steps


def batches():
    return [tiny.segmented_batch(4, classes=modules.CLASSES, seed=seed) for seed in range(STEPS)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The folder of an encoder, and torch's modules with the encoder's and random weights."""
    folder = tmp_path_factory.mktemp("whole")
    spec = vits.student_spec(SHAPE, "rpb")
    encoder = vits.random_params(spec)
    model_folder.save(folder / "model", spec, {"encoder": encoder})
    beit = vits.beit(spec, encoder, folder / "beit", shared=False).double()
    parts = {
        "neck": modeling_beit.BeitFPNNeck(modules.BEIT),
        "decoder": modeling_beit.BeitUperHead(modules.BEIT),
        "auxiliary": modeling_beit.BeitFCNHead(modules.BEIT),
    }
    parts = {name: modules.randomized(module).train() for name, module in parts.items()}
    segmenter = {n: jax.tree.map(np.array, modules.tensors(m, "data")) for n, m in parts.items()}
    return str(folder / "model"), segmenter, torch_steps(beit, parts, folder / "after")


def torch_steps(beit, parts, folder):
    """Five steps in torch: (losses, encoder, segmenter and its statistics afterwards)."""
    groups = []
    for name, tensor in beit.named_parameters():
        number = int(name.split(".")[1]) + 1 if name.startswith("layers.") else 0
        decays = tensor.ndim > 1 and not name.endswith(".bias")
        if not name.startswith("layernorm"):  # the final norm, which a UPerNet leaves out
            groups.append((tensor, 0.65 ** (SHAPE["depth"] + 1 - number), decays))
    for module in parts.values():
        groups += [(tensor, 1.0, tensor.ndim > 1) for tensor in module.parameters()]
    adamw = torch.optim.AdamW(
        [{"params": [tensor], "weight_decay": 2.0 * decays} for tensor, _, decays in groups],
        eps=1e-4,
    )
    found = []
    for number, batch in enumerate(batches()):
        pixels = (batch["image"] / 255.0 - specs.IMAGENET_MEAN) / specs.IMAGENET_STD
        hidden = beit(modules.to_torch(pixels), output_hidden_states=True).hidden_states
        maps = [hidden[block + 1][:, 1:].mT.reshape(4, -1, 4, 4) for block in (1, 2, 3, 5)]
        levels = parts["neck"](maps)
        label = torch.from_numpy(batch["mask"].astype(np.int64))
        main, auxiliary = (
            functional.cross_entropy(
                functional.interpolate(parts[name](levels), label.shape[1:], mode="bilinear"),
                label,
                ignore_index=255,
                reduction="none",
            ).mean()
            for name in ("decoder", "auxiliary")
        )
        loss = main + 0.4 * auxiliary
        adamw.zero_grad()
        loss.backward()
        # mmcv's schedule: two steps of warm-up from a tenth, to 0 after five steps.
        factor = 1 - (1 - number / 2) * 0.9 if number < 2 else 1.0
        for group, (_, scale, _) in zip(adamw.param_groups, groups, strict=True):
            group["lr"] = 1e-2 * scale * factor * (1 - number / STEPS)
        adamw.step()
        found.append(loss.item())
    beit.save_pretrained(folder)  # under the names of published files
    encoder = safetensors.numpy.load_file(folder / "model.safetensors")
    both = {name: modules.tensors(module, "data") for name, module in parts.items()}
    return found, encoder, both


@pytest.fixture(scope="module")
def gradients(start):
    """The compiled gradient of a step, which recipes that differ in the optimizer share."""
    task = SegmentTask(tiny.segmentation(start[0], **RECIPE))
    compute = jax.value_and_grad(task.loss, has_aux=True)

    @jax.jit
    def run(params, extra, batch):
        return compute(params, extra, {}, task.prepare(batch, jax.random.key(0)))

    return run


def our_steps(gradients, folder, segmenter, **fields):
    """The same five steps here: losses, parameters and statistics."""
    task = SegmentTask(tiny.segmentation(folder, **{**RECIPE, **fields}))
    params = {name: parts[0] for name, parts in segmenter.items()}
    params = {**task.load_initial(), "segmenter": params}
    extra = {name: parts[1] for name, parts in segmenter.items()}
    tx, _ = task.optimizer(params, steps_per_epoch=10, total_steps=STEPS)
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for batch in batches():
        (loss, (extra, _)), grads = gradients(params, extra, batch)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        found.append(float(loss))
    return found, params, extra


def difference(found, params, extra, want):
    """The largest relative difference of losses, parameters and statistics."""
    want_losses, want_encoder, want_segmenter = want
    norm = {"scale": np.ones(16), "bias": np.zeros(16)}
    encoder = vits.to_hf({**params["encoder"], "norm": norm}, SHAPE["depth"], shared=False)
    pairs = [(v, want_encoder[n]) for n, v in encoder.items() if not n.startswith("layernorm.")]
    for name, (weights, statistics) in want_segmenter.items():
        for ours, theirs in ((params["segmenter"], weights), (extra, statistics)):
            pairs += zip(jax.tree.leaves(ours[name]), jax.tree.leaves(theirs), strict=True)
    return max(modules.relative(found, want_losses), *(modules.relative(a, b) for a, b in pairs))


@pytest.mark.slow
def test_five_training_steps_equal_torch(start, gradients):
    folder, segmenter, want = start
    assert want[0][-1] < want[0][0]
    assert difference(*our_steps(gradients, folder, segmenter), want) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        {"optim.decay_positions": False},
        {"optim.layer_decay": 0.6},
        {"optim.polynomial": "mmengine"},
        {"optim.warmup_factor": 0.2},
    ],
    ids=str,
)
def test_wrong_recipes_do_not_equal_torch(start, gradients, wrong):
    folder, segmenter, want = start
    assert difference(*our_steps(gradients, folder, segmenter, **wrong), want) > 1e-3


def test_ignored_pixels_and_padding_do_not_teach(student):
    """Their colours and labels change no gradient of the decoder's last layer."""
    task, params, extra, frozen = initialized(student, **LINEAR)

    @jax.jit
    def gradients(batch):
        prepared = task.prepare(batch, jax.random.key(0))
        return jax.grad(lambda p: task.loss(p, extra, frozen, prepared)[0])(params)

    batch = tiny.segmented_batch()
    batch["weight"][5:] = 0
    other = {**batch, "mask": batch["mask"].copy()}
    other["mask"][5:] = 0
    jax.tree.map(np.testing.assert_array_equal, gradients(batch), gradients(other))
    other["mask"][0] = 255
    changed = jax.tree.leaves(gradients(other)), jax.tree.leaves(gradients(batch))
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(*changed, strict=True))


# The linear decoder

LINEAR = {"segment.decoder": "linear", "segment.auxiliary_channels": 0, "segment.trains": "head"}


@pytest.mark.slow
def test_linear_decoder_equals_torch_on_the_normalised_map(student):
    """Two training batches, then evaluation with the running statistics."""
    task, params, extra, frozen = initialized(student, **LINEAR)
    assert set(params) == {"segmenter"} and set(frozen) == {"encoder"}
    decoder = params["segmenter"]["decoder"]
    norm, linear = torch.nn.BatchNorm2d(32), torch.nn.Conv2d(32, 5, 1)
    with torch.no_grad():
        for layer, ours in ((norm, "norm"), (linear, "classifier")):
            layer.bias.copy_(torch.from_numpy(np.array(decoder[ours]["bias"])))
        norm.weight.copy_(torch.from_numpy(np.array(decoder["norm"]["scale"])))
        kernel = np.array(decoder["classifier"]["kernel"])
        linear.weight.copy_(torch.from_numpy(kernel.transpose(3, 2, 0, 1)))
    model = inference.load_model(student)
    for seed in range(2):
        raw = tiny.segmented_batch(seed=seed)
        patches = np.asarray(model(model.preprocess(raw["image"])).patches)
        logits = linear(norm(torch.from_numpy(patches.reshape(8, 4, 4, 32)).permute(0, 3, 1, 2)))
        want = functional.cross_entropy(
            functional.interpolate(logits, (32, 32), mode="bilinear"),
            torch.from_numpy(raw["mask"].astype(np.int64)),
            ignore_index=255,
            reduction="none",
        )
        prepared = task.prepare(raw, jax.random.key(seed))
        loss, (extra, _) = task.loss(params, extra, frozen, prepared)
        np.testing.assert_allclose(loss, want.mean().item(), rtol=1e-5)
    got = task.features(params, {}, frozen, raw)
    np.testing.assert_allclose(got, patches.mean(axis=1), atol=1e-5)
    norm.eval()
    with torch.no_grad():
        want = linear(norm(torch.from_numpy(patches.reshape(8, 4, 4, 32)).permute(0, 3, 1, 2)))
    got = task.predict(params, extra, frozen, raw)
    np.testing.assert_allclose(got, want.permute(0, 2, 3, 1), atol=1e-5)
    without_norm = model.spec.abstract()[0]
    raw_map = nnx.merge(without_norm, model.params["encoder"])(
        model.preprocess(raw["image"]), final_norm=False
    )
    assert np.abs(np.asarray(raw_map.patches) - patches).max() > 0.1


@pytest.mark.slow
def test_no_gradient_reaches_a_frozen_encoder(student):
    task, params, extra, frozen = initialized(student, **LINEAR)
    batch = task.prepare(tiny.segmented_batch(), jax.random.key(0))
    assert "drops" not in batch
    grads = jax.grad(lambda frozen: task.loss(params, extra, frozen, batch)[0])(frozen)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert not task.trains_encoder


# Randomness, meshes, evaluation and export


@pytest.mark.slow
def test_drops_are_on_in_training_and_off_in_evaluation(student):
    task, params, extra, frozen = initialized(student)
    raw = tiny.segmented_batch()
    first, again, other = (task.prepare(raw, jax.random.key(seed)) for seed in (0, 0, 1))
    assert first["channel_drops"].shape == (8, 14) and first["drops"].shape == (8, 3, 2)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    loss = jax.jit(lambda batch: task.loss(params, extra, frozen, batch)[0])
    assert loss(first) == loss(again)
    for name in ("channel_drops", "drops"):
        assert abs(loss({**first, name: other[name]}) - loss(first)) > 1e-4, name
    predict = jax.jit(task.predict)
    want = predict(params, extra, frozen, raw)
    assert want.shape == (8, 16, 16, 5) and want.dtype == jnp.float32
    only = {"image": raw["image"]}
    np.testing.assert_array_equal(predict(params, extra, frozen, only), want)


def run_steps(mesh_shape, folder, steps=2):
    """Losses of some steps with all randomness on, the final state, and logits of a batch."""
    config = tiny.segmentation(folder)
    data, fsdp = mesh_shape
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, devices=jax.devices()[: data * fsdp])
    task = SegmentTask(config)
    run = program.build(task, config, mesh, steps_per_epoch=10, total_steps=10)
    state = run.create(jax.random.key(0), task.load_initial())
    found, placement = [], sharding.batch_sharding(mesh)
    for number in range(steps):
        host = {**tiny.segmented_batch(seed=number), "stop": np.zeros(8, np.int32)}
        batch = {name: jax.device_put(value, placement) for name, value in host.items()}
        state, metrics = run.train_step(state, {}, batch, run.place_seed(0))
        found.append(float(metrics["loss"][0] / metrics["loss"][1]))
    images = {"image": jax.device_put(tiny.segmented_batch(seed=9)["image"], placement)}
    return np.array(found), state, run.predict(state.params, state.extra, {}, images)


@pytest.mark.slow
def test_a_mesh_gives_the_losses_statistics_and_logits_of_one_device(student):
    losses, state, logits = run_steps((1, 1), student)
    others, other, other_logits = run_steps((4, 2), student)
    np.testing.assert_allclose(others, losses, rtol=2e-6)
    np.testing.assert_allclose(other_logits, logits, atol=1e-4)
    assert len(other_logits.sharding.device_set) == 8
    for got, want in zip(jax.tree.leaves(other.extra), jax.tree.leaves(state.extra), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max() + 1e-6)


def test_evaluation_counts_labelled_pixels_only(student):
    task, params, extra, frozen = initialized(student, **LINEAR)
    batch = tiny.segmented_batch()
    batch["weight"][6:] = 0
    metrics = task.evaluate(params, extra, frozen, batch)
    logits = np.asarray(task.predict(params, extra, frozen, batch)).transpose(0, 3, 1, 2)
    resized = functional.interpolate(torch.from_numpy(logits), (32, 32), mode="bilinear")
    chosen, mask = resized.argmax(1).numpy()[:6], batch["mask"][:6]
    counted = mask != 255
    assert metrics["accuracy"] == ((chosen == mask)[counted].sum(), counted.sum())
    assert metrics["loss"][1] == 6


@pytest.mark.parametrize("fields", [{}, LINEAR], ids=["upernet", "linear"])
def test_exported_folder_has_the_network_that_was_trained(student, fields, tmp_path):
    task, params, extra, frozen = initialized(student, **fields)
    extra = tiny.randomize(extra, 4, scale=0.1)
    model_folder.save(tmp_path / "model", *task.export(params, extra))
    spec, parts = model_folder.load(tmp_path / "model")
    assert set(parts) == {"encoder", "segmenter", "segmenter_statistics"}
    assert spec.arch["final_norm"] == bool(fields)
    assert spec.segmenter == {
        "classes": 5,
        "neck": "none" if fields else "pyramid",
        "decoder": "linear" if fields else "upernet",
        "channels": 8,
        "auxiliary_channels": 0 if fields else 6,
        "dropout": 0.1,
        "blocks": [2] if fields else [0, 0, 1, 2],
    }
    raw = tiny.segmented_batch()
    encoder = nnx.merge(spec.abstract()[0], parts["encoder"])
    maps = encoder.intermediates(spec.normalize(raw["image"]), spec.segmenter["blocks"])
    if encoder.norm is not None:
        maps = [dataclasses.replace(each, tokens=encoder.norm(each.tokens)) for each in maps]
    segmenter = nnx.merge(spec.abstract_segmenter()[0], parts["segmenter"])
    got = jax.jit(segmenter)(maps, parts["segmenter_statistics"]).logits
    want = jax.jit(task.predict)(params, extra, frozen, raw)
    np.testing.assert_allclose(got, want, atol=5e-6 * np.abs(want).max())


# The recipe


@pytest.mark.slow
def test_pictures_of_another_size_are_predicted_with_resized_positions(student):
    """Against the folder's own resizing on the host; the position bias of the network matters."""
    task, params, extra, frozen = initialized(student)
    image = tiny.segmented_batch(2, classes=modules.CLASSES, seed=0)["image"][:, :24]
    image = np.concatenate([image, image[:, ::-1]], axis=2)
    got = jax.jit(task.predict)(params, extra, frozen, {"image": image})
    host = jax.tree.map(np.asarray, params["encoder"])
    assert image.shape[1:3] == (24, 64)
    spec, encoder = task.spec.resized(host, (24, 64))
    parts = {**params, "encoder": encoder, "segmenter_statistics": extra}
    logits = jax.jit(functools.partial(inference.segmenter_logits, spec))
    np.testing.assert_allclose(got, logits(parts, spec.normalize(image)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "swin_v2"])
def test_every_parameter_has_its_learning_rate_and_decay(family):
    four = {"depths": [1, 1, 2, 1], "heads": [2, 2, 2, 2], "patch_size": 2, "window": 4}
    four["pretrained_windows"] = [0] * 4
    spec = tiny.teacher_spec(depth=3) if family == "vit" else tiny.swin_spec(2, **four)
    task = SegmentTask(tiny.segmentation(), init_spec=spec)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    scales = recorded_scales(task, params)
    depth = task.encoder.depth
    np.testing.assert_allclose(list(scales["segmenter"].values()), 1, rtol=1e-4)
    want = [round(0.65 ** (depth + 1 - number), 4) for number in range(depth + 1)]
    found = {round(scale, 4) for scale in scales["encoder"].values()}
    np.testing.assert_allclose(sorted(found), want, atol=2e-4)
    first = "cls_token" if family == "vit" else "patch_norm/scale"
    assert scales["encoder"][f"encoder/{first}"] == pytest.approx(want[0], abs=1e-4)


def recorded_scales(task, params):
    """Scale of the learning rate by part and path, as one step of the optimizer shows it."""
    tx, schedule = task.optimizer(params, steps_per_epoch=10, total_steps=100)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), params)
    zeros = jax.tree.map(np.zeros_like, ones)
    updates, _ = jax.jit(tx.update)(ones, tx.init(zeros), zeros)
    found = {part: {} for part in params}
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        name = optimizer.path_name(path)
        rate = float(-leaf.reshape(-1)[0] / schedule(0))
        found[name.partition("/")[0]][name] = rate
    return found


def decayed(task):
    """Paths of the parameters with weight decay, which a step without gradients shows."""
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    tx, _ = task.optimizer(params, steps_per_epoch=10, total_steps=100)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), params)
    updates, _ = jax.jit(tx.update)(jax.tree.map(np.zeros_like, ones), tx.init(ones), ones)
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    return {optimizer.path_name(path) for path, leaf in leaves if np.any(leaf)}


@pytest.mark.slow
def test_positions_are_decayed_as_in_the_sources_and_can_be_spared():
    spec = tiny.teacher_spec(depth=3, registers=1)
    named = {f"encoder/{name}" for name in ("cls_token", "pos_embed", "register_tokens")}
    every = decayed(SegmentTask(tiny.segmentation(), init_spec=spec))
    spared = tiny.segmentation(**{"optim.decay_positions": False})
    assert every - decayed(SegmentTask(spared, init_spec=spec)) == named
    assert "segmenter/decoder/fusion/conv/kernel" in every
    assert not any(name.endswith(("bias", "scale", "gamma_1")) for name in every)


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_positions_of_a_swin_are_spared_either_way(version):
    four = {"depths": [1, 1, 2, 1], "heads": [2, 2, 2, 2], "patch_size": 2, "window": 4}
    if version == 2:
        four["pretrained_windows"] = [0] * 4
    spec = tiny.swin_spec(version, **four)
    names = decayed(SegmentTask(tiny.segmentation(), init_spec=spec))
    assert not any("rel_pos_bias" in name or "logit_scale" in name for name in names)
    assert "encoder/stages/0/blocks/0/attn/qkv/kernel" in names


def test_pixels_outside_of_a_picture_become_zero_to_half_a_grey_level(student):
    task = SegmentTask(tiny.segmentation(student))
    fill = np.broadcast_to(np.array(task.fill, np.uint8), (1, 32, 32, 3))
    assert np.abs(task.spec.normalize(fill)).max() < 0.009
    assert task.fill == (124, 116, 104)


# What is taken over, and what is refused


def test_load_initial_prints_what_was_resized_copied_and_dropped(student, capsys):
    SegmentTask(tiny.segmentation(student, **{"data.image_size": 64})).load_initial()
    output = capsys.readouterr().out
    assert "resized  position tables from 32 px to 64 px" in output
    assert "copied   the shared position bias into every block" in output
    assert "dropped  encoder/norm, projector" in output
    assert "fresh    segmenter" in output


def test_a_patch_kernel_is_resized_to_the_wanted_size(tmp_path, capsys):
    """Patches of 7 become patches of 8: the tokens of an enlarged picture stay nearly the same."""
    folder = tiny.save_teacher(tmp_path / "model", image_size=28, patch_size=7, depth=3)
    fields = {"segment.patch_size": 8, "segment.untie_positions": False}
    task = SegmentTask(tiny.segmentation(folder, **fields))
    encoder = task.load_initial()["encoder"]
    assert "the kernel of patches from 7 px to 8 px" in capsys.readouterr().out
    spec, parts = model_folder.load(folder)
    picture = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3, 28, 28)))
    # Patch by patch, since neighbours would mix at the borders of patches.
    cut = picture.unfold(2, 7, 7).unfold(3, 7, 7).reshape(1, 3 * 16, 7, 7)
    large = functional.interpolate(cut, (8, 8), mode="bicubic", antialias=True)
    large = large.reshape(1, 3, 4, 4, 8, 8).permute(0, 2, 4, 3, 5, 1).reshape(1, 32, 32, 3)
    want = nnx.merge(spec.abstract()[0], parts["encoder"]).embed(
        picture.permute(0, 2, 3, 1).float().numpy()
    )
    got = nnx.merge(task.encoder_def, encoder).embed(large.float().numpy())
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_a_swin_v2_takes_another_window(tmp_path):
    four = {"depths": [1, 1, 2, 1], "heads": [2, 2, 2, 2], "patch_size": 2, "window": 4}
    four["pretrained_windows"] = [0] * 4
    folder = tiny.save_swin(tmp_path / "model", 2, **four)
    fields = {"segment.window": 8, "segment.untie_positions": False}
    task = SegmentTask(tiny.segmentation(folder, **fields))
    assert task.spec.arch["window"] == 8
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    loaded = model_folder.flat_shapes(task.load_initial()["encoder"])
    assert loaded == model_folder.flat_shapes(params["encoder"])


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"init_from": ""}, "init_from is empty.*segment.family"),
        ({"init_from": "", "segment.family": "vit", **LINEAR}, "segment.trains='head' probes"),
        ({"data.image_size": 36}, "36 is not divisible by patch_size 8"),
        ({"data.image_size": 8, "eval.stride": 8}, "grid of 1 x 1 patches has no four levels"),
        ({"segment.window": 4}, "family 'vit'; set it to 0"),
    ],
    ids=str,
)
def test_impossible_configs_are_refused(student, fields, message):
    with pytest.raises(ConfigError, match=message):
        SegmentTask(tiny.segmentation(**{"init_from": student, **fields}))


def test_a_network_without_four_levels_is_refused():
    with pytest.raises(ConfigError, match="a ViT of 2 blocks has no four levels"):
        SegmentTask(tiny.segmentation(), init_spec=tiny.teacher_spec())
    with pytest.raises(ConfigError, match="a network of 3 stages has no four levels"):
        SegmentTask(tiny.segmentation(), init_spec=tiny.swin_spec(2))


def data(classes, **more):
    made = elements.of_batch(elements.labelled_pixels(32))
    return types.SimpleNamespace(**{"name": "some", "classes": classes, "elements": made, **more})


def test_data_that_does_not_fit_is_refused(student, capsys):
    task = SegmentTask(tiny.segmentation(student))
    task.check_data(data(None))
    task.check_data(data(5))
    assert "note" not in capsys.readouterr().out
    task.check_data(data(4))
    assert "segment.classes=5, but some has only 4 classes" in capsys.readouterr().out
    with pytest.raises(DataError, match="set --config.segment.classes=6"):
        task.check_data(data(6))
    labelled = elements.of_batch(elements.labelled_image(32))
    with pytest.raises(DataError, match="no class for each pixel"):
        task.check_data(data(5, elements=labelled))


def test_a_network_with_random_weights_can_be_trained():
    config = tiny.segmentation(**{"segment.family": "vit"})
    config.segment.arch = {**base.student(tiny.STUDENT, image_size=32), "depth": 3}
    task = SegmentTask(config)
    assert task.load_initial() == {}
    assert task.spec.source == "trained by fd_jax on folders"
