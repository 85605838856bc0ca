"""Attention maps against what the blocks themselves add to their tokens, and transformers' own."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch

from fd_jax.models import windows
from tests import tiny
from tests.models import swins, vits
from tests.models.vits import SMALL, relative

TOLERANCE = 1e-5


def teacher(**arch):
    return tiny.teacher_spec(**arch)


def student(position):
    return vits.student_spec({**SMALL, "depth": 2}, position)


VITS = {
    "ape": teacher(),
    "rpb": student("rpb"),
    "shared_rpb": student("shared_rpb"),
    "rope": teacher(position="rope", qkv_bias="qv"),
    "registers": teacher(registers=3, layer_scale=0.5),
    "no class token": teacher(cls_token=False, registers=1, position="rope"),
}
SWINS = {  # blocks 1 and 3 are shifted, and the last stage is one window
    "swin": swins.spec(1),
    "swin_v2": swins.spec(2),
    "swin_v2 shared": swins.spec(2, position="shared_rpb"),
}
ALL = {**VITS, **SWINS}


def parameters(name):
    """Random weights, with MLPs that add nothing: a block then adds its attention alone."""
    spec = ALL[name]
    params = (swins if name in SWINS else vits).random_params(spec)

    def silence(path, leaf):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        silent = "mlp/fc2" in path or (spec.family == "swin_v2" and path.endswith("norm2/bias"))
        if silent:
            return np.zeros_like(leaf)
        # At the clamp of 100, float32 has no five digits of a weight left.
        return np.minimum(leaf, 2.5) if path.endswith("logit_scale") else leaf

    return jax.tree_util.tree_map_with_path(silence, params)


def states(network, images):
    """The tokens before and after every block."""
    after = [features.tokens for features in network.intermediates(images, range(network.depth))]
    before = [network.embed(images), *after[:-1]]
    if hasattr(network, "stages"):
        first = 0
        for stage, depth in enumerate(network.depths[:-1]):
            first += depth
            merge = network.stages[str(stage)].downsample
            before[first] = merge(before[first], network.grids[stage])
    return before, after


def arrays_of(attention):
    return {
        "logits": attention.logits(),
        "weights": attention.weights(),
        "unbiased": dataclasses.replace(attention.inputs, bias=None).weights(),
        "values": attention.values,
        "average": attention.join(attention.weighted_values()),
        "positions": attention.positions(),
    }


@functools.cache
def computed(name):
    """Parameters, the maps' description, and all arrays, from one compilation per network."""
    spec, params = ALL[name], parameters(name)
    images = vits.pictures(spec, 2)

    @jax.jit
    def run(params, images):
        # A rate of drop path that would be seen; maps are always without.
        network = vits.bind(spec, params, drop_path=0.5)
        maps = network.attention_maps(images, range(network.depth))
        return states(network, images), maps, [arrays_of(attention) for attention in maps]

    (before, after), maps, arrays = jax.tree.map(np.asarray, run(params, images))
    added = [new - old for old, new in zip(before, after, strict=True)]
    return block_parameters(spec, params), added, maps, arrays


def block_parameters(spec, params):
    if spec.family == "vit":
        return [params["blocks"][str(i)] for i in range(spec.arch["depth"])]
    return [
        params["stages"][str(stage)]["blocks"][str(i)]
        for stage, depth in enumerate(spec.arch["depths"])
        for i in range(depth)
    ]


def branch(block, average):
    """What a block adds to its tokens, from averages of values [B, N, A, d]; in numpy."""
    proj = block["attn"]["proj"]
    out = average.reshape(*average.shape[:2], -1) @ proj["kernel"] + proj["bias"]
    if "logit_scale" in block["attn"]:  # SwinV2 normalises what it adds
        deviation = np.sqrt(out.var(axis=-1, keepdims=True) + 1e-5)
        out = (out - out.mean(axis=-1, keepdims=True)) / deviation
        out = out * block["norm1"]["scale"] + block["norm1"]["bias"]
    return out * block.get("gamma_1", 1.0)


def average(attention, weights, values):
    return np.asarray(attention.join(np.einsum("rhqk,rkhd->rqhd", weights, values)))


@pytest.mark.parametrize("name", ALL)
def test_weighted_values_are_what_the_blocks_add(name):
    blocks, added, _, arrays = computed(name)
    for block, want, got in zip(blocks, added, arrays, strict=True):
        assert relative(branch(block, got["average"]), want) < TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_wrong_attention_is_seen(name):
    """Control: weights of another block, and weights without the position bias."""
    blocks, added, maps, arrays = computed(name)
    first, second = arrays[:2]
    other = average(maps[0], second["weights"], first["values"])
    assert relative(branch(blocks[0], other), added[0]) > 1e-2
    for block, want, attention, got in zip(blocks, added, maps, arrays, strict=True):
        without = branch(block, average(attention, got["unbiased"], got["values"]))
        has_bias = attention.inputs.bias is not None
        assert has_bias == (name in SWINS or "rpb" in name)
        assert (relative(without, want) > 1e-3) == has_bias


@pytest.mark.parametrize("name", ALL)
def test_weights_are_the_softmax_of_logits(name):
    _, _, maps, arrays = computed(name)
    for attention, got in zip(maps, arrays, strict=True):
        rows, tokens, heads, _ = got["values"].shape
        assert got["weights"].shape == got["logits"].shape == (rows, heads, tokens, tokens)
        assert got["weights"].dtype == np.float32
        np.testing.assert_allclose(got["weights"].sum(axis=-1), 1, atol=TOLERANCE)
        exponentials = np.exp(got["logits"] - got["logits"].max(axis=-1, keepdims=True))
        softmax = exponentials / exponentials.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(got["weights"], softmax, atol=TOLERANCE)
        assert attention.prefix + got["positions"].shape[1] == tokens


