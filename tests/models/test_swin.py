"""Swin V1 and V2 against transformers and tests/reference/swin.py, and what the classes promise."""

import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from configs import base
from fd_jax import inference, losses, model_folder, optimizer
from fd_jax.errors import ConfigError
from fd_jax.models import swin, windows
from fd_jax.models.spec import FAMILIES, ModelSpec
from tests.convert import oracles
from tests.models import swins
from tests.reference import swin as reference

VERSIONS = (1, 2)
STRUCTURES = {  # what transformers has no class for
    "v1 clipped window": (1, {"window": 8}),
    "all of the giant, shared": (2, {"position": "shared_rpb", "extra_norm_every": 2, "window": 8}),
    "another window's scale": (2, {"pretrained_windows": [3, 8, 2]}),
    "eleven blocks": (
        2,
        {"depths": [11], "heads": [2], "pretrained_windows": [0], "image_size": 16, "window": 8},
    ),
    "three of four stages": (1, {"depths": [2, 2], "heads": [2, 4], "window": 8}),
}


def tokens(made, params, images, **runtime):
    return jax.jit(lambda p, x: swins.bind(made, p, **runtime)(x).tokens)(params, images)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("weights", ["own", "random"])
def test_network_equals_transformers(version, weights, tmp_path):
    made = swins.spec(version)
    params = swins.own_params(made) if weights == "own" else swins.random_params(made)
    images = swins.pictures(made, 2)
    model = swins.hf_model(made, params, tmp_path)
    want = oracles.run(lambda x: model(x).last_hidden_state, images)
    # Random weights have heads at the clamp, whose logits of 100 amplify float32 rounding.
    limit = 1e-5 if weights == "own" else 1e-4
    assert swins.relative(tokens(made, params, images), want) < limit


@pytest.mark.parametrize("version", VERSIONS)
def test_network_equals_transformers_in_float64(version, tmp_path):
    made = swins.spec(version)
    images = swins.pictures(made, 2, dtype=np.float64)
    # Through float32 once, so that the file that transformers reads loses nothing.
    params = swins.random_params(made)
    model = swins.hf_model(made, params, tmp_path).double()
    want = oracles.run(lambda x: model(x).last_hidden_state, images)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        got = np.asarray(tokens(made, wide, images, dtype=jnp.float64))
    assert got.dtype == np.float64
    assert swins.relative(got, want) < 1e-6


@pytest.mark.parametrize("name", STRUCTURES)
def test_other_structures_equal_plain_torch(name):
    version, arch = STRUCTURES[name]
    made = swins.spec(version, **arch)
    images = swins.pictures(made, 2, dtype=np.float64)
    with jax.enable_x64(True):
        params = swins.random_params(made, dtype=np.float64)
        got = np.asarray(tokens(made, params, images, dtype=jnp.float64))
    assert swins.relative(got, swins.plain_torch(made, params, images)[1]) < 1e-6


@pytest.mark.parametrize("version", VERSIONS)
def test_every_block_equals_plain_torchs(version):
    """Layer by layer, on grids with and without shift; the reference's own check is the above."""
    made = swins.spec(version)
    params, images = swins.own_params(made), swins.pictures(made, 2)
    want, _ = swins.plain_torch(made, params, images)
    every = range(sum(made.arch["depths"]))
    got = jax.jit(lambda p, x: swins.bind(made, p).intermediates(x, every))(params, images)
    for features, reference_tokens in zip(got, want, strict=True):
        assert swins.relative(features.tokens, reference_tokens) < 1e-5
        assert features.grid[0] ** 2 == reference_tokens.shape[1]


def test_stages_equal_transformers(tmp_path):
    made = swins.spec(2)
    params, images = swins.own_params(made), swins.pictures(made, 2)
    model = swins.hf_model(made, params, tmp_path)
    with torch.no_grad():
        pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
        hidden = model(pixels, output_hidden_states=True).hidden_states

    @jax.jit
    def stages(params, images):
        network = swins.bind(made, params)
        first, second, last = network.intermediates(images, [1, 3, 4])
        return (
            network.embed(images),
            network.stages["0"].downsample(first.tokens, first.grid[0]),
            network.stages["1"].downsample(second.tokens, second.grid[0]),
            last.tokens,
        )

    for got, want in zip(stages(params, images), hidden, strict=True):
        assert swins.relative(got, want) < 1e-5


