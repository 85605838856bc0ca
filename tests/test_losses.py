"""Target normalisations and losses against torch and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fd_jax import losses


@pytest.fixture
def tokens():
    rng = np.random.default_rng(0)
    # A large common part, as in real feature maps, so that cancellation errors become visible.
    return (rng.normal(size=(4, 9, 64)) + 30 * rng.normal(size=64)).astype(np.float32)


def test_whiten_equals_torch_layer_norm_without_affine(tokens):
    want = torch.nn.functional.layer_norm(torch.from_numpy(tokens).double(), (64,), eps=1e-5)
    np.testing.assert_allclose(losses.whiten(tokens), want.numpy(), atol=2e-6)


def test_whiten_with_another_eps_differs_from_torch():
    small = np.random.default_rng(0).normal(scale=1e-2, size=(4, 64)).astype(np.float32)
    want = torch.nn.functional.layer_norm(torch.from_numpy(small), (64,), eps=1e-5).numpy()
    np.testing.assert_allclose(losses.whiten(small), want, atol=2e-6)
    assert np.abs(losses.whiten(small, eps=1e-6) - want).max() > 1e-3


def test_whiten_takes_bfloat16_and_gives_float32(tokens):
    assert losses.whiten(jnp.asarray(tokens, jnp.bfloat16)).dtype == jnp.float32


def test_l2_target_equals_torch(tokens):
    want = torch.nn.functional.normalize(torch.from_numpy(tokens), dim=-1, eps=1e-12)
    np.testing.assert_allclose(losses.l2_normalize(tokens), want.numpy(), atol=1e-7)
    np.testing.assert_array_equal(losses.l2_normalize(jnp.zeros((2, 3))), 0)


def test_smooth_l1_has_the_expected_spot_values():
    distance = jnp.array([0.0, 1.0, 2.0, 3.0, -5.0])
    np.testing.assert_allclose(
        losses.smooth_l1(distance, jnp.zeros(5), beta=2.0), [0, 0.25, 1, 2, 4]
    )


def test_smooth_l1_and_its_gradient_equal_torch():
    rng = np.random.default_rng(1)
    prediction, target = rng.normal(scale=3, size=(2, 5, 7, 11)).astype(np.float32)
    p = torch.from_numpy(prediction).requires_grad_()
    want = torch.nn.functional.smooth_l1_loss(p, torch.from_numpy(target), beta=2.0)
    want.backward()

    def loss(prediction):
        return jnp.mean(losses.smooth_l1(prediction, target, beta=2.0))

    got, grad = jax.value_and_grad(loss)(prediction)
    np.testing.assert_allclose(got, want.item(), rtol=1e-6)
    np.testing.assert_allclose(grad, p.grad.numpy(), rtol=1e-5, atol=1e-9)
    closed = np.clip((prediction - target) / 2, -1, 1) / prediction.size
    np.testing.assert_allclose(grad, closed, rtol=1e-5, atol=1e-9)
    wrong = jax.grad(lambda p: jnp.mean(losses.smooth_l1(p, target, beta=1.0)))(prediction)
    assert np.abs(wrong - closed).max() > 1e-4


def test_cross_entropy_equals_torch():
    rng = np.random.default_rng(2)
    logits = rng.normal(scale=4, size=(6, 10)).astype(np.float32)
    target = rng.dirichlet(np.ones(10), size=6).astype(np.float32)
    want = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(target), reduction="none"
    )
    np.testing.assert_allclose(losses.cross_entropy(logits, target), want.numpy(), rtol=2e-6)


def segmented(seed=0):
    """Logits [2, 5, 4, 6] and a mask [2, 16, 13] of six classes, a third of it ignored."""
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 6, (2, 16, 13)).astype(np.uint8)
    mask[rng.random(mask.shape) < 0.3] = 255
    mask[1, 8:] = 255  # so that the two examples ignore different shares
    return rng.normal(scale=3, size=(2, 5, 4, 6)).astype(np.float32), mask


def torch_pixels(logits, mask):
    """torch's loss of each pixel [B, H, W], 0 where it is ignored."""
    resized = torch.nn.functional.interpolate(
        logits.permute(0, 3, 1, 2), mask.shape[1:], mode="bilinear", align_corners=False
    )
    label = torch.from_numpy(mask.astype(np.int64))
    return torch.nn.functional.cross_entropy(resized, label, ignore_index=255, reduction="none")


