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


@pytest.mark.parametrize("axes", [(1, 0), (2, 0, 1), (2, 3, 1, 0), (0, 2, 1), (0, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
def test_in_rows_copies_any_order_of_axes(axes, dtype):
    """Beyond the sides of a block, with what is left over at both ends."""
    sizes = (1100, 70) if len(axes) == 2 else (3, 2, 600, 37)[-len(axes) :]
    before = (np.arange(np.prod(sizes)) % 997).reshape(sizes).astype(dtype).transpose(axes)
    for view in (before, before[::2], before[..., ::-1], before[:1], before[..., :1]):
        found = transforms.in_rows(view)
        assert found.flags.c_contiguous and found.dtype == before.dtype
        np.testing.assert_array_equal(found, view)
    alone = np.broadcast_to(np.float32(2), (3, 4))
    np.testing.assert_array_equal(transforms.in_rows(alone), alone)
