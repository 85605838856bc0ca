"""Effective rank, CKA and cosine against plain numpy in float64, and against transformers."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from fd_jax import sharding
from fd_jax.diagnose.representations import Comparison, Rank, effective_rank, linear_cka
from fd_jax.errors import ConfigError, DataError
from fd_jax.inference import Model
from tests import tiny
from tests.models import swins, vits

IMAGES = 13
BOTH = ("cka", "cosine")
TOLERANCE = 2e-6  # relative; features are float32


def vit(seed=0, **arch):
    spec = tiny.teacher_spec(**{"width": 16, "heads": 2, "mlp_width": 32, **arch})
    return Model(spec, {"encoder": vits.random_params(spec, seed)})


def swin():
    """Grids of 8, 8 and 4, with 8, 8 and 16 channels; the second block shifts its windows."""
    spec = swins.spec(1, patch_size=4, embed_width=8, depths=[2, 1], heads=[2, 2])
    return Model(spec, {"encoder": swins.random_params(spec)})


MODELS = {
    "class token": vit,
    "registers": lambda: vit(1, registers=3, layer_scale=0.5),
    "no class token": lambda: vit(2, cls_token=False, position="rope"),
    "not square": lambda: vit(3, image_size=[32, 16]),
    "swin": swin,
}


def photos(count=IMAGES, size=(32, 32), seed=0):
    """Noise of random colour and contrast, so that images differ and not only their patches."""
    rng = np.random.default_rng(seed)
    colour, contrast = rng.uniform(60, 200, (count, 1, 1, 3)), rng.uniform(5, 60, (count, 1, 1, 1))
    noise = rng.normal(size=(count, *size, 3))
    return np.clip(colour + contrast * noise, 0, 255).astype(np.uint8)


def measured(measurement, images, batch_size=IMAGES, devices=1):
    """The figures from batches of one size, the last one padded with white of weight 0."""
    split = sharding.batch_sharding(sharding.make_mesh(devices=jax.devices()[:devices]))
    sums, totals = jax.jit(measurement.sums), {}
    for start in range(0, len(images), batch_size):
        rows = images[start : start + batch_size]
        padded = np.full((batch_size, *images.shape[1:]), 255, np.uint8)
        padded[: len(rows)] = rows
        weight = (np.arange(batch_size) < len(rows)).astype(np.float32)
        batch = jax.device_put({"image": padded, "weight": weight}, split)
        for name, value in sums(measurement.params, batch).items():
            assert value.dtype == np.float32
            totals[name] = totals.get(name, 0) + np.asarray(value, np.float64)
    return measurement.figures(totals, len(images))


def normalized(model, images):
    pixels = images.astype(np.float32) * np.float32(model.spec.pixel_scale)
    return ((pixels - model.spec.mean) / model.spec.std).astype(np.float32)


def maps_of(model, images):
    @jax.jit
    def run(params, images):
        network = vits.bind(model.spec, params)
        return network.intermediates(images, range(network.depth))

    return run(model.params["encoder"], normalized(model, images))


def patches(model, images):
    """Patch tokens after every block, [B, P, D] float64."""
    return [np.asarray(after.patches, np.float64) for after in maps_of(model, images)]


def everything(model, images):
    """All tokens after every block, [B, N, D] float64."""
    return [np.asarray(after.tokens, np.float64) for after in maps_of(model, images)]


def plain_rank(tokens, *, centred=True, power=1.0):
    rows = tokens.reshape(-1, tokens.shape[-1])
    rows = rows - rows.mean(axis=0) if centred else rows
    weights = np.linalg.svd(rows, compute_uv=False) ** (2 * power)
    shares = weights / weights.sum()
    return np.exp(-sum(p * np.log(p) for p in shares if p > 0))


def gram_cka(x, y, *, centred=True):
    """CKA by the definition: both Gram matrices of all rows, with rows and columns centred."""
    grams = []
    for rows in (x, y):
        rows = rows.reshape(-1, rows.shape[-1])
        centre = np.eye(len(rows)) - (1 / len(rows) if centred else 0)
        grams.append(centre @ (rows @ rows.T) @ centre)
    k, m = grams
    return np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m))


def plain_cosine(x, y):
    found = [
        a @ b / np.sqrt((a @ a) * (b @ b))
        for one, other in zip(x, y, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    return np.mean(found)


def assert_differs(got, want):
    """Control: a wrong definition is seen in every block."""
    assert np.all(np.abs(np.array(got) / np.array(want) - 1) > 100 * TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_rank_equals_singular_values_of_all_tokens(name):
    model = MODELS[name]()
    images = photos(size=(32, 16) if name == "not square" else (32, 32))
    got = measured(Rank("net", model), images)["rank"]
    tokens = patches(model, images)
    np.testing.assert_allclose(got, [plain_rank(x) for x in tokens], rtol=TOLERANCE)
    assert_differs(got, [plain_rank(x, centred=False) for x in tokens])
    assert_differs(got, [plain_rank(x, power=0.5) for x in tokens])
    assert_differs(got, [plain_rank(x.mean(axis=1)) for x in tokens])
    if name in ("class token", "registers"):
        assert_differs(got, [plain_rank(x) for x in everything(model, images)])


def test_rank_of_known_eigenvalues():
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]

    def rank(*eigenvalues):
        axes = rotation[:, : len(eigenvalues)]
        return effective_rank(axes @ np.diag(eigenvalues) @ axes.T)

    assert rank(7.0) == pytest.approx(1, abs=1e-12)
    assert rank(1.0, 1.0, 1.0) == pytest.approx(3, abs=1e-12)
    assert rank(3.0, 3.0, 3.0, 3.0, 3.0) == pytest.approx(5, abs=1e-12)
    assert rank(0.2, 0.1, 0.1) == pytest.approx(2**1.5, abs=1e-12)  # shares 1/2, 1/4, 1/4


@pytest.mark.parametrize("directions", [1, 4, 12])
def test_rank_of_an_isotropic_gaussian_is_its_dimension(directions):
    rng = np.random.default_rng(1)
    frame = np.linalg.qr(rng.normal(size=(24, 24)))[0][:directions]
    rows = 5 + rng.normal(size=(20_000, directions)) @ frame
    covariance = np.cov(rows.T, bias=True)
    assert effective_rank(covariance) == pytest.approx(directions, rel=1e-3)


def test_a_large_common_mean_does_not_cost_digits():
    """Residual streams have channels whose mean is hundreds of times their deviation."""
    model = vit()
    bias = model.params["encoder"]["patch_embed"]["bias"]
    bias += 500 * np.sign(np.random.default_rng(2).normal(size=bias.shape)).astype(np.float32)
    images = photos()
    tokens = patches(model, images)
    deviations = np.abs(tokens[0].mean(axis=(0, 1))) / tokens[0].std(axis=(0, 1))
    assert np.median(deviations) > 200
    want = [plain_rank(x) for x in tokens]
    rank = Rank("net", model)
    np.testing.assert_allclose(measured(rank, images)["rank"], want, rtol=TOLERANCE)
    # Control: sums about zero lose them.
    rank.params = {**rank.params, "shift": [0 * shift for shift in rank.params["shift"]]}
    assert_differs(measured(rank, images)["rank"], want)


@pytest.mark.parametrize("rows", ["patches", "images"])
def test_cka_equals_gram_matrices_of_all_rows(rows):
    images = photos(24)
    if rows == "patches":
        models = vit(0), vit(1, width=24, registers=3)
    else:
        models = vit(0, depth=3), swin()
    got = measured(Comparison(("a", "b"), *models, BOTH), images, batch_size=16)
    assert got["rows"] == rows
    assert "cosine" not in got  # widths differ
    tokens = [patches(model, images) for model in models]
    means = [[x.mean(axis=1) for x in blocks] for blocks in tokens]
    pairs = list(zip(*(tokens if rows == "patches" else means), strict=True))
    np.testing.assert_allclose(got["cka"], [gram_cka(*pair) for pair in pairs], rtol=TOLERANCE)
    assert_differs(got["cka"], [gram_cka(*pair, centred=False) for pair in pairs])
    halves = [[gram_cka(x[half::2], y[half::2]) for x, y in pairs] for half in (0, 1)]
    assert_differs(got["cka"], np.mean(halves, axis=0))  # an average over two batches
    assert_differs(got["cka"], [gram_cka(x, y[::-1]) for x, y in pairs])  # other images
    if rows == "patches":
        assert_differs(got["cka"], [gram_cka(x, y[:, ::-1]) for x, y in pairs])  # other places
        assert_differs(got["cka"], [gram_cka(*pair) for pair in zip(*means, strict=True)])


def cka(x, y):
    covariance = np.cov(x.T, y.T, bias=True)
    split = x.shape[1]
    return linear_cka(
        covariance[:split, :split], covariance[split:, split:], covariance[:split, split:]
    )


def test_cka_ignores_rotation_scale_and_offset_and_nothing_else():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(500, 6)) * np.arange(1, 7)
    y = x[:, :4] + rng.normal(size=(500, 4))
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert cka(x, x) == pytest.approx(1, abs=1e-12)
    assert cka(x, -3 * x @ rotation + 7) == pytest.approx(1, abs=1e-12)
    assert cka(x @ rotation, y) == pytest.approx(cka(x, y), abs=1e-12)
    assert cka(y, x) == pytest.approx(cka(x, y), abs=1e-12)
    # Control: a stretch along one axis is no isotropic scale.
    assert cka(x * [9, 1, 1, 1, 1, 1], x) < 0.9


def test_cka_of_independent_features_is_low():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(2, 5000, 8))
    assert cka(x, y) < 0.01
    # Control: with fewer rows than channels it would be close to 1.
    assert cka(*rng.normal(size=(2, 10, 200))) > 0.9


def test_cosine_equals_a_loop_over_tokens():
    model = vit()
    changed = tiny.randomize(model.params["encoder"], 5, scale=0.1)
    models = model, Model(model.spec, {"encoder": changed})
    images = photos()
    got = measured(Comparison(("a", "b"), *models, ["cosine"]), images, batch_size=8)
    assert set(got) == {"cosine"}
    pairs = list(zip(*(patches(model, images) for model in models), strict=True))
    np.testing.assert_allclose(got["cosine"], [plain_cosine(*pair) for pair in pairs], atol=1e-6)
    assert_differs(got["cosine"], [plain_cosine(x, y[:, ::-1]) for x, y in pairs])
    centred = [[x - x.mean(axis=(0, 1)) for x in pair] for pair in pairs]
    assert_differs(got["cosine"], [plain_cosine(*pair) for pair in centred])


def test_a_network_is_like_itself():
    got = measured(Comparison(("a", "a"), vit(), vit(), BOTH), photos())
    np.testing.assert_allclose(got["cka"], 1, atol=1e-6)
    np.testing.assert_allclose(got["cosine"], 1, atol=1e-6)


def test_each_network_has_its_own_input_statistics():
    model = vit()
    models = model, Model(dataclasses.replace(model.spec, mean=(0.1, 0.9, 0.5)), model.params)
    images = photos()
    got = measured(Comparison(("a", "b"), *models, BOTH), images)
    pairs = list(zip(*(patches(model, images) for model in models), strict=True))
    np.testing.assert_allclose(got["cosine"], [plain_cosine(*pair) for pair in pairs], atol=1e-6)
    assert max(got["cosine"]) < 0.999


def test_figures_do_not_depend_on_batches_padding_order_or_devices():
    images = photos()
    for measurement in (Rank("a", vit()), Comparison(("a", "b"), vit(), vit(1), BOTH)):
        want = measured(measurement, images)
        for others, batch_size, devices in ((images[::-1], 4, 1), (images, 8, 8)):
            got = measured(measurement, others, batch_size, devices)
            assert got.pop("rows", None) == want.get("rows")
            for name in got:
                np.testing.assert_allclose(got[name], want[name], rtol=TOLERANCE)


def their_patches(model, images, folder, prefix):
    """transformers' hidden states after every block, without the first `prefix` tokens."""
    theirs = vits.hugging_face(model.spec, model.params["encoder"], folder)
    pixels = torch.from_numpy(np.moveaxis(normalized(model, images), -1, 1).copy())
    blocks, states = [m for m in theirs.modules() if type(m).__name__.endswith("Layer")], []
    for block in blocks:
        block.register_forward_hook(lambda *call: states.append(call[-1]))
    with torch.no_grad():
        theirs(pixels)
    assert len(states) == model.spec.arch["depth"]
    return [state[:, prefix:].double().numpy() for state in states]


