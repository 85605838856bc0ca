"""Pictures that are not square, and networks that see some of the patches."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers.models.beit.modeling_beit import BeitRelativePositionBias

from fd_jax import load_model, model_folder
from fd_jax.errors import ConfigError, ConversionError
from fd_jax.models import sizes
from fd_jax.models.features import FeatureMap
from fd_jax.models.spec import ModelSpec
from fd_jax.tasks.distill import DistillTask
from tests import tiny
from tests.convert import oracles
from tests.models import numpy_vit, vits
from tests.models.vits import SMALL, relative

TOLERANCE = 1e-5
WIDE, TALL = (24, 48), (40, 16)  # grids of 3 x 6 and 5 x 2
PATCHES, KEPT = 18, 7


def student(position, **shape):
    return vits.student_spec({**SMALL, "depth": 2, **shape}, position)


SPECS = {
    "ape": tiny.teacher_spec(image_size=list(WIDE), registers=2),
    "rpb": student("rpb", image_size=list(WIDE)),
    "shared_rpb": student("shared_rpb", image_size=list(WIDE)),
    "rope": tiny.teacher_spec(image_size=list(WIDE), position="rope", rope_theta=100.0),
    "rope without class": tiny.teacher_spec(
        image_size=list(WIDE), position="rope", rope_theta=100.0, cls_token=False
    ),
}


# Pictures that are not square.


@pytest.mark.parametrize("size", [WIDE, TALL])
@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov2 with registers", "dinov3"])
def test_resized_networks_equal_transformers(name, size, tmp_path):
    arch, method = {
        "vit": ({}, "size"),
        "dinov2": ({"layer_scale": 0.5}, "size"),
        "dinov2 with registers": ({"layer_scale": 0.5, "registers": 2}, "antialias"),
        "dinov3": (
            {
                "position": "rope",
                "rope_theta": 100.0,
                "registers": 2,
                "layer_scale": 0.5,
                "qkv_bias": "qv",
                "norm_eps": 1e-5,
            },
            "size",
        ),
    }[name]
    square = dataclasses.replace(tiny.teacher_spec(**arch), position_resize=method)
    params = vits.random_params(square)
    model = vits.hugging_face(square, params, tmp_path / "model")
    spec, resized = square.resized(params, size)
    assert spec.arch["image_size"] == list(size)
    images = vits.pictures(spec, 2)
    options = {"interpolate_pos_encoding": True} if name == "vit" else {}
    want = oracles.run(lambda x: model(x, **options).last_hidden_state, images)
    features = vits.bind(spec, resized)(images)
    assert features.grid == (size[0] // 8, size[1] // 8)
    assert relative(features.tokens, want) < TOLERANCE


@pytest.mark.parametrize("size", [WIDE, TALL])
@pytest.mark.parametrize("position", ["rpb", "shared_rpb"])
def test_students_of_any_shape_equal_beit(position, size, tmp_path):
    spec = student(position, image_size=list(size))
    params, images = vits.random_params(spec), vits.pictures(spec, 2)
    model = vits.beit(spec, params, tmp_path, shared=position == "shared_rpb")
    for module in model.modules():
        if isinstance(module, BeitRelativePositionBias):
            # transformers 5.23 reads a table with its axes exchanged. It does so by this size, and
            # by nothing else; so exchanging the size as well makes the axes right.
            module.window_size = module.window_size[::-1]
    want = oracles.run(lambda x: model(x).last_hidden_state, images)
    assert relative(vits.bind(spec, params)(images).tokens, want) < TOLERANCE


def test_bias_tables_are_resized_with_the_picture():
    square = student("rpb")
    params = vits.random_params(square)
    spec, resized = square.resized(params, WIDE)
    table = resized["blocks"]["1"]["attn"]["rel_pos_bias"]["table"]
    assert table.shape == (5 * 11 + 3, 4)
    shapes = jax.tree.map(lambda leaf: leaf.shape, resized)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, spec.abstract()[1])
    old = params["blocks"]["1"]["attn"]["rel_pos_bias"]["table"]
    # Offsets of -1, 0 and 1 are source points on both axes: they come back exactly.
    np.testing.assert_allclose(
        table[:-3].reshape(5, 11, 4)[1:4, 4:7], old[:-3].reshape(7, 7, 4)[2:5, 2:5], atol=1e-6
    )


def test_descriptions_hold_one_number_for_a_square():
    square = tiny.teacher_spec()
    params = vits.random_params(square)
    assert square.resized(params, (32, 32)) == (square, params)
    there = square.resized(params, (40, 40))[0]
    assert json.loads(there.to_json())["arch"]["image_size"] == 40
    there, changed = square.resized(params, WIDE)
    assert json.loads(there.to_json())["arch"]["image_size"] == [24, 48]
    assert ModelSpec.from_json(there.to_json(), where="here") == there
    again, back = there.resized(changed, 32)
    assert again == square
    assert back["pos_embed"].shape == params["pos_embed"].shape


def test_model_folders_open_at_any_shape(tmp_path):
    folder = tiny.save_teacher(tmp_path / "square")
    model = load_model(folder, image_size=WIDE)
    images = vits.pictures(model.spec, 2)
    assert model(images).grid == (3, 6)
    model_folder.save(tmp_path / "wide", model.spec, model.params)
    again = load_model(tmp_path / "wide")
    np.testing.assert_array_equal(again(images).tokens, model(images).tokens)
    with pytest.raises(ValueError, match=r"\(48, 24\) pixels; this model .* \(24, 48\)"):
        again(images.swapaxes(1, 2))
    with pytest.raises(ConfigError, match="24 x 50: width 50 .* patch_size 8; use 48 or 56"):
        load_model(folder, image_size=(24, 50))
    with pytest.raises(ConfigError, match="32 x 64: a Swin network takes square images only"):
        load_model(tiny.save_swin(tmp_path / "swin"), image_size=(32, 64))


def test_code_that_needs_squares_refuses_other_shapes(tmp_path):
    folder = tiny.save_teacher(tmp_path / "wide", image_size=list(WIDE))
    with pytest.raises(ConfigError, match="24 x 48: a teacher in training takes square"):
        DistillTask(tiny.config(folder))


def test_only_square_networks_are_exported_to_transformers(tmp_path):
    """Its BeitModel would open a table of another shape and exchange the axes."""
    spec = student("rpb", image_size=list(WIDE))
    with pytest.raises(ConversionError, match="asks for a square input"):
        vits.hugging_face(spec, vits.random_params(spec), tmp_path / "model")


def test_sizes_on_command_lines():
    assert sizes.parse("224") == 224
    assert sizes.parse("224x336") == [224, 336]
    assert sizes.parse("224x224") == 224
    assert sizes.describe([224, 336]) == "224 x 336"
    for text in ("", "x", "224x", "-8", "2e2", "224x336x3", "224 x 336"):
        with pytest.raises(ConfigError, match="expected"):
            sizes.parse(text)


# Networks that see some of the patches.


def chosen(count=KEPT, seed=4, images=3):
    """Other patches for every image, in any order. [B, count] int32."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(PATCHES)[:count] for _ in range(images)]).astype(np.int32)


