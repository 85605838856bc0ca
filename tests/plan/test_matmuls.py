"""FLOPs of matmuls in compiled text, against XLA's count for programs that contain only matmuls."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import pytest

from fd_jax.plan import hlo


def compiled(function, *shapes):
    """(parsed module, FLOPs by XLA's count)."""
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    executable = jax.jit(function).lower(*structs).compile()
    return hlo.Module(executable.as_text()), executable.cost_analysis()["flops"]


def convolution(padding, dimensions, *, stride=None, **options):
    return functools.partial(
        lax.conv_general_dilated,
        window_strides=stride or (1,) * (len(dimensions[0]) - 2),
        padding=padding,
        dimension_numbers=dimensions,
        **options,
    )


NHWC = ("NHWC", "HWIO", "NHWC")
CONVOLUTIONS = {
    "patches": (convolution("VALID", NHWC, stride=(4, 4)), (2, 8, 8, 3), (4, 4, 3, 5)),
    "padded": (convolution(((1, 2), (0, 5)), NHWC), (2, 9, 7, 4), (3, 2, 4, 6)),
    "cut": (convolution(((-1, 0), (2, -2)), NHWC), (2, 9, 7, 4), (3, 2, 4, 6)),
    "dilated": (
        convolution(
            ((1, 2), (0, 5)), NHWC, stride=(2, 3), lhs_dilation=(2, 1), rhs_dilation=(1, 3)
        ),
        (2, 9, 7, 4),
        (3, 2, 4, 6),
    ),
    "groups": (
        convolution("SAME", NHWC, feature_group_count=2),
        (2, 9, 7, 4),
        (3, 2, 2, 6),
    ),
    "groups of the batch": (
        convolution("SAME", NHWC, batch_group_count=2),
        (4, 9, 7, 4),
        (3, 2, 4, 6),
    ),
    "one dimension": (
        convolution(((2, 2),), ("NCW", "OIW", "CNW")),
        (2, 4, 9),
        (6, 4, 3),
    ),
    # How TPUs write a batched matmul: only one of 16 kernel positions falls on a number.
    "a batch as a window": (
        convolution(((0, 0),), ("WNC", "WOI", "WNC"), stride=(15,), lhs_dilation=(16,)),
        (16, 5, 7),
        (16, 3, 7),
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_flops_of_convolutions_equal_xlas_count(name):
    module, counted = compiled(*CONVOLUTIONS[name])
    assert module.matmul_flops() == (counted, 0)


def test_a_batch_as_a_window_is_a_batched_matmul():
    module, _ = compiled(*CONVOLUTIONS["a batch as a window"])
    assert module.matmul_flops()[0] == 2 * 16 * 5 * 3 * 7


@pytest.mark.parametrize(
    ("equation", "left", "right", "products"),
    [
        ("ij,jk->ik", (64, 32), (32, 48), 64 * 32 * 48),
        ("bqhd,bkhd->bhqk", (3, 5, 2, 8), (3, 7, 2, 8), 3 * 2 * 5 * 7 * 8),
        ("ijk,jkl->il", (64, 4, 8), (4, 8, 48), 64 * 4 * 8 * 48),
    ],
)
def test_matmuls_count_two_flops_per_product(equation, left, right, products):
    module, counted = compiled(functools.partial(jnp.einsum, equation), left, right)
    assert module.matmul_flops() == (2 * products, 0)
    assert counted == 2 * products


def test_loop_bodies_count_as_often_as_they_run():
    def looped(x):
        return lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, None, length=7)[0]

    module, counted = compiled(looped, (64, 64))
    assert module.matmul_flops() == (7 * 2 * 64**3, 0)
    assert counted < 7 * 2 * 64**3  # XLA counts the body once


def test_flops_that_the_compiler_repeats_are_counted_separately():
    """With names as in libtpu 0.0.42: a repeated fusion, and a repeated matmul outside fusions."""
    text = """HloModule jit_step, is_scheduled=true

%fused.1 (p: f32[8,4], q: f32[4,2]) -> f32[8,2] {
  %p = f32[8,4]{1,0} parameter(0)
  %q = f32[4,2]{1,0} parameter(1)
  ROOT %c = f32[8,2]{1,0} convolution(%p, %q), dim_labels=bf_io->bf
}

ENTRY %main (a: f32[8,4], b: f32[4,2]) -> f32[8,2] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[4,2]{1,0} parameter(1)
  %one = f32[8,2]{1,0} fusion(%a, %b), kind=kOutput, calls=%fused.1
  %one.remat = f32[8,2]{1,0} fusion(%a, %b), kind=kOutput, calls=%fused.1
  %two.remat2 = f32[8,2]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
  ROOT %sum = f32[8,2]{1,0} add(%one.remat, %two.remat2)
}
"""
    module = hlo.Module(text)
    assert module.matmul_flops() == (3 * 2 * 8 * 4 * 2, 2 * 2 * 8 * 4 * 2)
