"""Differences over seeds against closed forms and SciPy."""

import numpy as np
import pytest
from scipy import stats

from fd_jax.reproduce import paired


def test_quantiles_are_those_of_students_t():
    expected = stats.t.ppf(0.975, np.arange(1, len(paired.T_95) + 1))
    np.testing.assert_allclose(paired.T_95, expected, atol=6e-5)


@pytest.mark.parametrize("pairs", [2, 3, 5, 21])
def test_the_interval_is_that_of_a_paired_t_test(pairs):
    rng = np.random.default_rng(pairs)
    values, reference = rng.normal(size=(2, pairs))
    found = paired.difference(list(values), list(reference))
    expected = stats.ttest_rel(values, reference).confidence_interval(0.95)
    np.testing.assert_allclose(found[1:], [expected.low, expected.high], rtol=1e-4)
    assert found.mean == pytest.approx(np.mean(values - reference))


def test_an_unpaired_interval_is_another_one():
    """Seeds that move both figures alike do not widen the interval."""
    values, reference = [50.0, 60.0, 71.0], [48.0, 59.0, 69.0]
    found = paired.difference(values, reference)
    unpaired = stats.ttest_ind(values, reference).confidence_interval(0.95)
    assert found.high - found.low < (unpaired.high - unpaired.low) / 5


def test_differences_one_two_three_have_a_known_interval():
    found = paired.difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    half = 4.3027 * 1 / np.sqrt(3)  # their standard deviation is 1
    assert found == pytest.approx((2, 2 - half, 2 + half))
    assert found.sign == 0
    assert paired.difference([5.0, 5.1, 5.2], [1.0, 1.0, 1.0]).sign == 1
    assert paired.difference([1.0, 1.0, 1.0], [5.0, 5.1, 5.2]).sign == -1


def test_one_seed_has_neither_spread_nor_interval():
    assert paired.spread([3.0]) is None
    found = paired.difference([3.0], [1.0])
    assert found == (2.0, None, None)
    assert found.sign == 0


def test_more_pairs_than_quantiles_widen_the_interval():
    values = list(np.random.default_rng(0).normal(size=40))
    found = paired.difference(values, [0.0] * 40)
    exact = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.low < exact.low and found.high > exact.high


def test_figures_of_other_seeds_are_not_paired():
    with pytest.raises(ValueError):
        paired.difference([1.0, 2.0], [1.0])
