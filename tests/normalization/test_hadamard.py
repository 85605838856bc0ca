"""Hadamard matrices against their definition."""

import numpy as np
import pytest

from fd_jax.normalization import hadamard

# One of each construction, and products of them.
ORDERS = (1, 2, 4, 12, 20, 24, 28, 36, 40, 48, 72, 104, 192, 384)


@pytest.mark.parametrize("order", ORDERS)
def test_entries_are_signs_and_rows_are_orthogonal(order):
    found = hadamard.matrix(order)
    assert found.shape == (order, order) and set(np.unique(found)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(found @ found.T, order * np.eye(order))


def test_there_is_one_for_the_widths_of_public_vits():
    widths = (192, 384, 576, 768, 1024, 1152, 1280, 1408, 1536, 1664)
    assert all(hadamard.matrix(width) is not None for width in widths)


@pytest.mark.parametrize("order", [3, 6, 10, 50, 52, 92])
def test_there_is_none_of_other_orders(order):
    """There is none of 6 or 10; that of 52 and of 92 takes prime powers, or other constructions."""
    assert hadamard.matrix(order) is None
