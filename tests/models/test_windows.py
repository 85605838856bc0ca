"""Windows, masks and biases inside them against loops that spell the definitions out."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fd_jax.models import attention, layers, windows


def tokens(grid, batch=2, width=3):
    shape = (batch, grid * grid, width)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("window,shift", [(4, 0), (4, 2), (2, 1), (8, 0)])
def test_windows_hold_the_tokens_they_should(window, shift):
    x, grid = tokens(8), 8
    cut = np.asarray(windows.partition(jnp.asarray(x), grid, window, shift))
    n = grid // window
    assert cut.shape == (2 * n * n, window * window, 3)
    for image in range(2):
        for row in range(grid):
            for column in range(grid):
                home = (image * n + row // window) * n + column // window
                place = row % window * window + column % window
                token = (row + shift) % grid * grid + (column + shift) % grid
                np.testing.assert_array_equal(cut[home, place], x[image, token])
    np.testing.assert_array_equal(windows.join(jnp.asarray(cut), grid, window, shift), x)


def test_masks_have_the_originals_shapes_and_regions():
    assert windows.shift_mask(56, 14, 7).shape == (16, 196, 196)
    assert windows.shift_mask(28, 14, 7).shape == (4, 196, 196)
    mask = windows.shift_mask(8, 4, 2)
    assert set(np.unique(mask)) == {windows.MASKED, 0.0}
    np.testing.assert_array_equal(mask[0], 0)  # the first window lies in one region
    # The last window holds four regions of four tokens each.
    assert (mask[3] == 0).sum() == 4 * 4 * 4
    np.testing.assert_array_equal(mask, mask.transpose(0, 2, 1))


def test_masks_and_offsets_are_computed_once():
    assert windows.shift_mask(8, 4, 2) is windows.shift_mask(8, 4, 2)
    assert windows.log_offsets(7, 0) is windows.log_offsets(7, 0)


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_offsets_spread_as_the_index_table_says(window):
    table = np.random.default_rng(0).normal(size=((2 * window - 1) ** 2, 3)).astype(np.float32)
    index = attention.relative_position_index((window, window), cls_token=False)
    np.testing.assert_array_equal(
        windows.expand_offsets(jnp.asarray(table), window), table.T[:, index]
    )


def test_spreading_needs_no_gather():
    table = jnp.zeros((27 * 27, 4))
    text = str(jax.make_jaxpr(jax.grad(lambda t: windows.expand_offsets(t, 14).sum()))(table))
    assert "gather" not in text and "scatter" not in text


def test_coordinates():
    """docs/reference.md#swin-position-bias at w = 14; docs/reference.md#quirk-window-scale."""
    side = windows.log_offsets(14, 0).reshape(27, 27, 2)
    np.testing.assert_allclose(side[0, 0], -1.0566, atol=5e-5)
    np.testing.assert_array_equal(side[13, 13], 0)
    np.testing.assert_allclose(side[14, 13], [0.2306, 0], atol=5e-5)  # rows first
    np.testing.assert_array_equal(windows.log_offsets(1, 0), [[0, 0]])
    np.testing.assert_allclose(
        windows.log_offsets(16, 12).reshape(31, 31, 2)[4:27, 4:27],
        windows.log_offsets(12, 0).reshape(23, 23, 2),
    )


def cosine_attention(scales):
    common = {"kernel_init": nnx.initializers.zeros, "out_init": nnx.initializers.zeros}
    module = windows.CosineAttention(
        8,
        2,
        qkv_bias="qv",
        rel_pos_bias=None,
        implementation="xla",
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
        **common,
    )
    np.testing.assert_allclose(module.logit_scale[...], np.log(10.0), rtol=1e-6)
    module.logit_scale[...] = jnp.asarray(scales, jnp.float32)
    return module


def test_cosines_are_scaled_and_bounded_above_only():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 3, 5, 2, 4)).astype(np.float32)
    # One head at exp(-9), far below any clamp; one beyond log 100.
    ours_q, ours_k, factor = cosine_attention([-9.0, 30.0]).scaled(jnp.asarray(q), jnp.asarray(k))
    got = np.einsum("bqhd,bkhd->bhqk", ours_q, ours_k) * factor
    unit_q, unit_k = (torch.nn.functional.normalize(torch.from_numpy(x), dim=-1) for x in (q, k))
    cosines = np.einsum("bqhd,bkhd->bhqk", unit_q, unit_k)
    np.testing.assert_allclose(got[:, 0], np.exp(-9) * cosines[:, 0], rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(got[:, 1], 100 * cosines[:, 1], rtol=1e-5, atol=2e-5)


def test_a_query_of_zeros_has_a_gradient():
    def total(q):
        scaled, _, _ = cosine_attention([1.0, 1.0]).scaled(q, q)
        return jnp.sum(scaled)

    assert np.isfinite(jax.grad(total)(jnp.zeros((1, 2, 2, 4)))).all()


def test_bias_starts_near_eight():
    bias = windows.ContinuousBias(
        14,
        4,
        pretrained=0,
        dtype=jnp.float32,
        kernel_init=layers.truncated_normal(0.02, 2.0),
        rngs=nnx.Rngs(0),
    )
    values = np.asarray(bias())
    assert values.shape == (4, 196, 196)
    np.testing.assert_allclose(values, 8, atol=0.2)
