"""Normalisations against plain numpy in float64, from the tokens themselves."""

import numpy as np
import pytest
import scipy.linalg

from fd_jax.normalization import hadamard, kinds, spectrum

WIDTH, COUNT = 12, 4000


@pytest.fixture(scope="module")
def tokens():
    """Tokens [N, D] with correlated channels of unequal size, and with a common part."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(COUNT, WIDTH)) * np.geomspace(3, 0.3, WIDTH)
    return mixed @ rng.normal(size=(WIDTH, WIDTH)) + 4 * rng.normal(size=WIDTH)


@pytest.fixture(scope="module")
def measured(tokens):
    return spectrum.Spectrum.of(COUNT, tokens.mean(axis=0), covariance(tokens))


def covariance(tokens):
    return np.cov(tokens.T, bias=True)


def normalized(kind, tokens, measured):
    constants = kinds.fitted_constants(kind, measured)
    return np.asarray(kinds.KINDS[kind].apply(tokens.astype(np.float32), constants), np.float64)


def reference(kind, tokens):
    """Each kind by its definition; nothing here uses the module's spectrum."""
    centred = tokens - tokens.mean(axis=0)
    axes = scipy.linalg.svd(centred, full_matrices=False)[2]  # a direction in each row
    axes *= np.sign(axes[np.arange(WIDTH), np.abs(axes).argmax(axis=1)])[:, None]
    deviations = (centred @ axes.T).std(axis=0)
    spread = hadamard.matrix(WIDTH) / np.sqrt(WIDTH)
    if kind == "phi_s":
        return centred @ axes.T @ spread.T / np.sqrt((centred**2).mean())
    if kind == "zca":
        return centred @ scipy.linalg.fractional_matrix_power(covariance(tokens), -0.5)
    whitened = centred @ axes.T / deviations
    return whitened if kind == "pca" else whitened @ spread.T


FITTED = [name for name, kind in kinds.KINDS.items() if kind.constants == "fitted"]


@pytest.mark.parametrize("kind", FITTED)
def test_fitted_kinds_equal_their_definition(kind, tokens, measured):
    got, want = normalized(kind, tokens, measured), reference(kind, tokens)
    np.testing.assert_allclose(got, want, atol=1e-4)
    for other in FITTED:  # negative control: the same tolerance tells them apart
        assert other == kind or np.abs(reference(other, tokens) - want).max() > 0.3


@pytest.mark.parametrize("kind", ["pca", "zca", "hadamard"])
def test_whitened_tokens_have_the_identity_as_their_covariance(kind, tokens, measured):
    np.testing.assert_allclose(
        covariance(normalized(kind, tokens, measured)), np.eye(WIDTH), atol=1e-4
    )


def test_phi_s_gives_every_channel_the_variance_1_by_one_scale(tokens, measured):
    """Distances between tokens all shrink by one factor, as under no other kind."""
    pairs = tokens[:50, None] - tokens[None, :50]
    distances = np.linalg.norm(pairs, axis=-1)

    def ratios(kind):
        found = normalized(kind, tokens[:50], measured)
        apart = np.linalg.norm(found[:, None] - found[None], axis=-1)
        return (apart[distances > 0] / distances[distances > 0]).std()

    np.testing.assert_allclose(normalized("phi_s", tokens, measured).var(axis=0), 1, atol=1e-4)
    assert ratios("phi_s") < 1e-4 < min(ratios("pca"), ratios("zca"), ratios("hadamard"))


@pytest.mark.parametrize("kind", FITTED)
def test_a_direction_that_a_norm_leaves_empty_does_not_become_noise(kind, tokens):
    """Tokens after a LayerNorm without bias have the mean 0 over their channels."""
    flat = tokens - tokens.mean(axis=1, keepdims=True)
    flat += np.random.default_rng(1).normal(scale=1e-6, size=flat.shape)  # as rounding does
    found = spectrum.Spectrum.of(COUNT, flat.mean(axis=0), covariance(flat))
    assert normalized(kind, flat, found).var(axis=0).max() < 1 + 1e-3


