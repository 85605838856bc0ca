"""Position tables resized as torch and SciPy do it."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator, make_interp_spline
import torch

from fd_jax.models import resize

SIDES = st.integers(min_value=2, max_value=40)


def pos_table(side, prefix, seed=0, width=3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(1, prefix + side * side, width)).astype(np.float32)


def torch_resized(table, grid, *, prefix, **kwargs):
    side = round((table.shape[1] - prefix) ** 0.5)
    image = torch.from_numpy(table[:, prefix:].reshape(1, side, side, -1)).permute(0, 3, 1, 2)
    out = torch.nn.functional.interpolate(
        image.double(), mode="bicubic", align_corners=False, **kwargs
    )
    assert out.shape[-2:] == (grid, grid)
    patches = out.permute(0, 2, 3, 1).reshape(1, grid * grid, -1).numpy()
    return np.concatenate([table[:, :prefix], patches], axis=1)


@settings(deadline=None, max_examples=40)
@given(side=SIDES, grid=SIDES, prefix=st.sampled_from([0, 1]))
def test_size(side, grid, prefix):
    table = pos_table(side, prefix)
    got = resize.resize_pos_embed(table, (side, side), (grid, grid), prefix=prefix, method="size")
    want = torch_resized(table, grid, prefix=prefix, size=(grid, grid))
    np.testing.assert_allclose(got, want, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(side=SIDES, grid=SIDES)
def test_antialias(side, grid):
    table = pos_table(side, 1)
    got = resize.resize_pos_embed(table, (side, side), (grid, grid), prefix=1, method="antialias")
    want = torch_resized(table, grid, prefix=1, size=(grid, grid), antialias=True)
    np.testing.assert_allclose(got, want, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(side=SIDES, grid=SIDES)
def test_scale_factor_with_offset(side, grid):
    """DINO's and DINOv2's hub code states (grid + 0.1) / side as scale factor."""
    if side == grid:
        return  # the hub code returns the table untouched
    table = pos_table(side, 1)
    got = resize.resize_pos_embed(table, (side, side), (grid, grid), prefix=1, method="offset_0.1")
    factor = (grid + 0.1) / side
    want = torch_resized(table, grid, prefix=1, scale_factor=(factor, factor))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("method", ["size", "antialias", "offset_0.1"])
@pytest.mark.parametrize("target", [(8, 4), (5, 9), (3, 7)])
def test_grids_that_are_not_square(method, target):
    source = (5, 7)
    table = np.random.default_rng(0).normal(size=(1, 1 + 35, 3)).astype(np.float32)
    factors = [(new + 0.1) / old for old, new in zip(source, target, strict=True)]
    options = {
        "size": {"size": target},
        "antialias": {"size": target, "antialias": True},
        "offset_0.1": {"scale_factor": tuple(factors)},
    }[method]
    image = torch.from_numpy(table[:, 1:].reshape(1, *source, 3)).permute(0, 3, 1, 2).double()
    want = torch.nn.functional.interpolate(image, mode="bicubic", align_corners=False, **options)
    assert tuple(want.shape[2:]) == target
    want = want.permute(0, 2, 3, 1).reshape(1, -1, 3).numpy()
    got = resize.resize_pos_embed(table, source, target, prefix=1, method=method)
    np.testing.assert_array_equal(got[:, :1], table[:, :1])
    np.testing.assert_allclose(got[:, 1:], want, atol=1e-5)
    # Control: the axes in the other order.
    swapped = table[:, 1:].reshape(1, *source, 3).swapaxes(1, 2).reshape(1, -1, 3)
    swapped = np.concatenate([table[:, :1], swapped], axis=1)
    wrong = resize.resize_pos_embed(swapped, source[::-1], target, prefix=1, method=method)
    assert np.abs(wrong[:, 1:] - want).max() > 1e-2


def test_methods_differ_and_identity_is_exact():
    table = pos_table(37, 1)
    results = [
        resize.resize_pos_embed(table, (37, 37), (16, 16), prefix=1, method=method)
        for method in ("size", "offset_0.1", "antialias")
    ]
    for i, first in enumerate(results):
        for other in results[i + 1 :]:
            assert np.abs(first - other).max() > 1e-3
    for method in ("size", "offset_0.1", "antialias"):
        same = resize.resize_pos_embed(table, (37, 37), (37, 37), prefix=1, method=method)
        np.testing.assert_array_equal(same, table)


def test_dtype_is_kept():
    table = pos_table(4, 1).astype(np.float16)
    out = resize.resize_pos_embed(table, (4, 4), (6, 6), prefix=1, method="size")
    assert out.dtype == np.float16


def test_a_table_of_another_grid_and_an_unknown_method_are_refused():
    four = (4, 4)
    with pytest.raises(ValueError, match="12 patch positions are not a grid of 3 x 3"):
        resize.resize_pos_embed(np.zeros((1, 13, 2)), (3, 3), four, prefix=1, method="size")
    with pytest.raises(ValueError, match="expected"):
        resize.resize_pos_embed(np.zeros((1, 10, 2)), (3, 3), four, prefix=1, method="nearest")
    with pytest.raises(ValueError, match="50 relative positions are not those of a grid of 4 x 4"):
        resize.resize_rel_pos_table(np.zeros((50 + 3, 2)), four, (5, 5), extra=3)


# Grids, ratio and last source position of docs/reference.md#rel-pos-resize.
ANCHORS = [
    (14, 24, 1.09030745, 22.999934),
    (14, 16, 1.02349283, 14.999963),
    (14, 32, 1.13491781, 31.000182),
    (14, 28, 1.11442762, 26.999935),
    (16, 24, 1.05843195, 22.999869),
    (16, 14, 1.01000093, 16.097),
]


@pytest.mark.parametrize("source,target,ratio,last", ANCHORS)
def test_geometric_offsets_have_the_published_values(source, target, ratio, last):
    offsets = resize.geometric_offsets(source - 1, target - 1)
    assert len(offsets) == 2 * source - 1
    assert offsets[-1] == pytest.approx(last, abs=5e-4)
    steps = np.diff(offsets[source - 1 :])
    assert steps[0] == 1
    assert steps[1] == pytest.approx(ratio, abs=1e-8)
    np.testing.assert_allclose(offsets, -offsets[::-1])


def scipy_rel_table(table, source, grid, *, extra):
    """The same from SciPy's not-a-knot spline, axis by axis, in float64."""
    n = 2 * source - 1
    offsets = resize.geometric_offsets(source - 1, grid - 1)
    queries = np.clip(np.arange(-(grid - 1), grid), offsets[0], offsets[-1])
    image = table[: n * n].reshape(n, n, -1).astype(np.float64)
    rows = make_interp_spline(offsets, image, k=3, axis=0)(queries)
    both = make_interp_spline(offsets, rows, k=3, axis=1)(queries)
    return np.concatenate([both.reshape(-1, table.shape[1]), table[n * n :]])


