"""Figures of one picture against plain numpy, over transformers' attention and features."""

import json

import jax
import numpy as np
import pytest
import torch

from fd_jax.diagnose import picture
from fd_jax.errors import ConfigError, DataError
from fd_jax.inference import Model
from tests import tiny
from tests.models import convnexts, swins, vits

TOLERANCE = 1e-6
DEPTH = 3


def vit(**arch):
    spec = tiny.teacher_spec(**{"width": 16, "heads": 2, "mlp_width": 32, "depth": DEPTH, **arch})
    return Model(spec, {"encoder": sharpened(vits.random_params(spec))})


def swin():
    """Grids of 8, 8 and 4: two windowed blocks, of which one is shifted, and a global one."""
    spec = swins.spec(1, patch_size=4, embed_width=8, depths=[2, 1], heads=[2, 4])
    return Model(spec, {"encoder": sharpened(swins.random_params(spec))})


def sharpened(params):
    """The same network with queries four times as long, so that attention is far from uniform."""
    for name, value in params.items():
        if name == "qkv":
            value["kernel"][:, 0] *= 4
        elif isinstance(value, dict):
            sharpened(value)
    return params


def photo(height=32, width=32):
    return np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)


def normalized(model, pixels):
    scaled = pixels[None].astype(np.float32) * np.float32(model.spec.pixel_scale)
    return ((scaled - model.spec.mean) / model.spec.std).astype(np.float32)


def their(model, pixels, folder):
    """transformers' attention of every block [A, N, N], float64, and its final tokens [N, D]."""
    encoder = model.params["encoder"]
    theirs = (
        vits.hugging_face(model.spec, encoder, folder)
        if model.spec.family == "vit"
        else swins.hf_model(model.spec, encoder, folder)
    )
    theirs.set_attn_implementation("eager")
    images = torch.from_numpy(np.moveaxis(normalized(model, pixels), -1, 1).copy())
    with torch.no_grad():
        out = theirs(images, output_attentions=True)
    return [a[0].double().numpy() for a in out.attentions], out.last_hidden_state[0].numpy()


def our_attentions(model, pixels):
    @jax.jit
    def run(params, images):
        network = vits.bind(model.spec, params)
        maps = network.attention_maps(images, range(network.depth))
        return [attention.weights()[0] for attention in maps]

    weights = run(model.params["encoder"], normalized(model, pixels))
    return [np.asarray(block, np.float64) for block in weights]


def plain_rollout(attentions, *, fuse=np.mean, residual=0.5, backwards=False):
    """The whole product [N, N], from the first block on."""
    product = np.eye(attentions[0].shape[-1])
    for weights in attentions:
        mixed = (1 - residual) * fuse(weights, axis=0) + residual * np.eye(len(product))
        mixed = mixed / mixed.sum(axis=-1, keepdims=True)
        product = product @ mixed if backwards else mixed @ product
    return product


def near(got, want, tolerance=TOLERANCE):
    return np.allclose(got, np.reshape(want, np.shape(got)), atol=tolerance, rtol=0)


VITS = {"class token": (1, {}), "registers": (4, {"registers": 3, "layer_scale": 0.5})}


@pytest.mark.parametrize("name", VITS)
def test_rollout_equals_a_loop_over_transformers_attention(name, tmp_path):
    prefix, arch = VITS[name]
    model = vit(**arch)
    got = picture.figures(model, photo(), ["rollout"])
    assert got["picture"] == {"layer": DEPTH - 1, "query": "class"}
    attentions, _ = their(model, photo(), tmp_path / "model")
    assert np.shape(got["rollout"]) == (4, 4)

    def agrees(product, first=prefix):
        return near(got["rollout"], product[0, first : first + 16])

    assert agrees(plain_rollout(attentions))
    # Controls: what other authors do, and mistakes.
    assert not agrees(plain_rollout(attentions, fuse=np.max))
    assert not agrees(plain_rollout(attentions, residual=0))
    assert not agrees(plain_rollout(attentions, backwards=True))
    assert not agrees(plain_rollout(attentions).T)
    assert not agrees(plain_rollout(attentions), first=prefix - 1)
    if prefix > 1:
        assert not agrees(plain_rollout(attentions), first=1)  # registers as the first patches
        early = [np.delete(np.delete(a, (1, 2, 3), 1), (1, 2, 3), 2) for a in attentions]
        assert not agrees(plain_rollout(early), first=1)  # registers removed before the product


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("layer", [0, -1])
def test_heads_equal_transformers_attention(name, layer, tmp_path):
    prefix, arch = VITS[name]
    model = vit(**arch)
    got = picture.figures(model, photo(), ["heads"], layer=layer)
    assert got["picture"] == {"layer": layer % DEPTH, "query": "class"}
    assert np.shape(got["heads"]) == (2, 4, 4)
    weights = their(model, photo(), tmp_path / "model")[0][layer]
    assert near(got["heads"], weights[:, 0, prefix:])
    assert not near(got["heads"], weights[:, prefix:, 0])  # seen by, not seen from, the class token
    assert not near(got["heads"], weights[:, prefix:, prefix:].mean(axis=1))
    assert not near(got["heads"], weights[::-1, 0, prefix:])
    rows = weights[:, 0, prefix:]
    assert not near(got["heads"], rows / rows.sum(axis=-1, keepdims=True))