def test_too_few_tokens_and_tokens_that_do_not_differ_are_refused(tokens):
    def of(rows):
        return spectrum.Spectrum.of(len(rows), rows.mean(axis=0), covariance(rows))

    kinds.fitted_constants("phi_s", of(tokens[:WIDTH]))
    with pytest.raises(ValueError, match="12 tokens have no variance along some of 12 directions"):
        kinds.fitted_constants("pca", of(tokens[:WIDTH]))
    with pytest.raises(ValueError, match="20 tokens are all the same"):
        kinds.fitted_constants("phi_s", of(np.ones((20, WIDTH))))
    with pytest.raises(ValueError, match="no Hadamard matrix of 10 rows"):
        kinds.fitted_constants("phi_s", of(tokens[:, :10]))


def test_sums_of_padded_batches_have_the_covariance_of_all_tokens(tokens):
    """Float32 sums about zero would lose what differs: the mean is a hundred deviations away."""
    far = tokens + 1e4
    near = far[:100].mean(axis=0).astype(np.float32)
    exact, naive = spectrum.Moments(near), spectrum.Moments(np.zeros(WIDTH))
    for batch in far.reshape(10, 40, 10, WIDTH).astype(np.float32):
        padded = np.concatenate([batch, np.full((3, 10, WIDTH), 7, np.float32)])
        weight = np.r_[np.ones(40), np.zeros(3)].astype(np.float32)
        exact.add(spectrum.sums_about(near, padded, weight))
        naive.add(spectrum.sums_about(np.zeros(WIDTH, np.float32), padded, weight))
    stored = far.astype(np.float32).astype(np.float64)
    assert exact.tokens == COUNT
    np.testing.assert_allclose(exact.spectrum().mean, stored.mean(axis=0), rtol=1e-8)
    scale = np.abs(covariance(stored)).max()
    error = np.abs(exact.spectrum().covariance - covariance(stored)).max()
    assert error < 2e-5 * scale
    assert np.abs(naive.spectrum().covariance - covariance(stored)).max() > 1e-2 * scale


def test_running_statistics_are_those_of_all_steps():
    rng = np.random.default_rng(3)
    steps = rng.normal(size=(5, 8, 6, WIDTH)) * rng.uniform(0.1, 3, WIDTH) + 30
    weight = np.r_[np.ones(7), 0].astype(np.float32)
    known = kinds.first_constants(WIDTH)
    for step, tokens in enumerate(steps):
        known = kinds.measured_constants(known, tokens.astype(np.float32), weight, np.int32(step))
    rows = steps[:, :7].reshape(-1, WIDTH)
    np.testing.assert_allclose(known["mean"], rows.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(known["variance"], rows.var(axis=0), rtol=1e-4)
    got = kinds.KINDS["standardize"].apply(steps[0].astype(np.float32), known)
    want = (steps[0] - rows.mean(axis=0)) / np.sqrt(rows.var(axis=0) + 1e-5)
    np.testing.assert_allclose(got, want, atol=1e-4)
    padded = steps.reshape(-1, WIDTH)  # negative control: padding would be seen
    assert np.abs(padded.mean(axis=0) - rows.mean(axis=0)).max() > 1e-3


def test_unknown_statistics_change_nothing_but_the_deviation():
    tokens = np.random.default_rng(4).normal(size=(2, 3, WIDTH)).astype(np.float32)
    got = kinds.KINDS["standardize"].apply(tokens, kinds.first_constants(WIDTH))
    np.testing.assert_allclose(got, tokens, rtol=1e-5)


def test_raw_tokens_are_unchanged_and_unit_tokens_have_length_1(tokens):
    rows = tokens.astype(np.float32)
    np.testing.assert_array_equal(kinds.KINDS["none"].apply(rows, {}), rows)
    want = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    np.testing.assert_allclose(kinds.KINDS["l2"].apply(rows, {}), want, atol=1e-6)
