"""Blocks, whole networks and gradients against transformers' BEiT, and what the class promises."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from configs import base
from fd_jax import losses
from fd_jax.errors import ConfigError
from fd_jax.models import vit
from fd_jax.models.spec import split
from tests import tiny
from tests.convert import oracles
from tests.models.vits import (
    SMALL,
    beit,
    bind,
    pictures,
    random_params,
    relative,
    student_spec,
    to_hf,
)

LARGE = {**base.VIT_B16, "image_size": 224}


def compare(shape, position, folder, count):
    spec = student_spec(shape, position)
    params = random_params(spec)
    images = pictures(spec, count)
    model = beit(spec, params, folder, shared=position == "shared_rpb")
    want = oracles.run(lambda x: model(x).last_hidden_state, images)
    return relative(bind(spec, params)(images).tokens, want)


@pytest.mark.parametrize("position", ["shared_rpb", "rpb"])
def test_small_student_equals_beit(position, tmp_path):
    assert compare(SMALL, position, tmp_path, 4) < 1e-5


@pytest.mark.slow
def test_full_size_student_equals_beit(tmp_path):
    assert compare(LARGE, "shared_rpb", tmp_path, 2) < 1e-4


def test_every_block_equals_beits(tmp_path):
    spec = student_spec(SMALL, "shared_rpb")
    params, images = random_params(spec), pictures(spec, 2)
    model = beit(spec, params, tmp_path, shared=True)
    with torch.no_grad():
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        hidden = model(pixels, output_hidden_states=True).hidden_states
    blocks = (0, 4, 10)
    for block, features in zip(
        blocks, bind(spec, params).intermediates(images, blocks), strict=True
    ):
        assert relative(features.tokens, hidden[block + 1].numpy()) < 1e-5


@pytest.mark.parametrize(
    "wrong",
    [{"hidden_act": "gelu_new"}, {"hidden_act": "quick_gelu"}, {"layer_norm_eps": 1e-3}],
    ids=str,
)
def test_wrong_network_is_seen(wrong, tmp_path):
    spec = student_spec(SMALL, "shared_rpb")
    params, images = random_params(spec), pictures(spec, 2)
    model = beit(spec, params, tmp_path, shared=True, **wrong)
    want = oracles.run(lambda x: model(x).last_hidden_state, images)
    assert relative(bind(spec, params)(images).tokens, want) > 1e-5


def test_swapped_blocks_and_dropped_parts_are_seen(tmp_path):
    spec = student_spec(SMALL, "shared_rpb")
    params, images = random_params(spec), pictures(spec, 2)
    right = np.asarray(bind(spec, params)(images).tokens)
    blocks = dict(params["blocks"])
    blocks["2"], blocks["10"] = blocks["10"], blocks["2"]
    assert relative(bind(spec, {**params, "blocks": blocks})(images).tokens, right) > 1e-3
    table = {"table": np.zeros_like(params["rel_pos_bias"]["table"])}
    assert relative(bind(spec, {**params, "rel_pos_bias": table})(images).tokens, right) > 1e-3
    before = bind(spec, params)(images, final_norm=False).tokens
    assert relative(before, right) > 1e-3


def test_loss_and_gradients_equal_torchs(tmp_path):
    """Smooth L1 against whitened random features, through every parameter of the student."""
    spec = student_spec(SMALL, "shared_rpb")
    params, images = random_params(spec), pictures(spec, 2)
    features = np.random.default_rng(8).normal(size=(2, 17, 32)).astype(np.float32)
    definition, _ = spec.abstract()

    def loss(params):
        tokens = nnx.merge(definition, params)(images).tokens
        return jnp.mean(losses.smooth_l1(tokens, losses.whiten(features), beta=2.0))

    got, grads = jax.jit(jax.value_and_grad(loss))(params)
    model = beit(spec, params, tmp_path, shared=True)
    tokens = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).last_hidden_state
    target = torch.nn.functional.layer_norm(torch.from_numpy(features), (32,), eps=1e-5)
    want = torch.nn.functional.smooth_l1_loss(tokens, target, beta=2.0)
    want.backward()
    np.testing.assert_allclose(got, want.item(), rtol=1e-5)
    ours = to_hf(grads, SMALL["depth"], shared=True)
    theirs = {hf_disk_name(name): p.grad for name, p in model.named_parameters()}
    assert len(theirs) == len(ours)
    for name, grad in ours.items():
        match = [value for key, value in theirs.items() if key == name]
        assert len(match) == 1, f"{name} not among {sorted(theirs)[:40]}"
        assert relative(grad, match[0].numpy()) < 1e-5, name


def hf_disk_name(name):
    """transformers 5 calls some modules otherwise in memory than on disk."""
    swaps = (
        ("shared_position_bias.", "encoder.relative_position_bias."),
        ("layers.", "encoder.layer."),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    )
    for memory, disk in swaps:
        if memory in name and disk not in name:
            name = name.replace(memory, disk)
    return name


def test_parameter_counts():
    counts = {"b": (base.VIT_B16, 85_665_360), "l": (base.VIT_L14, 302_955_584)}
    for shape, count in counts.values():
        spec = student_spec({**shape, "image_size": 224}, "shared_rpb")
        assert sum(leaf.size for leaf in jax.tree.leaves(spec.abstract()[1])) == count


def test_initialisation_statistics():
    """docs/reference.md#student-init: cut at one std, residual branches over sqrt(2l)."""
    shape = {**SMALL, "width": 256, "heads": 4, "mlp_width": 512, "depth": 3}
    spec = student_spec(shape, "shared_rpb")
    for init, std in (("fd_student", 0.010791), ("finetune", 0.02)):
        params = split(spec.build(rngs=nnx.Rngs(0), init=init))[1]
        for block in range(3):
            at = params["blocks"][str(block)]
            assert at["mlp"]["fc1"]["kernel"].std() == pytest.approx(std, rel=0.02)
            assert at["attn"]["qkv"]["kernel"].std() == pytest.approx(std, rel=0.02)
            for dense in (at["mlp"]["fc2"], at["attn"]["proj"]):
                scaled = std / np.sqrt(2 * (block + 1))
                assert dense["kernel"].std() == pytest.approx(scaled, rel=0.03)
            np.testing.assert_array_equal(at["gamma_1"], np.float32(0.1))
            np.testing.assert_array_equal(at["attn"]["q_bias"], 0)
        np.testing.assert_array_equal(params["rel_pos_bias"]["table"], 0)
        # A single weight at the far end of an untruncated normal would not show in the deviation.
        limit = 0.02 if init == "fd_student" else 0.12
        assert all(
            np.abs(leaf).max() <= limit
            for leaf in (
                params["patch_embed"]["kernel"],
                params["blocks"]["0"]["mlp"]["fc1"]["kernel"],
            )
        )