def test_without_a_class_token_patches_are_averaged_as_queries():
    model = vit(cls_token=False, registers=2, position="rope")
    got = picture.figures(model, photo(), ["rollout", "heads"], layer=1)
    assert got["picture"] == {"layer": 1, "query": "mean"}
    attentions = our_attentions(model, photo())
    product = plain_rollout(attentions)
    assert near(got["rollout"], product[2:, 2:].mean(axis=0))
    assert not near(got["rollout"], product[:, 2:].mean(axis=0))  # registers as queries
    assert near(got["heads"], attentions[1][:, 2:, 2:].mean(axis=1))
    assert not near(got["heads"], attentions[1][:, :, 2:].mean(axis=1))


def test_a_convnext_has_colours_and_no_maps():
    spec = convnexts.spec("v1", image_size=64)
    model = Model(spec, {"encoder": convnexts.random_params(spec)})
    assert np.shape(picture.figures(model, photo(64, 64), ["pca"])["pca"]) == (2, 2, 3)
    for name in ("rollout", "heads"):
        with pytest.raises(ConfigError, match=f"{name}: undefined for a network without attention"):
            picture.figures(model, photo(64, 64), ["pca", name])


def test_maps_of_a_wide_picture_are_wide():
    model = vit(image_size=[24, 40])
    got = picture.figures(model, photo(24, 40), picture.FIGURES)
    assert np.shape(got["pca"]) == (3, 5, 3)
    attentions = our_attentions(model, photo(24, 40))
    want = plain_rollout(attentions)[0, 1:]
    np.testing.assert_allclose(got["rollout"], want.reshape(3, 5), atol=TOLERANCE)
    np.testing.assert_allclose(
        got["heads"], attentions[-1][:, 0, 1:].reshape(2, 3, 5), atol=TOLERANCE
    )
    assert not near(got["rollout"], want.reshape(5, 3).T)


def plain_colours(patches):
    """Projections on the eigenvectors of the covariance, from the 1st to the 99th percentile."""
    centred = patches.astype(np.float64) - patches.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    found = centred @ vectors[:, :-4:-1]
    low, high = np.percentile(found, [1, 99], axis=0)
    return np.clip((found - low) / (high - low), 0, 1)


@pytest.mark.parametrize("name", [*VITS, "swin"])
def test_colours_are_principal_components_of_the_final_patches(name, tmp_path):
    prefix, arch = VITS.get(name, (0, {}))
    model = swin() if name == "swin" else vit(**arch)
    got = np.reshape(picture.figures(model, photo(), ["pca"])["pca"], (16, 3))
    tokens = their(model, photo(), tmp_path / "model")[1]

    def agrees(want):  # the sign of a component is arbitrary
        flipped = np.abs(got - (1 - want)).max(axis=0)
        return np.minimum(np.abs(got - want).max(axis=0), flipped).max() < 1e-3

    assert agrees(plain_colours(tokens[prefix:]))
    assert not agrees(plain_colours(tokens[prefix:])[:, ::-1])  # the order of components
    assert not agrees(plain_colours(tokens[prefix:][::-1]))
    if prefix:
        assert not agrees(plain_colours(tokens)[prefix:])  # class token and registers kept


def test_heads_of_a_swin_exist_where_a_window_is_the_grid(tmp_path):
    model = swin()
    got = picture.figures(model, photo(), ["heads"])
    assert got["picture"] == {"layer": 2, "query": "mean"}
    weights = their(model, photo(), tmp_path / "model")[0][-1]
    assert weights.shape == (4, 16, 16)
    assert near(got["heads"], weights.mean(axis=1))
    assert not near(got["heads"], weights.mean(axis=2))
    with pytest.raises(ConfigError, match=r"layer 1: the grid \(8, 8\) of this Swin .* 4 windows"):
        picture.figures(model, photo(), ["heads"], layer=1)
    with pytest.raises(ConfigError, match="rollout is undefined for a Swin"):
        picture.figures(model, photo(), ["rollout"])


def test_figures_are_those_asked_for_and_ready_for_json():
    model = vit()
    assert picture.figures(model, photo(), ["distance", "cka"]).keys() == {"picture"}
    got = picture.figures(model, photo(), [*picture.FIGURES, "rank"])
    assert got.keys() == {"pca", "rollout", "heads", "picture"}
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert 0 <= np.min(got["pca"]) < np.max(got["pca"]) <= 1


@pytest.mark.parametrize(
    "pixels,layer,message",
    [
        (photo(40, 40), -1, r"\(40, 40, 3\) .* takes uint8 \(32, 32, 3\)"),
        (photo().astype(np.float32), -1, "dtype float32"),
        (photo()[..., 0], -1, r"shape \(32, 32\)"),
        (photo(), 3, "layer=3: the network has 3 blocks; expected 0 to 2, or -3 to -1"),
        (photo(), -4, "layer=-4"),
    ],
)
def test_wrong_pictures_and_layers_are_refused(pixels, layer, message):
    with pytest.raises(ConfigError, match=message):
        picture.figures(vit(), pixels, ["heads"], layer=layer)


def test_colours_need_three_directions():
    with pytest.raises(ConfigError, match="pca: the grid of patches, 1 x 1, has fewer"):
        picture.figures(vit(patch_size=32), photo(), ["pca"])
    blank = np.full((32, 32, 3), 90, np.uint8)
    with pytest.raises(DataError, match="do not vary in three directions"):
        picture.figures(vit(position="none"), blank, ["pca"])
