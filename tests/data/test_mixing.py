"""Mixup, CutMix and random erasing against plain numpy and torch-style rules."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fd_jax import sharding
from fd_jax.data import mixing
from fd_jax.errors import ConfigError

SIZE = 16


def pictures(count=6, size=SIZE, seed=0):
    return np.random.default_rng(seed).normal(size=(count, size, size, 3)).astype(np.float32)


def targets(count=6, classes=5, smoothing=0.1):
    labels = np.arange(count) % classes
    return mixing.smooth_one_hot(jnp.asarray(labels), classes, smoothing), labels


def test_smoothed_targets_have_the_published_values():
    """docs/reference.md#mixing: .0001 off and .9001 on for 1000 classes."""
    target = mixing.smooth_one_hot(jnp.array([3]), 1000, 0.1)
    np.testing.assert_allclose(target[0, 3], 0.9001, rtol=1e-6)
    np.testing.assert_allclose(target[0, 4], 0.0001, rtol=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_mixup_matches_its_closed_form(lam):
    images, (target, _) = pictures(), targets()
    mixed, soft = mixing.mix(images, target, jnp.full((SIZE, SIZE), lam))
    np.testing.assert_allclose(mixed, lam * images + (1 - lam) * images[::-1], atol=1e-6)
    want = lam * np.asarray(target) + (1 - lam) * np.asarray(target)[::-1]
    np.testing.assert_allclose(soft, want, atol=1e-6)


def test_uint8_images_are_mixed_in_float():
    """Images arrive as uint8, in which any weight below 1 would become 0."""
    bytes_ = np.random.default_rng(3).integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)
    target = jnp.eye(4)
    mixed, _ = mixing.mix(jnp.asarray(bytes_), target, jnp.full((SIZE, SIZE), 0.3))
    assert mixed.dtype == jnp.float32
    want = 0.3 * bytes_.astype(float) + 0.7 * bytes_[::-1]
    np.testing.assert_allclose(mixed, want, atol=1e-4)


def test_images_cross_devices_as_uint8_when_they_are_mixed():
    split = sharding.batch_sharding(sharding.make_mesh(devices=jax.devices()[:2]))
    images = jax.ShapeDtypeStruct((4, SIZE, SIZE, 3), jnp.uint8, sharding=split)
    target = jax.ShapeDtypeStruct((4, 7), jnp.float32, sharding=split)
    mix = mixing.Mixing(mixup=0.8, cutmix=1.0, switch=0.5, batch_size=4)
    key = jax.random.key(0)
    run = jax.jit(lambda images, target: mix(key, images, target), out_shardings=split)
    text = run.lower(images, target).compile().as_text()
    crossing = re.findall(rf"(\w+)\[[\d,]*{SIZE},{SIZE},3\]\S* collective-permute", text)
    assert crossing and set(crossing) == {"u8"}, crossing


@pytest.mark.parametrize("lam", [0.05, 0.37, 0.5, 0.96, 1.0])
@pytest.mark.parametrize("centre", [(0, 0), (7, 12), (15, 3)])
def test_cutmix_matches_its_closed_form(lam, centre):
    """The box is that of docs/reference.md#mixing; lambda is corrected to its clipped area."""
    images, (target, _) = pictures(), targets()
    mask = mixing.box_mask(SIZE, jnp.float32(lam), jnp.array(centre))
    mixed, soft = mixing.mix(images, target, 1 - mask)
    half = int(SIZE * math.sqrt(np.float32(1) - np.float32(lam))) // 2
    top, left = (max(0, c - half) for c in centre)
    bottom, right = (min(SIZE, c + half) for c in centre)
    want = images.copy()
    want[:, top:bottom, left:right] = images[::-1][:, top:bottom, left:right]
    np.testing.assert_array_equal(mixed, want)
    corrected = 1 - (bottom - top) * (right - left) / SIZE**2
    want = corrected * np.asarray(target) + (1 - corrected) * np.asarray(target)[::-1]
    np.testing.assert_allclose(soft, want, atol=1e-6)


def test_mixed_targets_sum_to_one():
    mix = jax.jit(mixing.Mixing(mixup=0.8, cutmix=1.0, switch=0.5, batch_size=6))
    images, (target, _) = pictures(), targets()
    for seed in range(20):
        _, soft = mix(jax.random.key(seed), images, target)
        np.testing.assert_allclose(np.sum(soft, axis=1), 1, atol=1e-6)


