"""The parser of compiled text: on programs compiled here, and on the text of a TPU program."""

import functools
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from fd_jax import sharding
from fd_jax.plan import hlo

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(**SIZES)


def compile_text(mesh, function, *shapes, in_specs, out_specs):
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    structs = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, in_specs, strict=True)
    ]
    return hlo.Module(jax.jit(mapped).lower(*structs).compile().as_text())


EXCHANGES = {
    # name: (function of a [8, 16] shard, kind, axis, bytes of the whole arrays, fraction received)
    "psum": (lambda x: jax.lax.psum(x, "fsdp"), "all-reduce", "fsdp", 512, 2 / 2),
    "psum2": (
        lambda x: jax.lax.psum(x, ("data", "tensor")),
        "all-reduce",
        "data+tensor",
        512,
        2 * 3 / 4,
    ),
    "gather": (
        lambda x: jax.lax.all_gather(x, "tensor", tiled=True)[:8],
        "all-gather",
        "tensor",
        1024,
        1 / 2,
    ),
    "scatter": (
        lambda x: jnp.tile(jax.lax.psum_scatter(x, "data", tiled=True), (2, 1)),
        "reduce-scatter",
        "data",
        512,
        1 / 2,
    ),
    "permute": (
        lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]),
        "collective-permute",
        "fsdp",
        512,
        1,
    ),
    "all": (
        lambda x: jax.lax.all_to_all(x, "tensor", 0, 0, tiled=True),
        "all-to-all",
        "tensor",
        512,
        1 / 2,
    ),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_collectives_of_compiled_programs_are_parsed(mesh, name):
    function, kind, axis, size, share = EXCHANGES[name]
    module = compile_text(mesh, function, (8, 16), in_specs=(P(),), out_specs=P())
    (collective,) = module.collectives(SIZES)
    assert (collective.kind, collective.axis) == (kind, axis)
    assert (collective.count, collective.bytes) == (1, size)
    assert collective.dtypes == ("f32",)
    assert collective.received == size * share


def test_a_collective_in_a_loop_counts_as_often_as_it_runs(mesh):
    def looped(x):
        def body(x, _):
            return jnp.sin(jax.lax.psum(x, "fsdp")), None

        return jax.lax.scan(body, x, None, length=5)[0]

    module = compile_text(mesh, looped, (8, 16), in_specs=(P(),), out_specs=P())
    (collective,) = module.collectives(SIZES)
    assert (collective.count, collective.bytes) == (5, 5 * 512)
    assert module.loops == []  # the loop has no matmul


def test_trip_counts_of_loops_with_matmuls_are_listed():
    def looped(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, None, length=7)[0]

    module = hlo.Module(jax.jit(looped).lower(jnp.ones((64, 64))).compile().as_text())
    assert module.loops == [7]


# A loop over micro-batches by libtpu, shortened: only its condition says how often it runs.
TPU_LOOP = """HloModule jit_step

%below (p.0: (s32[], f32[8,8])) -> pred[] {
  %c.0 = s32[]{:T(128)} constant(4)
  %p.0 = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  %g.0 = s32[]{:T(128)} get-tuple-element(%p.0), index=0
  ROOT %lt.0 = pred[]{:T(512)} compare(%g.0, %c.0), direction=LT, metadata={op_name="step/cond/lt"}
}

%body (p.1: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p.1 = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  %g.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x.1 = f32[8,8]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %y.1 = f32[8,8]{1,0:T(8,128)} dot(%x.1, %x.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t.1 = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) tuple(%g.1, %y.1)
}

ENTRY %main (a: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %a = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  ROOT %w = (s32[], f32[8,8]) while(%a), condition=%below, body=%body, metadata={op_name="while"}
}
"""


def test_a_loop_runs_until_the_limit_in_its_condition():
    module = hlo.Module(TPU_LOOP)
    assert module.loops == [4]
    assert module.matmul_flops() == (4 * 2 * 8**3, 0)