@pytest.mark.parametrize("version", VERSIONS)
def test_loss_and_gradients_equal_torchs(version):
    """Smooth L1 against whitened random features, through every parameter, in float64."""
    made = swins.spec(version, window=8, depths=[2, 1], heads=[2, 4])
    if version == 2:
        made.arch.update(pretrained_windows=[0, 0], extra_norm_every=2)
    images = swins.pictures(made, 2, dtype=np.float64)
    features = np.random.default_rng(8).normal(size=(2, 64, 32))
    params = swins.random_params(made, dtype=np.float64)
    with jax.enable_x64(True):

        def loss(params):
            runtime = {"dtype": jnp.float64, "grad_dtype": jnp.float64}
            out = swins.bind(made, params, **runtime)(images).tokens
            distance = losses.smooth_l1(out, jnp.asarray(features), beta=2.0)
            return jnp.mean(distance)

        got, grads = jax.jit(jax.value_and_grad(loss))(params)
        grads = jax.tree.map(np.asarray, grads)
    tensors = {
        name: torch.from_numpy(np.array(value)).requires_grad_()
        for name, value in swins.to_official(params, made.arch).items()
    }
    pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
    out = reference.forward(tensors, made.arch, pixels, version=version)[1]
    want = torch.nn.functional.smooth_l1_loss(out, torch.from_numpy(features), beta=2.0)
    want.backward()
    np.testing.assert_allclose(got, want.item(), rtol=1e-6)
    ours = swins.to_official(grads, made.arch)
    assert ours.keys() == tensors.keys()
    for name, grad in ours.items():
        theirs = tensors[name].grad.numpy()
        scale = max(np.abs(theirs).max(), 1e-9)  # clamped scales have a gradient of zero
        assert np.abs(grad - theirs).max() / scale < 1e-5, name


def wrong_merge(self, x, grid):
    batch, _, width = x.shape
    half = grid // 2
    x = x.reshape(batch, half, 2, half, 2, width).transpose(0, 1, 3, 2, 4, 5)  # rows outermost
    x = x.reshape(batch, half * half, 4 * width)
    return self.reduction(self.norm(x)) if self.norm_first else self.norm(self.reduction(x))


