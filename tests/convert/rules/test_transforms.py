"""Changes of layout: each is undone by its inverse and gives the shapes it says."""

import numpy as np
import pytest

from fd_jax.convert.rules import transforms

WIDTH, HEADS = 8, 2
ONE = {
    transforms.SAME: (3, 4),
    transforms.LINEAR: (WIDTH, 5),
    transforms.CONV: (2, 2, 3, WIDTH),
    transforms.CONV_1X1: (WIDTH, 5),
    transforms.VECTOR_TOKEN: (1, 1, WIDTH),
    transforms.MATRIX_TOKENS: (1, 5, WIDTH),
    transforms.FUSED_QKV: (WIDTH, 3, WIDTH),
    transforms.SPLIT_QKV: (WIDTH, 3, WIDTH),
    transforms.SPLIT_QKV_IN_OUT: (WIDTH, 3, WIDTH),
    transforms.SPLIT_POSITIONS: (1, 5, WIDTH),
    transforms.split_qkv_heads(HEADS): (WIDTH, 3, WIDTH),
    transforms.heads_bias(HEADS): (WIDTH,),
    transforms.heads_out(HEADS): (WIDTH, WIDTH),
}
SEVERAL = {
    transforms.FUSED_QKV_BIAS: [(WIDTH,)] * 3,
    transforms.MASKED_QKV_BIAS: [(WIDTH,)] * 2,
}


@pytest.mark.parametrize(
    ("transform", "shapes"), [(t, [s]) for t, s in ONE.items()] + list(SEVERAL.items())
)
def test_transforms_are_inverted_bit_for_bit(transform, shapes):
    rng = np.random.default_rng(0)
    ours = [rng.standard_normal(shape).astype(np.float16) for shape in shapes]
    theirs = transform.inverse(*ours)
    assert tuple(array.shape for array in theirs) == transform.file_shapes(*shapes)
    for before, after in zip(ours, transform.forward(*theirs), strict=True):
        assert after.dtype == before.dtype
        np.testing.assert_array_equal(before, after)