def test_a_map_says_which_tokens_are_patches():
    for name, spec in VITS.items():
        for attention in computed(name)[2]:
            assert attention.cls == int(spec.arch["cls_token"])
            assert attention.registers == spec.arch["registers"]
            assert (attention.grid, attention.window, attention.shift) == ((4, 4), None, 0)


@pytest.mark.parametrize("name", SWINS)
def test_pairs_that_the_shift_brought_together_have_no_weight(name):
    _, _, maps, arrays = computed(name)
    assert [attention.shift for attention in maps] == [0, 2, 0, 2, 0]
    for attention, got in zip(maps, arrays, strict=True):
        if attention.shift:
            mask = windows.shift_mask(attention.grid[0], attention.window, attention.shift)
            weights = got["weights"].reshape(-1, *mask.shape[:1], *got["weights"].shape[1:])
            apart = np.broadcast_to(mask[:, None] < 0, weights.shape)
            assert apart.any()
            assert weights[apart].max() < 1e-6
            assert weights[~apart].min() > 0


@pytest.mark.parametrize("name", ["ape", "swin"])
def test_every_patch_has_its_place_on_the_grid(name):
    _, _, maps, arrays = computed(name)
    for attention, got in zip(maps, arrays, strict=True):
        height, width = attention.grid
        want = np.stack(np.indices((height, width)), axis=-1).reshape(-1, 2)
        groups = len(got["positions"])
        assert len(got["weights"]) == (2 if name == "ape" else 2 * groups)
        joined = attention.join(np.tile(got["positions"], (2, 1, 1)))
        for image in range(2):
            np.testing.assert_array_equal(joined[image], want)
        if attention.window is not None:
            # Window (0, 0) begins `shift` patches below and to the right of the corner.
            assert tuple(got["positions"][0, 0]) == (attention.shift, attention.shift)
            # The last window of a shifted grid ends where the grid begins.
            end = (height - 1 + attention.shift) % height
            assert tuple(got["positions"][-1, -1]) == (end, end)


def test_maps_do_not_depend_on_the_implementation(cudnn_by_xla):
    spec = VITS["shared_rpb"]
    images = vits.pictures(spec, 2)
    network = vits.bind(spec, parameters("shared_rpb"), attention="cudnn")
    (got,) = network.attention_maps(images, [1])
    want = computed("shared_rpb")[3][1]["weights"]
    np.testing.assert_allclose(got.weights(), want, atol=TOLERANCE)


def test_only_what_is_asked_for_is_computed():
    spec = VITS["ape"]
    network = vits.bind(spec, parameters("ape"))
    images = vits.pictures(spec, 2)
    maps = network.attention_maps(images, [1, 0])
    # Pairs of tokens exist only once weights are asked for.
    shapes = {leaf.shape for leaf in jax.tree.leaves(maps)}
    assert shapes == {(2, 17, 4, 12)}
    np.testing.assert_allclose(maps[0].weights(), computed("ape")[3][1]["weights"], atol=TOLERANCE)
    lengths = [
        len(jax.make_jaxpr(lambda x, b=block: network.attention_maps(x, [b]))(images).eqns)
        for block in (0, 1)
    ]
    assert lengths[0] < lengths[1]
    with pytest.raises(ValueError, match=r"blocks \[2\] asked for, but this model has 2"):
        network.attention_maps(images, [0, 2])


def their_attentions(model, images):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
        return [found.numpy() for found in model(pixels, output_attentions=True).attentions]


DINOV3 = teacher(
    position="rope", registers=4, qkv_bias="qv", layer_scale=0.5, norm_eps=1e-5, rope_theta=100.0
)


@pytest.mark.parametrize("name", ["vit", "beit", "beit_shared", "dinov3", "swin", "swin_v2"])
def test_weights_equal_transformers(name, tmp_path):
    spec = {
        "vit": VITS["ape"],
        "beit": VITS["rpb"],
        "beit_shared": VITS["shared_rpb"],
        "dinov3": DINOV3,
        **SWINS,
    }[name]
    images = vits.pictures(spec, 2)
    if name.startswith("swin"):
        params = swins.own_params(spec) if name == "swin_v2" else swins.random_params(spec)
        model = swins.hf_model(spec, params, tmp_path)
    else:
        params = vits.random_params(spec)
        model = (
            vits.beit(spec, params, tmp_path, shared=name == "beit_shared")
            if name.startswith("beit")
            else vits.hugging_face(spec, params, tmp_path / "model")
        )

    depths = spec.arch.get("depths")
    # Of a Swin, transformers returns the last block of every stage.
    blocks = range(spec.arch["depth"]) if depths is None else np.cumsum(depths) - 1

    @jax.jit
    def weights(params, images):
        maps = vits.bind(spec, params).attention_maps(images, list(blocks))
        rows = [attention.of_class_token() for attention in maps if attention.cls]
        return [attention.weights() for attention in maps], rows

    (got, rows), want = weights(params, images), their_attentions(model, images)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    for ours, theirs in zip(rows, [] if depths else want, strict=True):
        patches = theirs[:, :, 0, 1 + spec.arch["registers"] :].mean(axis=1)
        np.testing.assert_allclose(ours, patches, atol=TOLERANCE)