@pytest.mark.parametrize(
    "said,other",
    [
        ("constant(4)", "parameter(1)"),
        ("direction=LT", "direction=NE"),
        ("constant(4)", "tuple(4)"),
    ],
)
def test_a_loop_with_another_condition_counts_once(said, other):
    module = hlo.Module(TPU_LOOP.replace(said, other))
    assert module.loops == [] and module.matmul_flops() == (2 * 8**3, 0)


def test_aliases_and_parameters_are_parsed():
    @functools.partial(jax.jit, donate_argnums=(0,))
    def step(state, batch):
        return {"a": state["a"] + batch.sum(), "b": state["b"] * 2}, batch.mean()

    state = {name: jax.ShapeDtypeStruct((4, 4), jnp.float32) for name in "ab"}
    batch = jax.ShapeDtypeStruct((8,), jnp.bfloat16)
    text = step.lower(state, batch).compile().as_text()
    module = hlo.Module(text)
    assert module.aliased_parameters() == {0, 1}
    assert [module.parameters()[i].dims for i in range(3)] == [(4, 4), (4, 4), (8,)]
    assert module.parameters()[2].bytes == 16
    kept = jax.jit(step.__wrapped__).lower(state, batch).compile().as_text()
    assert hlo.Module(kept).aliased_parameters() == set()


def groups(text, sizes=None):
    return sorted(sorted(group) for group in hlo._groups(text, sizes or SIZES))


@pytest.mark.parametrize(
    "text",
    [
        "replica_groups={{0,2},{1,3},{4,6},{5,7}}, x",
        "replica_groups=[4,2]<=[2,2,2]T(0,2,1), x",
        "replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}, x",
        "replica_groups=mesh['a'=4,'b'=2] {'a':(2)2}, x",
        "replica_groups=mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}, dimensions={1}, x",
        "replica_groups=mesh['a'=2,'b'=4], device_ids=(0,1,4,5,2,3,6,7) {'a'}, x",
        "source_target_pairs={{0,2},{2,0},{1,3},{3,1},{4,6},{6,4},{5,7},{7,5}}, x",
    ],
)
def test_every_notation_of_groups_is_parsed(text):
    assert groups(text) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert hlo._axis(hlo._groups(text, SIZES), SIZES) == "fsdp"


def test_groups_along_no_axis_have_an_empty_name():
    assert hlo._axis(hlo._groups("replica_groups={{0,3},{1,2},{4,7},{5,6}}", SIZES), SIZES) == ""
    assert groups("channel_id=1", {"data": 4}) == [[0, 1, 2, 3]]


def test_groups_that_cannot_be_read_are_an_error():
    with pytest.raises(ValueError, match="cannot be read"):
        groups("replica_groups=something new, x")


# Lines in the format of libtpu 0.0.42, in an invented program that has each kind once.
TPU = (pathlib.Path(__file__).parent / "tpu_lines.txt").read_text()


def test_text_of_a_tpu_program_is_parsed():
    module = hlo.Module(TPU)
    assert module.cycles() == 3 * 10 + 100
    assert module.loops == []
    assert module.aliased_parameters() == {0, 1}
    # Four instructions read %a and the loop writes four bytes; everything else is in HBM.
    assert module.vmem_bytes() == 4 * 64 + 4
    assert [s.dims for s in module.stored_broadcasts()] == [(2, 4, 8)]
    # A fused gather appears twice with one channel; a gather with start and done counts once.
    (gathers,) = module.collectives({"data": 2})
    assert (gathers.kind, gathers.axis, gathers.count) == ("all-gather", "data", 2)
    assert gathers.bytes == 2 * 128


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.Module("hello\n")


def test_shapes_are_parsed_with_bytes_and_memory_space():
    shapes = hlo._shapes(
        "(f32[2,3]{1,0}, s4[5]{0}, pred[], /*index=3*/bf16[7]{0:T(8)S(1)}, token[])"
    )
    assert [(s.dtype, s.bytes, s.space) for s in shapes] == [
        ("f32", 24, 0),
        ("s4", 3, 0),
        ("pred", 1, 0),
        ("bf16", 14, 1),
        ("token", 0, 0),
    ]
    assert np.prod(shapes[0].dims) == 6
