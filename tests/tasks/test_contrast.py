"""The contrastive loss against plain loops, the views, and a short training run."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import ablations_cpu
from fd_jax import model_folder
from fd_jax.errors import ConfigError
from fd_jax.tasks import contrast
from fd_jax.training import loop
from tests import tiny


def unit(rng, rows, width=6):
    vectors = rng.normal(size=(rows, width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def looped(first, second, weight, temperature, *, itself=False):
    """SimCLR's loss of each image, view by view; `itself` keeps a view as its own candidate."""
    views = np.concatenate([first, second])
    weights = np.concatenate([weight, weight])
    losses = np.zeros(len(views))
    for i, view in enumerate(views):
        other = (i + len(first)) % len(views)
        total = 0.0
        for j, candidate in enumerate(views):
            if (itself or j != i) and weights[j] > 0:
                total += np.exp(view @ candidate / temperature)
        losses[i] = -np.log(np.exp(view @ views[other] / temperature) / total)
    return losses.reshape(2, -1).mean(axis=0)


@pytest.mark.parametrize("weight", [[1, 1, 1, 1, 1], [1, 0, 1, 1, 0]])
def test_the_loss_equals_its_definition(weight):
    rng = np.random.default_rng(0)
    first, second, weight = unit(rng, 5), unit(rng, 5), np.array(weight, float)
    found = contrast.contrast(
        *map(jnp.float32, (first, second, weight)), temperature=jnp.float32(0.2)
    )
    counted = weight > 0
    expected = looped(first, second, weight, 0.2)
    np.testing.assert_allclose(found[counted], expected[counted], rtol=1e-5)
    wrong = looped(first, second, weight, 0.2, itself=True)
    assert not np.allclose(found[counted], wrong[counted], rtol=1e-2)


def test_batches_are_standardized_over_their_weights():
    rng = np.random.default_rng(1)
    vectors, weight = rng.normal(3, 5, (6, 4)), np.array([1, 1, 0, 1, 0, 1.0])
    found = contrast.standardize(jnp.float32(vectors), jnp.float32(weight), eps=0.0)
    kept = vectors[weight > 0]
    np.testing.assert_allclose(found, (vectors - kept.mean(0)) / kept.std(0), rtol=1e-5, atol=1e-6)
    everything = (vectors - vectors.mean(0)) / vectors.std(0)
    assert not np.allclose(found, everything, atol=0.05)


def settings(**values):
    return ml_collections.ConfigDict({"min_area": 0.2, "jitter": 0.0, **values})


def test_a_view_of_a_ramp_is_a_ramp_with_a_smaller_slope():
    """A crop that is resized to the whole image: linear interpolation keeps straight lines."""
    ramp = np.broadcast_to(np.arange(28.0)[None, :, None] * 9, (28, 28, 3))
    slopes = []
    draw = jax.jit(jax.vmap(lambda key: contrast.random_view(ramp, key, settings=settings())))
    for view in np.asarray(draw(jax.random.split(jax.random.key(0), 50))):
        inner = view[14, 3:-3, 0]
        np.testing.assert_allclose(np.diff(inner, n=2), 0, atol=2e-3)
        assert 0 <= inner.min() and inner.max() <= ramp.max()
        slopes.append(np.diff(inner).mean() / 9)
    # A crop has at least 0.2 of the area, and a width of at least sqrt(0.2 * 3/4) of the side.
    assert np.sqrt(0.2 * 0.75) * 0.99 < min(slopes) < 0.7 and 0.8 < max(slopes) <= 1.001


def test_jitter_changes_contrast_and_brightness_alone():
    image = np.random.default_rng(0).uniform(0, 255, (28, 28, 3))
    key = jax.random.key(3)
    plain = np.asarray(contrast.random_view(image, key, settings=settings()))
    other = np.asarray(contrast.random_view(image, key, settings=settings(jitter=0.4)))
    slope, offset = np.polyfit(plain.ravel(), other.ravel(), 1)
    np.testing.assert_allclose(other, slope * plain + offset, atol=1e-2)
    assert 0.6 <= slope <= 1.4 and abs(slope - 1) > 0.01


def test_the_two_views_of_an_image_differ_and_those_of_a_seed_do_not():
    prepare = jax.jit(contrast.ContrastiveTask(ablations_cpu.get_config()).prepare)
    batch = tiny.batch(8, side=28)
    once, again = (prepare(batch, jax.random.key(1)) for _ in range(2))
    np.testing.assert_array_equal(once["first"], again["first"])
    assert np.abs(np.asarray(once["first"] - once["second"])).mean() > 5
    assert "image" not in once


def test_micro_batches_are_refused():
    config = ablations_cpu.get_config()
    config.accumulation = 2
    with pytest.raises(ConfigError, match="accumulation=2.*set it to 1"):
        contrast.ContrastiveTask(config)


@pytest.mark.slow
def test_training_lowers_the_loss_and_writes_the_network_alone(embedded_data, tmp_path):
    config = ablations_cpu.get_config("stage=contrastive,network=student")
    arch = {"patch_size": 7, "width": 32, "depth": 1, "heads": 2, "mlp_width": 64}
    config.contrast.arch.update(arch)
    config.data.update(name="digits", data_dir=embedded_data, eval_split="test[:64]")
    config.update(batch_size=64, steps=20, log_every=1)
    config.optim.update(lr_batch=64, warmup_epochs=0.1)
    result = loop.fit(contrast.ContrastiveTask(config), config, tmp_path)
    rows = [row["loss"] for row in loop.metric_writer.read(tmp_path) if "loss" in row]
    assert np.mean(rows[-3:]) < rows[0] - 0.3
    assert result.step == 20
    spec, parts = model_folder.load(tmp_path / "model")
    assert set(parts) == {"encoder"} and spec.arch["position"] == "shared_rpb"