@functools.cache
def network(name):
    """Parameters, images, and one compiled function for any choice of patches."""
    spec = SPECS[name]
    params, images = vits.random_params(spec), vits.pictures(spec, 3)

    @jax.jit
    def features(params, keep):
        return vits.bind(spec, params)(images, keep=keep)

    return params, images, lambda keep: features(params, keep)


@functools.cache
def whole(name):
    """The feature map of all patches, without any indices."""
    return network(name)[2](None)


@pytest.mark.parametrize("name", SPECS)
def test_whole_pictures_equal_plain_numpy(name):
    params, images, _ = network(name)
    assert relative(whole(name).tokens, numpy_vit.forward(params, SPECS[name].arch, images)) < 1e-5


@pytest.mark.parametrize("name", SPECS)
def test_all_patches_in_their_order_are_the_whole_picture(name):
    keep = np.tile(np.arange(PATCHES, dtype=np.int32), (3, 1))
    features = network(name)[2](keep)
    np.testing.assert_array_equal(features.tokens, whole(name).tokens)
    np.testing.assert_array_equal(features.indices, keep)


@pytest.mark.parametrize("name", SPECS)
def test_patches_in_another_order_give_the_tokens_in_that_order(name):
    keep = chosen(PATCHES)
    features = network(name)[2](keep)
    assert relative(features.tokens, np.asarray(whole(name).at(keep).tokens)) < TOLERANCE
    assert relative(features.on_grid(), np.asarray(whole(name).patches)) < TOLERANCE