@settings(deadline=None, max_examples=40)
@given(
    source=st.integers(min_value=3, max_value=20),
    grid=st.integers(min_value=2, max_value=32),
    extra=st.sampled_from([0, 3]),
)
def test_rel_pos_table(source, grid, extra):
    if source == grid:
        return
    rng = np.random.default_rng(source * 100 + grid)
    table = rng.normal(size=((2 * source - 1) ** 2 + extra, 4)).astype(np.float32)
    got = resize.resize_rel_pos_table(table, (source, source), (grid, grid), extra=extra)
    want = scipy_rel_table(table, source, grid, extra=extra)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert got.dtype == np.float32


@pytest.mark.parametrize("target", [(8, 4), (5, 9), (3, 7), (6, 6)])
def test_rel_pos_table_of_a_grid_that_is_not_square(target):
    source = (5, 7)
    table = np.random.default_rng(1).normal(size=(9 * 13 + 3, 4)).astype(np.float32)
    want = table[:-3].reshape(9, 13, 4).astype(np.float64)
    for axis, (old, new) in enumerate(zip(source, target, strict=True)):
        if old != new:  # an axis that keeps its length keeps its offsets
            offsets = resize.geometric_offsets(old - 1, new - 1)
            queries = np.clip(np.arange(-(new - 1), new), offsets[0], offsets[-1])
            want = make_interp_spline(offsets, want, k=3, axis=axis)(queries)
    got = resize.resize_rel_pos_table(table, source, target, extra=3)
    np.testing.assert_allclose(got[:-3], want.reshape(-1, 4), atol=1e-5)
    np.testing.assert_array_equal(got[-3:], table[-3:])