def test_figures_equal_those_of_transformers_features(tmp_path):
    images = photos()
    models = vit(0), MODELS["registers"]()
    tokens = [
        their_patches(model, images, tmp_path / str(prefix), prefix)
        for model, prefix in zip(models, (1, 4), strict=True)
    ]
    pairs = list(zip(*tokens, strict=True))
    assert len(pairs) == 2
    got = measured(Comparison(("a", "b"), *models, BOTH), images)
    np.testing.assert_allclose(got["cka"], [gram_cka(*pair) for pair in pairs], rtol=1e-5)
    np.testing.assert_allclose(got["cosine"], [plain_cosine(*pair) for pair in pairs], atol=1e-6)
    got = measured(Rank("net", models[1]), images)["rank"]
    np.testing.assert_allclose(got, [plain_rank(x) for x in tokens[1]], rtol=1e-5)


@pytest.mark.parametrize(
    "make,figures,message",
    [
        (lambda: vit(image_size=40), BOTH, "a takes images of 32 pixels and b of 40; name one"),
        (lambda: vit(depth=3), BOTH, "a has 2 blocks and b has 3, so that no block"),
        (lambda: vit(width=24), ["cosine"], "cosine of a and b: .*widths 16 and 24.*use cka"),
        (lambda: vit(patch_size=16), ["cosine"], r"grids \(4, 4\) and \(2, 2\)"),
    ],
)
def test_networks_that_cannot_be_compared_are_refused(make, figures, message):
    with pytest.raises(ConfigError, match=message):
        Comparison(("a", "b"), vit(), make(), figures)


def test_features_that_do_not_vary_are_refused():
    rank, mean, rows = Rank("net", vit()), np.arange(16.0), 3 * 16
    sums = {}
    for block in range(2):
        sums |= {f"first_{block}": rows * mean, f"second_{block}": rows * np.outer(mean, mean)}
    with pytest.raises(DataError, match=r"net, block 0: .* \(48 rows\)"):
        rank.figures(sums, 3)
    sums["second_0"] += np.eye(16)
    with pytest.raises(DataError, match="net, block 1"):
        rank.figures(sums, 3)
    other = vit(patch_size=16)
    with pytest.raises(DataError, match=r"a, block 0: .* \(1 rows\)"):
        measured(Comparison(("a", "b"), vit(), other, BOTH), photos(1), 1)
