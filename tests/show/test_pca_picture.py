"""Features as colours, against the components of scikit-learn."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA

import fd_jax
from fd_jax.errors import DataError
from fd_jax.models.features import FeatureMap


def features(tokens, dtype=jnp.float32):
    return FeatureMap(jnp.asarray(tokens, dtype), cls=1, registers=1, grid=(3, 4))


def test_colours_are_the_components_of_the_patches_of_all_images():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(5, 14, 16)) * np.linspace(3, 0.1, 16)
    tokens[:, :2] += 100  # class token and register, which do not count
    got = fd_jax.pca_picture(features(tokens))
    assert got.shape == (5, 3, 4, 3) and got.min() >= 0 and got.max() <= 1
    want = PCA(3).fit_transform(tokens[:, 2:].reshape(-1, 16))
    low, high = np.percentile(want, [1, 99], axis=0)
    want = np.clip((want - low) / (high - low), 0, 1)
    for channel in range(3):
        ours, theirs = got[..., channel].reshape(-1), want[:, channel]
        sign = np.sign(np.corrcoef(ours, theirs)[0, 1])  # that of a component has no meaning
        np.testing.assert_allclose(ours, theirs if sign > 0 else 1 - theirs, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_features_without_three_directions_are_refused(rank, dtype):
    """The mean and the rounding of the tokens do not count as a direction."""
    rng = np.random.default_rng(rank)
    tokens = 10 + rng.normal(size=(2, 14, rank)) @ rng.normal(size=(rank, 16))
    rounded = features(tokens, dtype)
    if rank == 3:
        assert np.isfinite(fd_jax.pca_picture(rounded)).all()
    else:
        with pytest.raises(DataError, match="three directions"):
            fd_jax.pca_picture(rounded)


def test_features_of_two_channels_are_refused():
    with pytest.raises(DataError, match="three directions"):
        fd_jax.pca_picture(features(np.random.default_rng(0).normal(size=(1, 14, 2))))