@pytest.mark.parametrize(("source", "grid"), [(14, 24), (14, 7), (7, 12)])
def test_tables_of_timm_follow_straight_lines(source, grid):
    """The oracle is scipy's interpolation on a grid, which timm's own is made after."""
    table = np.random.default_rng(0).standard_normal(((2 * source - 1) ** 2 + 3, 2))
    got = resize.resize_rel_pos_table(
        table, (source, source), (grid, grid), extra=3, method="antialias"
    )
    knots = resize.geometric_offsets(source - 1, grid - 1)
    points = np.arange(-(grid - 1), grid).clip(knots[0], knots[-1])
    patches = table[:-3].reshape(2 * source - 1, 2 * source - 1, 2)
    places = np.stack(np.meshgrid(points, points, indexing="ij"), -1)
    expected = RegularGridInterpolator((knots, knots), patches)(places).reshape(-1, 2)
    np.testing.assert_allclose(got[:-3], expected, atol=1e-12)
    np.testing.assert_array_equal(got[-3:], table[-3:])
    splines = resize.resize_rel_pos_table(table, (source, source), (grid, grid), extra=3)
    assert np.abs(splines - got).max() > 0.01  # the original's way, which fine-tuning here has


@pytest.mark.parametrize(("source", "grid"), [(14, 24), (14, 7), (7, 12)])
def test_tables_of_transformers_are_resized_as_pictures(source, grid):
    table = np.random.default_rng(0).standard_normal(((2 * source - 1) ** 2 + 3, 2))
    got = resize.resize_rel_pos_table(
        table, (source, source), (grid, grid), extra=3, method="bilinear"
    )
    picture = torch.from_numpy(table[:-3].T.reshape(1, 2, 2 * source - 1, 2 * source - 1))
    resized = torch.nn.functional.interpolate(picture, size=2 * grid - 1, mode="bilinear")
    np.testing.assert_allclose(got[:-3], resized.numpy().reshape(2, -1).T, atol=1e-12)
    np.testing.assert_array_equal(got[-3:], table[-3:])


def test_rel_pos_table_keeps_near_offsets_and_class_rows():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(27 * 27 + 3, 12)).astype(np.float32)
    out = resize.resize_rel_pos_table(table, (14, 14), (24, 24), extra=3)
    assert out.shape == (47 * 47 + 3, 12)
    np.testing.assert_array_equal(out[-3:], table[-3:])
    old, new = table[:-3].reshape(27, 27, 12), out[:-3].reshape(47, 47, 12)
    # Offsets of -1, 0 and 1 are source points themselves: they come back exactly.
    np.testing.assert_allclose(new[22:25, 22:25], old[12:15, 12:15], atol=1e-6)
    np.testing.assert_array_equal(
        resize.resize_rel_pos_table(table, (14, 14), (14, 14), extra=3), table
    )


def test_polynomials_are_reproduced_for_few_points():
    knots = np.array([-1.0, 0.0, 1.0])
    queries = np.linspace(-1, 1, 7)
    matrix = resize.spline_matrix(knots, queries)
    parabola = 2 + knots - 3 * knots**2
    np.testing.assert_allclose(matrix @ parabola, 2 + queries - 3 * queries**2, atol=1e-12)


@pytest.mark.parametrize("target", [(9, 4), (6, 6), (3, 11)])
def test_traced_tables_equal_those_of_numpy(target):
    rng = np.random.default_rng(0)
    positions = rng.normal(size=(1, 1 + 36, 8)).astype(np.float32)
    bias = rng.normal(size=(11 * 11 + 3, 4)).astype(np.float32)

    def both(positions, bias):
        return (
            resize.resize_pos_embed(positions, (6, 6), target, prefix=1, method="offset_0.1"),
            resize.resize_rel_pos_table(bias, (6, 6), target, extra=3),
        )

    for got, want in zip(jax.jit(both)(positions, bias), both(positions, bias), strict=True):
        assert got.dtype == np.float32 and got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=1e-5)