def test_drop_path_rates_grow_linearly():
    network = student_spec({**SMALL, "depth": 12}, "ape").build(rngs=nnx.Rngs(0), drop_path=0.2)
    rates = [network.blocks[str(i)].drop_path for i in range(12)]
    np.testing.assert_allclose(rates, 0.2 * np.arange(12) / 11)
    assert rates[1] == pytest.approx(0.018182, abs=1e-6)


def test_branches_drop_apart_and_by_example():
    spec = student_spec({**SMALL, "depth": 2}, "ape")
    params, images = random_params(spec), pictures(spec, 3)
    network = bind(spec, params, drop_path=0.5)
    plain = np.asarray(network(images).tokens)
    drops = np.ones((3, 2, 2), np.float32) * 0.99
    drops[1, 1, 0] = 0.1  # example 1 loses the attention branch of the last block
    out = np.asarray(network(images, drops=jnp.asarray(drops)).tokens)
    # With nothing dropped a kept branch is still rescaled by 1/keep, so compare among examples.
    all_kept = np.asarray(network(images, drops=jnp.full((3, 2, 2), 0.99)).tokens)
    np.testing.assert_allclose(out[[0, 2]], all_kept[[0, 2]], atol=1e-6)
    assert np.abs(out[1] - all_kept[1]).max() > 1e-2
    assert np.abs(all_kept - plain).max() > 1e-3