def outcomes(mix, draws=300):
    """Draws many mixings of two images, one black and one white.

    Returns:
      For each draw: whether a box was pasted, the target weight of the first image, and the share
      of the second image in the pixels.
    """
    images = jnp.concatenate([jnp.zeros((1, SIZE, SIZE, 3)), jnp.ones((1, SIZE, SIZE, 3))])
    target = jnp.eye(2)
    run = jax.jit(jax.vmap(lambda key: mix(key, images, target)))
    mixed, soft = run(jax.random.split(jax.random.key(0), draws))
    values = np.asarray(mixed[:, 0, ..., 0]).reshape(draws, -1)
    boxed = np.all((values == 0) | (values == 1), axis=1)
    return boxed, np.asarray(soft[:, 0, 0]), values.mean(axis=1)


def test_switch_and_lambda_follow_their_distributions():
    boxed, kept, other = outcomes(mixing.Mixing(mixup=0.8, cutmix=1.0, switch=0.5, batch_size=2))
    assert 0.4 < boxed.mean() < 0.6
    np.testing.assert_allclose(kept, 1 - other, atol=1e-5)  # targets follow the pixels
    blended = kept[~boxed]
    # Beta(.8, .8): mean 1/2, variance 1 / (4 (2 * .8 + 1))
    assert abs(blended.mean() - 0.5) < 0.08
    assert abs(blended.var() - 1 / (4 * 2.6)) < 0.025


@pytest.mark.parametrize("alphas,boxes", [((0.8, 0.0), False), ((0.0, 1.0), True)])
def test_only_mixup_or_only_cutmix_is_applied_if_the_other_is_off(alphas, boxes):
    mix = mixing.Mixing(mixup=alphas[0], cutmix=alphas[1], switch=0.5, batch_size=2)
    boxed, _, _ = outcomes(mix, draws=50)
    assert boxed.mean() > 0.9 if boxes else boxed.mean() < 0.1


@pytest.mark.parametrize(
    "values,message",
    [
        ({"batch_size": 7}, "batch_size=7 is odd; use 8"),
        ({"mixup": -0.1}, "mixing.mixup=-0.1"),
        ({"mixup": 0.0, "cutmix": 0.0}, "at least one must be on"),
    ],
)
def test_impossible_mixing_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        mixing.Mixing(**{"mixup": 0.8, "cutmix": 1.0, "switch": 0.5, "batch_size": 8, **values})


def erased_reference(uniform, size):
    """docs/reference.md#random-erasing as a loop over tries."""
    for area_u, aspect_u, top_u, left_u in uniform:
        area = (0.02 + area_u * (1 / 3 - 0.02)) * size * size
        aspect = math.exp(math.log(0.3) + aspect_u * (math.log(1 / 0.3) - math.log(0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < size and w < size:
            return int(top_u * (size - h + 1)), int(left_u * (size - w + 1)), h, w, True
    return 0, 0, 0, 0, False


def test_erased_boxes_equal_those_of_a_loop_over_tries():
    uniform = np.random.default_rng(1).random((200, 10, 4)).astype(np.float32)
    uniform[:50, :3, 0], uniform[:50, :3, 1] = 0.999, 0.999  # tries that are too tall
    top, left, h, w, fits = (np.asarray(v) for v in mixing.erased_box(jnp.asarray(uniform), 32))
    agree = 0
    for row in range(200):
        want = erased_reference(uniform[row].astype(float), 32)
        got = (top[row], left[row], h[row], w[row], bool(fits[row]))
        # float32 may round a side the other way if it lies at a half.
        agree += got == want
        assert np.abs(np.array(got[2:4]) - want[2:4]).max() <= 1
    assert agree >= 198


def test_no_box_is_erased_if_no_try_fits():
    uniform = np.full((1, 10, 4), 0.9999, np.float32)
    assert not mixing.erased_box(jnp.asarray(uniform), 32)[-1][0]


def test_erasing_fills_one_box_with_noise():
    images = jnp.full((64, 32, 32, 3), 7.0)
    out = np.asarray(mixing.erase(jax.random.key(0), images, probability=0.25))
    changed = np.any(out != 7.0, axis=-1)
    erased = changed.any(axis=(1, 2))
    assert 6 <= erased.sum() <= 28
    noise = []
    for mask, picture in zip(changed[erased], out[erased], strict=True):
        rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all()
        assert 0.01 < box.size / 1024 < 0.36
        noise.append(picture[mask])
    noise = np.concatenate(noise)
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


def test_erasing_does_not_depend_on_the_other_images():
    images = pictures(8, 32)
    key = jax.random.key(3)
    one = mixing.erase(key, jnp.asarray(images), probability=1.0)
    images[4:] = 0
    two = mixing.erase(key, jnp.asarray(images), probability=1.0)
    np.testing.assert_array_equal(one[:4], two[:4])
