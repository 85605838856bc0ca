"""Fine-tuning a Swin: loaded and resized weights, layer ids and decay of every parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from configs import base
from fd_jax import model_folder, optimizer
from fd_jax.errors import ConfigError
from fd_jax.models import spec as specs
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.training import program
from tests import tiny
from tests.convert import oracles
from tests.models import swins
from tests.models.test_resize import scipy_rel_table

SWIN = {"model.pooling": "mean", "model.final_norm": True, "model.head_scale": 1.0}


def initialized(folder, **fields):
    """The task and its initial parameters, with a head large enough to compare logits."""
    task = ClassifyTask(tiny.fine_tuning(folder, **{**SWIN, **fields}))
    shapes, _ = jax.eval_shape(task.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    params = program.overlay(params, task.load_initial())
    params["head"] = tiny.randomize(params["head"], 3)
    return task, params


def hugging_face_logits(official, arch, head, image_size, where):
    """Logits of Swinv2ForImageClassification for the tiny batch."""
    tensors = {f"swinv2.{name}": value for name, value in swins.to_hf(official).items()}
    tensors |= {"classifier.weight": head["kernel"].T, "classifier.bias": head["bias"]}
    config = swins.hf_config({**arch, "image_size": image_size})
    config.num_labels = len(head["bias"])
    model = oracles.pretrained(
        transformers.Swinv2ForImageClassification, config, tensors, where / "hf"
    )
    images = tiny.labelled_batch(side=image_size)["image"] / 255.0
    images = (images - specs.IMAGENET_MEAN) / specs.IMAGENET_STD
    return oracles.run(lambda x: model(x).logits, images.astype(np.float32))


@pytest.mark.parametrize("image_size", [32, 64])
def test_logits_equal_transformers_with_the_shared_bias_copied(image_size, tmp_path):
    folder = tiny.save_swin(tmp_path / "student", 2, position="shared_rpb")
    task, params = initialized(folder, **{"data.image_size": image_size})
    assert task.spec.arch["position"] == "rpb"
    spec, parts = model_folder.load(folder)
    official = swins.to_official(parts["encoder"], spec.arch)
    for name in [name for name in official if ".rel_pos_bias." in name]:
        value = official.pop(name)
        stage, leaf = name.split(".rel_pos_bias.")
        for block in range(spec.arch["depths"][int(stage.removeprefix("layers."))]):
            official[f"{stage}.blocks.{block}.attn.{leaf}"] = value
    want = hugging_face_logits(official, spec.arch, params["head"], image_size, tmp_path)
    logits = jax.jit(lambda batch: task.logits(params, {}, {}, batch))
    got = logits(tiny.labelled_batch(side=image_size))
    assert swins.relative(got, want) < 1e-5


@pytest.mark.parametrize("image_size,sides", [(32, (4, 4, 2)), (16, (4, 2, 1))])
def test_v1_bias_tables_are_resized_with_the_image(image_size, sides, tmp_path, capsys):
    """Windows are 4, 4, 4 at 64 pixels; a table is resized if its stage's window changes."""
    folder = tiny.save_swin(tmp_path / "esvit", 1, image_size=64)
    spec, parts = model_folder.load(folder)
    taken = ClassifyTask(
        tiny.fine_tuning(folder, **{**SWIN, "data.image_size": image_size})
    ).load_initial()
    for stage, (before, after) in enumerate(zip((4, 4, 4), sides, strict=True)):

        def table(encoder, stage=stage):
            return encoder["stages"][str(stage)]["blocks"]["0"]["attn"]["rel_pos_bias"]["table"]

        want = table(parts["encoder"])
        if before != after:
            want = scipy_rel_table(want, before, after, extra=0)
        np.testing.assert_allclose(table(taken["encoder"]), want, atol=1e-6)
    assert f"resized  position tables from 64 px to {image_size} px" in capsys.readouterr().out
    assert spec.arch["window"] == 4


def test_v2_reports_a_resized_input_and_no_tables(tmp_path, capsys):
    folder = tiny.save_swin(tmp_path / "student", 2)
    ClassifyTask(tiny.fine_tuning(folder, **{**SWIN, "data.image_size": 64})).load_initial()
    output = capsys.readouterr().out
    assert "resized  the input from 32 px to 64 px" in output
    assert "fresh    head" in output and "dropped" not in output


def test_a_grid_that_windows_do_not_divide_is_refused(tmp_path):
    folder = tiny.save_swin(tmp_path / "student", 2)
    with pytest.raises(ConfigError, match="grid of stage 0 is 12 x 12|windows of 4 do not"):
        ClassifyTask(tiny.fine_tuning(folder, **{**SWIN, "data.image_size": 80}))


def test_class_token_pooling_is_refused(tmp_path):
    folder = tiny.save_swin(tmp_path / "student", 2)
    with pytest.raises(ConfigError, match="the network has no class token; use 'mean'"):
        ClassifyTask(tiny.fine_tuning(folder, **{**SWIN, "model.pooling": "cls"}))