def test_intermediates_drop_the_same_branches():
    spec = student_spec({**SMALL, "depth": 3}, "rpb")
    params, images = random_params(spec), pictures(spec, 3)
    network = bind(spec, params, drop_path=0.5)
    drops = np.random.default_rng(0).random((3, 3, 2)).astype(np.float32)
    want = network(images, drops=drops, final_norm=False).tokens
    first, last = network.intermediates(images, [0, 2], drops=drops)
    np.testing.assert_array_equal(last.tokens, want)
    assert np.abs(first.tokens - want).max() > 1e-2
    for others in (None, drops[::-1], drops[:, ::-1]):
        got = network.intermediates(images, [2], drops=others)[0].tokens
        assert np.abs(got - want).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("remat", [pytest.param("full", marks=pytest.mark.slow), "dots"])
def test_recomputing_changes_nothing(remat):
    spec = student_spec({**SMALL, "depth": 2}, "shared_rpb")
    params, images = random_params(spec), pictures(spec, 2)

    def grads(**runtime):
        def loss(params):
            return jnp.mean(jnp.square(bind(spec, params, **runtime)(images).tokens))

        return jax.grad(loss)(params)

    for got, want in zip(
        jax.tree.leaves(grads(remat=remat)), jax.tree.leaves(grads()), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-8)


def test_a_network_with_cudnn_agrees_with_xla(cudnn_by_xla):
    spec = student_spec({**SMALL, "depth": 2}, "shared_rpb")
    params, images = random_params(spec), pictures(spec, 2)
    want = np.asarray(bind(spec, params)(images).tokens)
    got = bind(spec, params, attention="cudnn")(images).tokens
    assert relative(got, want) < 1e-5


def test_feature_map_reads_its_tokens():
    spec = tiny.teacher_spec(registers=3)
    features = bind(spec, random_params(spec))(pictures(spec, 2))
    assert features.tokens.shape == (2, 1 + 3 + 16, 48)
    np.testing.assert_array_equal(features.cls_token, features.tokens[:, 0])
    np.testing.assert_array_equal(features.patches, features.tokens[:, 4:])
    assert features.full.shape == (2, 17, 48)
    assert features.grid == (4, 4)
    spec = tiny.teacher_spec(cls_token=False)
    features = bind(spec, random_params(spec))(pictures(spec, 2))
    assert features.full.shape == (2, 16, 48)
    with pytest.raises(ValueError, match="no class token"):
        _ = features.cls_token


@pytest.mark.parametrize(
    "arch,message",
    [
        ({"patch_size": 7}, "32 is not divisible by patch_size 7; use 28 or 35"),
        ({"image_size": [32, 36]}, "32 x 36: width 36 is not divisible by patch_size 8; use 32 or"),
        ({"image_size": [4, 32]}, "image_size 4 x 32: height 4 is less than patch_size 8"),
        ({"image_size": [32, 0]}, "32 x 0: width 0 is less than patch_size 8"),
        ({"image_size": [32]}, r"image_size=\[32\]: expected a whole number"),
        ({"image_size": [32, 32.5]}, r"image_size=\[32, 32.5\]: expected a whole number"),
        ({"heads": 5}, "width 48 is not divisible by 5 heads"),
        ({"registers": 2, "position": "rpb"}, "no bias for register tokens"),
        ({"qkv_bias": "kv"}, "qkv_bias='kv'"),
    ],
)
def test_impossible_networks_are_refused(arch, message):
    with pytest.raises(ConfigError, match=message):
        tiny.teacher_spec(**arch).abstract()


def test_images_of_another_size_are_refused():
    spec = tiny.teacher_spec()
    with pytest.raises(ValueError, match=r"\(40, 40\) pixels; this model .* \(32, 32\)"):
        bind(spec, random_params(spec))(np.zeros((1, 40, 40, 3), np.float32))
    with pytest.raises(ValueError, match="blocks \\[9\\]"):
        bind(spec, random_params(spec)).intermediates(np.zeros((1, 32, 32, 3)), [9])


def test_layer_ids():
    arch = {"depth": 12}
    expected = {
        "cls_token": 0,
        "pos_embed": 0,
        "patch_embed/kernel": 0,
        "ln_pre/scale": 0,
        "blocks/0/norm1/scale": 1,
        "blocks/11/mlp/fc2/kernel": 12,
        "rel_pos_bias/table": 13,
        "norm/scale": 13,
    }
    for path, layer in expected.items():
        assert vit.ViT.layer_id(path, arch) == layer