@pytest.mark.parametrize("name", SPECS)
def test_some_patches_equal_the_whole_with_all_others_hidden(name):
    params, images, run = network(name)
    keep, arch = chosen(), SPECS[name].arch
    got = run(keep)
    assert got.patches.shape == (3, KEPT, arch["width"])
    want = numpy_vit.forward(params, arch, images, keep=keep)
    assert relative(got.tokens, want) < TOLERANCE
    # Controls: the next patches; and the right patches in the places of the next ones.
    beside = (keep + 1) % PATCHES
    assert relative(run(beside).tokens, want) > 1e-2
    moved = numpy_vit.forward(params, arch, images, keep=keep, places=beside)
    assert relative(got.tokens, moved) > 1e-2
    assert relative(whole(name).at(keep).tokens, want) > 1e-2


@pytest.mark.parametrize(
    "name",
    ["shared_rpb", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ape", "rpb", "rope"))],
)
def test_gradients_and_recomputation(name):
    """With every patch named, gradients are those of the whole; also where blocks recompute."""
    spec = SPECS[name]
    params, images, _ = network(name)
    everything = np.tile(np.arange(PATCHES, dtype=np.int32), (3, 1))

    @functools.partial(jax.jit, static_argnames="remat")
    def gradients(params, keep, remat=None):
        def loss(params):
            out = vits.bind(spec, params, remat=remat)(images, keep=keep)
            return jnp.mean(jnp.sin(out.tokens))

        return jax.grad(loss)(params)

    want = gradients(params, None)
    # A bias of keys changes no softmax: its gradient is the rounding of others.
    rounding = 1e-7 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(want))
    for got in (gradients(params, everything), gradients(params, everything, remat="full")):
        for leaf, reference in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            atol = 2e-5 * np.abs(reference).max() + rounding
            np.testing.assert_allclose(leaf, reference, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["rpb", "rope", "ape"])
def test_attention_maps_of_some_patches(name):
    spec = SPECS[name]
    params, images, _ = network(name)
    keep = chosen()

    @jax.jit
    def maps(params, keep):
        (found,) = vits.bind(spec, params).attention_maps(images, [0], keep=keep)
        return found, found.logits(), found.positions()

    found, logits, positions = maps(params, keep)
    np.testing.assert_array_equal(positions, np.stack(np.divmod(keep, 6), axis=-1))
    prefix = np.tile(np.arange(found.prefix), (3, 1))
    tokens = np.concatenate([prefix, keep + found.prefix], axis=1)
    _, every, _ = maps(params, None)  # the first block sees tokens that are the same in both
    for image, kept in enumerate(tokens):
        want = np.asarray(every[image])[:, kept][:, :, kept]
        np.testing.assert_allclose(logits[image], want, atol=TOLERANCE * np.abs(want).max())


def test_intermediates_know_their_patches():
    params, images, run = network("ape")
    keep = chosen()
    last = vits.bind(SPECS["ape"], params).intermediates(images, [1], keep=keep)[0]
    np.testing.assert_array_equal(last.indices, keep)
    normalised = vits.bind(SPECS["ape"], params).norm(last.tokens)
    assert relative(normalised, np.asarray(run(keep).tokens)) < TOLERANCE


def test_patches_return_to_their_places():
    keep = np.array([[4, 0], [5, 2]], np.int32)
    tokens = np.arange(2 * 3 * 1, dtype=np.float32).reshape(2, 3, 1)
    some = FeatureMap(jnp.asarray(tokens), cls=1, registers=0, grid=(2, 3), indices=keep)
    grid = np.full((2, 6, 1), -1, np.float32)
    grid[0, [4, 0]], grid[1, [5, 2]] = tokens[0, 1:], tokens[1, 1:]
    np.testing.assert_array_equal(some.on_grid(fill=-1.0), grid)
    with pytest.raises(ValueError, match="a feature map of all patches"):
        some.at(keep)


def test_patches_outside_the_grid():
    params, images, run = network("ape")
    outside = chosen()
    outside[1, 3] = PATCHES
    finite = np.isfinite(np.asarray(run(outside).tokens)).all(axis=(1, 2))
    assert finite.tolist() == [True, False, True]
    module = vits.bind(SPECS["ape"], params)
    for wrong in (chosen()[0], chosen(images=2), chosen().astype(np.float32)):
        with pytest.raises(ValueError, match=r"expected whole numbers \[B, P\]"):
            module(images, keep=jnp.asarray(wrong))