def test_pixel_cross_entropy_and_its_gradient_equal_torch():
    logits, mask = segmented()
    tensor = torch.from_numpy(logits).double().requires_grad_()
    want = torch_pixels(tensor, mask).mean(dim=(1, 2))
    want.sum().backward()
    got, gradient = jax.vjp(lambda x: losses.pixel_cross_entropy(x, mask), logits)
    np.testing.assert_allclose(got, want.detach(), rtol=1e-6)
    np.testing.assert_allclose(gradient(jnp.ones(2))[0], tensor.grad, atol=1e-7)


def test_pixel_cross_entropy_counts_ignored_pixels():
    logits, mask = segmented()
    over_labelled = torch_pixels(torch.from_numpy(logits), mask).sum((1, 2)).numpy()
    over_labelled /= (mask != 255).sum((1, 2))
    assert np.abs(losses.pixel_cross_entropy(logits, mask) - over_labelled).min() > 0.1
    np.testing.assert_array_equal(
        losses.pixel_cross_entropy(logits, np.full_like(mask, 255)), [0, 0]
    )


def test_cosine_similarity_equals_torch(tokens):
    other = np.roll(tokens, 1, axis=0)
    want = torch.nn.functional.cosine_similarity(
        torch.from_numpy(tokens), torch.from_numpy(other), dim=-1
    )
    np.testing.assert_allclose(losses.cosine_similarity(tokens, other), want.numpy(), atol=1e-6)


def plain_distance(name, prediction, target, beta):
    """A distance of one example by its definition, token by token in float64. [T, D] x 2"""

    def cosine(a, b):
        return (a @ b) / np.linalg.norm(a) / np.linalg.norm(b)

    p, t = prediction.astype(np.float64), target.astype(np.float64)
    if name == "smooth_l1":
        apart = np.abs(p - t)
        return np.where(apart < beta, apart**2 / (2 * beta), apart - beta / 2).mean()
    if name == "mse":
        return ((p - t) ** 2).mean()
    if name == "cosine":
        return np.mean([1 - cosine(a, b) for a, b in zip(p, t, strict=True)])
    pairs = [(i, j) for i in range(len(p)) for j in range(len(p))]
    return np.mean([(cosine(p[i], p[j]) - cosine(t[i], t[j])) ** 2 for i, j in pairs])


@pytest.mark.parametrize("name", losses.DISTANCES)
def test_distances_equal_their_definitions(name):
    rng = np.random.default_rng(7)
    prediction, target = rng.normal(scale=2, size=(2, 3, 5, 8)).astype(np.float32)
    pairs = list(zip(prediction, target, strict=True))
    want = {
        other: [plain_distance(other, *pair, 1.5) for pair in pairs] for other in losses.DISTANCES
    }
    got = losses.DISTANCES[name](prediction, target, 1.5)
    np.testing.assert_allclose(got, want.pop(name), rtol=2e-6)
    # Negative control: the other distances differ.
    assert all(np.abs(np.array(other) - got).min() > 1e-2 for other in want.values())


def test_relations_do_not_change_if_all_tokens_turn_together():
    """A rotation changes every token, but no angle between two of them."""
    rng = np.random.default_rng(8)
    target = rng.normal(size=(2, 6, 8)).astype(np.float32)
    turned = target @ np.linalg.qr(rng.normal(size=(8, 8)))[0].astype(np.float32)
    np.testing.assert_allclose(losses.DISTANCES["relation"](3 * turned, target, 1.0), 0, atol=1e-9)
    assert np.min(losses.DISTANCES["cosine"](turned, target, 1.0)) > 0.1