def test_drop_path_is_drawn_for_the_blocks_of_all_stages(tmp_path):
    folder = tiny.save_swin(tmp_path / "student", 2)
    task = ClassifyTask(tiny.fine_tuning(folder, **SWIN))
    batch = jax.eval_shape(task.prepare, tiny.labelled_batch(), jax.random.key(0))
    assert batch["drops"].shape == (16, 4, 2)


NORMS = ("norm1/scale", "norm1/bias", "norm2/scale", "norm2/bias")
DENSE = ("attn/proj", "mlp/fc1", "mlp/fc2")
BIAS_NETWORK = ("rel_pos_bias/fc1/kernel", "rel_pos_bias/fc1/bias", "rel_pos_bias/fc2/kernel")
V2_ATTENTION = ("q_bias", "v_bias", "logit_scale", *BIAS_NETWORK)
V1_ATTENTION = ("q_bias", "k_bias", "v_bias", "rel_pos_bias/table")


def expected_rows(arch, version):
    """path -> (layer id, whether it is decayed).

    From docs/reference.md#layer-decay and docs/reference.md#weight-decay.
    """
    rows = {
        "encoder/patch_embed/kernel": (0, True),
        "encoder/patch_embed/bias": (0, False),
        "encoder/patch_norm/scale": (0, False),
        "encoder/patch_norm/bias": (0, False),
    }
    number = 0
    every = arch.get("extra_norm_every", 0)
    for stage, depth in enumerate(arch["depths"]):
        for block in range(depth):
            number += 1
            at = f"encoder/stages/{stage}/blocks/{block}"
            rows |= {f"{at}/{name}": (number, False) for name in NORMS}
            attention = V1_ATTENTION if version == 1 else V2_ATTENTION
            rows |= {f"{at}/attn/{name}": (number, False) for name in attention}
            rows[f"{at}/attn/qkv/kernel"] = (number, True)
            for name in DENSE:
                rows[f"{at}/{name}/kernel"] = (number, True)
                rows[f"{at}/{name}/bias"] = (number, False)
            if every and block % every == every - 1:
                rows[f"{at}/extra_norm/scale"] = rows[f"{at}/extra_norm/bias"] = (number, False)
        if stage + 1 < len(arch["depths"]):
            at = f"encoder/stages/{stage}/downsample"
            rows[f"{at}/reduction/kernel"] = (number, True)
            rows[f"{at}/norm/scale"] = rows[f"{at}/norm/bias"] = (number, False)
    last = number + 1
    rows |= {f"encoder/norm/{name}": (last, False) for name in ("scale", "bias")}
    return rows | {"head/kernel": (last, True), "head/bias": (last, False)}


@pytest.mark.parametrize("name", ["swin_b", "esvit", pytest.param("giant", marks=pytest.mark.slow)])
def test_layer_ids_and_decay_of_every_parameter(name):
    version = 1 if name == "esvit" else 2
    shape = base.SWIN_G if name == "giant" else base.SWIN_B_W14
    size = 256 if name == "giant" else 224
    arch = (base.swin_v1 if version == 1 else base.swin_v2)(shape, image_size=size)
    spec = specs.ModelSpec("swin" if version == 1 else "swin_v2", arch, source="distilled")
    config = base.swin_fine_tuning(
        drop_path=0.4, layer_decay=0.8, peak_lr=1e-3, floor_lr=1e-6, image_size=size
    )
    task = ClassifyTask(config, init_spec=spec)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    family = specs.FAMILIES[spec.family]
    rows = expected_rows(arch, version)
    last = rows["head/bias"][0]
    assert last == sum(arch["depths"]) + 1

    def flat(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {optimizer.path_name(path): leaf for path, leaf in leaves}

    scales = optimizer.layer_scales(
        params,
        lambda path: family.layer_id(path.removeprefix("encoder/"), arch),
        last=last,
        decay=0.8,
    )
    assert flat(scales) == pytest.approx({path: 0.8 ** (last - i) for path, (i, _) in rows.items()})
    decayed = flat(optimizer.decay_mask(params, family.NO_DECAY))
    assert decayed == {path: decays for path, (_, decays) in rows.items()}
    if name == "swin_b":  # counts from the original's optimizer (docs/reference.md#weight-decay)
        assert len(rows) == 425
        assert sum(decays for _, decays in rows.values()) == 101
        assert flat(scales)["encoder/patch_norm/bias"] == pytest.approx(3.777893e-3, rel=1e-6)


def test_a_shared_bias_network_has_the_layer_id_of_its_last_block():
    """The original's parser fails on these names (docs/reference.md#quirk-swin-layer-ids)."""
    arch = base.swin_v2(base.SWIN_B_W14, image_size=224, position="shared_rpb")
    layer_id = specs.FAMILIES["swin_v2"].layer_id
    ids = [layer_id(f"stages/{stage}/rel_pos_bias/fc1/kernel", arch) for stage in range(4)]
    assert ids == [2, 4, 22, 24]