WRONG = {
    "merge order": (swin.PatchMerging, "__call__", wrong_merge),
    "no clamp": (windows, "MAX_LOGIT_SCALE", math.inf),
    "unmasked shift": (windows, "MASKED", 0.0),
    "natural logarithm": (
        windows,
        "log_offsets",
        lambda w, p, right=windows.log_offsets: right(w, p) * math.log(2),
    ),
    "shift the other way": (
        windows,
        "partition",
        lambda x, g, w, s, right=windows.partition: right(x, g, w, -s),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arithmetic_is_seen(name, monkeypatch):
    made = swins.spec(2, depths=[2, 1], heads=[2, 4], pretrained_windows=[0, 0])
    params, images = swins.random_params(made), swins.pictures(made, 2)
    want = swins.plain_torch(made, params, images)[1]
    windows.shift_mask.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(*WRONG[name])
        wrong = tokens(made, params, images)
    windows.shift_mask.cache_clear()
    assert swins.relative(wrong, want) > 1e-3


def test_wrong_window_clamp_is_seen():
    """A window of 8 on grids 16, 8, 4 must not act as one of 4 does."""
    made = swins.spec(2, window=8)
    params, images = swins.random_params(made), swins.pictures(made, 2)
    other = ModelSpec("swin_v2", {**made.arch, "window": 4})
    want = swins.plain_torch(made, params, images)[1]
    assert swins.relative(tokens(made, params, images), want) < 1e-4
    assert swins.relative(tokens(other, params, images), want) > 1e-3


def test_three_stages_are_the_stage_three_map():
    """Without the last stage the network ends on ViT's grid, with the tokens of that stage."""
    four = swins.spec(1)
    params, images = swins.random_params(four), swins.pictures(four, 2)
    two = swins.spec(1, depths=[2, 2], heads=[2, 4], final_norm=False)
    stages = {"0": params["stages"]["0"], "1": {"blocks": params["stages"]["1"]["blocks"]}}
    kept = {name: params[name] for name in ("patch_embed", "patch_norm")} | {"stages": stages}
    got = jax.jit(lambda p: swins.bind(two, p)(images))(kept)
    want = jax.jit(lambda p: swins.bind(four, p).intermediates(images, [3])[0])(params)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert got.grid == want.grid == (8, 8)


def test_feature_map_has_patches_only():
    made = swins.spec(2)
    params, images = swins.random_params(made), swins.pictures(made, 2)

    @jax.jit
    def both(params):
        network = swins.bind(made, params)
        return network(images), network(images, final_norm=False).tokens

    features, raw = both(params)
    assert (features.cls, features.registers, features.grid) == (0, 0, (4, 4))
    assert features.tokens.shape == (2, 16, swins.bind(made, params).width) == (2, 16, 64)
    np.testing.assert_array_equal(features.full, features.tokens)
    assert swins.relative(raw, features.tokens) > 1e-2


@pytest.mark.slow
def test_parameter_counts():
    def count(family, arch):
        return sum(leaf.size for leaf in jax.tree.leaves(ModelSpec(family, arch).abstract()[1]))

    assert count("swin_v2", base.swin_v2(base.SWIN_B_W14, image_size=224)) == 86_893_816
    assert count("swin_v2", base.swin_v2(base.SWIN_G, image_size=256)) == 2_997_843_680


def test_windows_shift_where_the_original_does():
    """docs/reference.md#swin-windows: 14 and shifts of 7, then one window a stage."""
    network = nnx.eval_shape(
        lambda: ModelSpec("swin_v2", base.swin_v2(base.SWIN_B_W14, image_size=224)).build(
            rngs=nnx.Rngs(0)
        )
    )
    seen = {
        (int(s), int(b) % 2): (block.grid, block.window, block.shift)
        for s, stage in network.stages.items()
        for b, block in stage.blocks.items()
    }
    assert seen == {
        (0, 0): (56, 14, 0),
        (0, 1): (56, 14, 7),
        (1, 0): (28, 14, 0),
        (1, 1): (28, 14, 7),
        (2, 0): (14, 14, 0),
        (2, 1): (14, 14, 0),
        (3, 0): (7, 7, 0),
        (3, 1): (7, 7, 0),
    }


def test_initialisation():
    """docs/reference.md#swin-init: untruncated 0.02, sqrt(2n), the norms' 1e-5."""
    made = swins.spec(2, embed_width=64, residual_scale=1e-5)
    params = swins.own_params(made)
    number = 0
    for stage in params["stages"].values():
        for block in stage["blocks"].values():
            number += 1
            scaled = 0.02 / math.sqrt(2 * number)
            assert block["mlp"]["fc2"]["kernel"].std() == pytest.approx(scaled, rel=0.1)
            assert block["attn"]["proj"]["kernel"].std() == pytest.approx(scaled, rel=0.1)
            assert block["attn"]["qkv"]["kernel"].std() == pytest.approx(0.02, rel=0.05)
            for name in ("norm1", "norm2"):
                np.testing.assert_array_equal(block[name]["scale"], np.float32(1e-5))
                np.testing.assert_array_equal(block[name]["bias"], 0)
    assert number == 5
    np.testing.assert_array_equal(params["patch_norm"]["scale"], 1)
    np.testing.assert_array_equal(params["stages"]["0"]["downsample"]["norm"]["scale"], 1)
    assert np.abs(params["stages"]["2"]["blocks"]["0"]["mlp"]["fc1"]["kernel"]).max() > 0.06


def test_drop_path_rates_grow_over_all_stages():
    network = swins.spec(2).build(rngs=nnx.Rngs(0), drop_path=0.3)
    rates = [
        block.drop_path
        for stage in ("0", "1", "2")
        for _, block in sorted(network.stages[stage].blocks.items())
    ]
    np.testing.assert_allclose(rates, 0.3 * np.arange(5) / 4)


def test_branches_drop_by_example():
    made = swins.spec(2)
    params, images = swins.random_params(made), swins.pictures(made, 3)
    run = jax.jit(lambda drops: swins.bind(made, params, drop_path=0.5)(images, drops=drops).tokens)
    kept = np.asarray(run(jnp.full((3, 5, 2), 0.99)))
    drops = np.full((3, 5, 2), 0.99, np.float32)
    drops[1, 4, 1] = 0.1  # example 1 loses the MLP branch of the last block
    out = np.asarray(run(jnp.asarray(drops)))
    np.testing.assert_array_equal(out[[0, 2]], kept[[0, 2]])
    assert np.abs(out[1] - kept[1]).max() > 1e-2


@pytest.mark.parametrize("version", [1, 2])
def test_intermediates_drop_the_same_branches(version):
    made = swins.spec(version)
    params, images = swins.random_params(made), swins.pictures(made, 3)
    network = swins.bind(made, params, drop_path=0.5)
    drops = np.random.default_rng(0).random((3, 5, 2)).astype(np.float32)
    want = jax.jit(lambda x: network(x, drops=drops, final_norm=False).tokens)(images)
    last = jax.jit(lambda x, drops: network.intermediates(x, [4], drops=drops)[0].tokens)
    atol = 5e-6 * np.abs(want).max()
    np.testing.assert_allclose(last(images, drops), want, rtol=0, atol=atol)
    assert np.abs(last(images, drops[:, ::-1]) - want).max() > 1e-2


@pytest.mark.slow
def test_recomputing_and_other_attention_change_nothing(cudnn_by_xla):
    made = swins.spec(2, depths=[2, 1], heads=[2, 4], pretrained_windows=[0, 0])
    params, images = swins.own_params(made), swins.pictures(made, 2)

    def grads(**runtime):
        def loss(params):
            tokens = swins.bind(made, params, **runtime)(images).tokens
            # Not their squares, which the norm at the end makes nearly the same for any network.
            return jnp.mean(tokens * jnp.sin(jnp.arange(tokens.size)).reshape(tokens.shape))

        return jax.jit(jax.grad(loss))(params)

    want = grads()
    for runtime in ({"remat": "dots"}, {"remat": "full", "attention": "cudnn"}):
        for got, leaf in zip(jax.tree.leaves(grads(**runtime)), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(got, leaf, rtol=0, atol=2e-5 * np.abs(leaf).max())


def test_bfloat16_stays_near():
    made = swins.spec(2)
    params, images = swins.own_params(made), swins.pictures(made, 2)
    got = tokens(made, params, images, dtype=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    want = tokens(made, params, images)
    assert jnp.sqrt(jnp.mean(jnp.square(got - want)) / jnp.mean(jnp.square(want))) < 0.1


@pytest.mark.parametrize(
    "arch,message",
    [
        ({"window": [4, 2]}, r"window=\[4, 2\]: a side of a square is expected"),
        ({"image_size": [32, 64]}, "image_size 32 x 64: a Swin .* square .* use 32 or 64"),
        ({"window": 5}, "grid of stage 0 is 16 x 16, which windows of 5 do not divide"),
        ({"image_size": 36}, "36 is not divisible by patch_size 2 x 4 .* use 32 or 40"),
        ({"heads": [2, 5, 8]}, "width 32 of stage 1 is not divisible by 5 heads"),
        ({"heads": [2, 4]}, "has 3 stages, heads=.* has 2"),
        ({"pretrained_windows": [0]}, "has 1 entries for 3 stages"),
        ({"position": "ape"}, "position='ape' is unknown"),
        ({"activation": "tanh"}, "activation='tanh' is unknown"),
    ],
)
def test_impossible_networks_are_refused(arch, message):
    with pytest.raises(ConfigError, match=message):
        swins.spec(2, **arch).abstract()


def test_images_of_another_shape_are_refused():
    made = swins.spec(1)
    network = swins.bind(made, swins.own_params(made))
    with pytest.raises(ValueError, match=r"\(32, 64\) pixels; this model .* \(32, 32\)"):
        network(np.zeros((1, 32, 64, 3), np.float32))
    with pytest.raises(ConfigError, match="a Swin network sees all patches"):
        network(np.zeros((1, 32, 32, 3), np.float32), keep=np.zeros((1, 9), np.int32))
    with pytest.raises(ValueError, match="blocks \\[5\\]"):
        network.intermediates(np.zeros((1, 32, 32, 3)), [5])


# Layer of every parameter of SwinV2-B, depths 2/2/18/2 (docs/reference.md#layer-decay).
FIRST = {"0": 1, "1": 3, "2": 5, "3": 23}  # id of a stage's first block
MERGED = {"0": 2, "1": 4, "2": 22}


@pytest.mark.parametrize("family,no_decay_matrices", [("swin", 24), ("swin_v2", 48)])
def test_layer_and_decay_of_every_parameter(family, no_decay_matrices):
    arch = base.swin_v2(base.SWIN_B_W14, image_size=224)
    if family == "swin":
        arch = base.swin_v1(base.SWIN_B_W14, image_size=224)
    tree = ModelSpec(family, arch).abstract()[1]
    shapes = model_folder.flat_shapes(tree)
    spared = optimizer.decay_mask(tree, FAMILIES[family].NO_DECAY)
    decayed = {optimizer.path_name(p) for p, on in jax.tree.leaves_with_path(spared) if on}
    matrices = 0
    for path, shape in shapes.items():
        parts = path.split("/")
        if parts[0] in ("patch_embed", "patch_norm"):
            layer = 0
        elif parts[0] == "norm":
            layer = 25
        elif parts[2] == "downsample":
            layer = MERGED[parts[1]]
        else:
            layer = FIRST[parts[1]] + int(parts[3])
        assert FAMILIES[family].layer_id(path, arch) == layer, path
        position = "rel_pos_bias" in parts or "logit_scale" in parts
        assert (path in decayed) == (len(shape) > 1 and not position), path
        matrices += len(shape) > 1 and position
    assert matrices == no_decay_matrices
    assert FAMILIES[family].layer_id("head/kernel", arch) == 25
    assert 0.8**25 == pytest.approx(3.777893e-3, rel=1e-6)


def test_a_shared_bias_has_the_layer_of_its_stage():
    """Where the original's parser fails (docs/reference.md#quirk-swin-layer-ids)."""
    arch = {**base.swin_v2(base.SWIN_B_W14, image_size=224), "position": "shared_rpb"}
    ids = [
        FAMILIES["swin_v2"].layer_id(f"stages/{s}/rel_pos_bias/fc1/kernel", arch) for s in range(4)
    ]
    assert ids == [2, 4, 22, 24]


def test_untying_copies_the_stages_bias():
    made = swins.spec(2, position="shared_rpb")
    params, images = swins.random_params(made), swins.pictures(made, 2)
    family = FAMILIES["swin_v2"]
    own = ModelSpec("swin_v2", family.untied(made.arch))
    untied = family.untie_positions(params, made.arch)
    assert model_folder.flat_shapes(untied) == model_folder.flat_shapes(own.abstract()[1])
    got, want = tokens(own, untied, images), tokens(made, params, images)
    assert swins.relative(got, want) < 1e-5
    assert "rel_pos_bias" in params["stages"]["0"]  # the argument is left alone


def test_other_image_sizes():
    """V2 has no tables; V1's change where the clipped window does, here from 4 to 8 tokens."""
    for version in VERSIONS:
        made = swins.spec(version, window=8)
        params = swins.random_params(made)
        larger, resized = made.resized(params, 64)
        assert larger.arch["image_size"] == 64
        assert model_folder.flat_shapes(resized) == model_folder.flat_shapes(larger.abstract()[1])
        assert swins.bind(larger, resized).grid == (8, 8)
    same = "stages/0/blocks/0/attn/rel_pos_bias/table"
    before = model_folder.flat_shapes(swins.spec(1, window=8).abstract()[1])
    after = model_folder.flat_shapes(swins.spec(1, window=8, image_size=64).abstract()[1])
    assert before[same] == after[same] == (225, 2)
    last = "stages/2/blocks/0/attn/rel_pos_bias/table"
    assert (before[last], after[last]) == ((49, 8), (225, 8))


def test_model_folder(tmp_path):
    made = swins.spec(2)
    params, images = swins.random_params(made), swins.pictures(made, 2)
    model_folder.save(tmp_path / "m", made, {"encoder": params})
    model = inference.load_model(tmp_path / "m")
    assert model.spec == made
    np.testing.assert_array_equal(model(images).tokens, tokens(made, params, images))
