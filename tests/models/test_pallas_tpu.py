"""The fused attention for TPUs, interpreted without one, against XLA's attention and numpy."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fd_jax import sharding
from fd_jax.errors import ConfigError
from fd_jax.models import kernels
from fd_jax.models.attention import Attention, RelativePositionBias
from fd_jax.models.kernels import pallas_tpu, xla
from fd_jax.models.rotary import Rope, Rotation
from tests.models.arrays import init, rand
from tests.models.attentions import inputs, with_gradients, worst

TOLERANCE = 5e-6  # of the largest value; float32
LIMIT = pallas_tpu.MAX_LOGITS
attend = functools.partial(pallas_tpu.attend, interpret=True)

CASES = {
    "197 tokens": (197, {"heads": 3, "width": 64, "batch": 1}),
    "257 tokens, wide heads": (257, {"heads": 1, "width": 80, "batch": 1}),
    "577 tokens, masked": (577, {"heads": 1, "width": 64, "batch": 1, "masked": True}),
    "windows": (49, {"heads": 3, "width": 32, "groups": 2, "batch": 4}),
    "windows, two in a program": (16, {"heads": 3, "width": 32, "groups": 4, "batch": 8}),
    "heads of two programs": (64, {"heads": 4, "width": 64}),
    "a bias for every row": (15, {"heads": 5, "width": 16, "groups": 2}),
}


@pytest.fixture(autouse=True)
def short_programs(monkeypatch):
    """Interpreted, a program is compiled head by head and row by row; here it has few."""
    monkeypatch.setattr(pallas_tpu, "MAX_LOGITS", 2**14)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_all_gradients_are_those_of_xla(case):
    tokens, kind = CASES[case]
    arrays = inputs(tokens, **kind)
    want = with_gradients(xla.attend, arrays)
    assert worst(with_gradients(attend, arrays), want) < TOLERANCE


def test_it_needs_no_bias():
    q, k, v, _ = inputs(20, heads=3, width=32)

    def output_and_gradients(function):
        out, pull_back = jax.vjp(lambda *x: function(*x, bias=None, scale=0.2), q, k, v)
        return [out, *pull_back(v)]

    want = output_and_gradients(xla.attend)
    assert worst(output_and_gradients(attend), want) < TOLERANCE


def test_without_a_gradient_it_computes_the_same():
    q, k, v, bias = inputs(30, heads=2, width=64)
    with_a_gradient, _ = jax.vjp(lambda q: attend(q, k, v, bias=bias, scale=0.125), q)
    without = attend(q, k, v, bias=bias, scale=0.125)
    np.testing.assert_array_equal(with_a_gradient, without)


def layer_with_gradients(implementation, monkeypatch, *, summed=True, norm_eps=None, **kwargs):
    """Output of an attention layer of 9 tokens; its gradients for the tokens and all parameters."""
    interpreted = dataclasses.replace(
        pallas_tpu.IMPLEMENTATION, attend=attend, sums_gradients=summed
    )
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, "pallas_tpu", interpreted)
    layer = Attention(
        64,
        2,
        qkv_bias="qkv",
        rel_pos_bias=RelativePositionBias((2, 4), 2, cls_token=True),
        norm_eps=norm_eps,
        implementation=implementation,
        dtype=jnp.float32,
        kernel_init=init,
        out_init=init,
        rngs=nnx.Rngs(0),
    )
    graph, params = nnx.split(layer)
    params = jax.tree.map(lambda x: jnp.asarray(rand(*x.shape, seed=x.size, scale=0.1)), params)
    x, weights = rand(2, 9, 64), rand(2, 9, 64, seed=1)

    def loss(params, x):
        out = nnx.merge(graph, params)(x, shared_bias=None, **kwargs)
        return jnp.sum(out * weights), out

    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, jnp.asarray(x))
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(grads)}
    return {"out": out, **flat}


def turned(**rope):
    return Rotation(Rope(100.0, **rope), (2, 4), 1, 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rotate", "norm_eps"),
    [(None, None), (turned(), None), (turned(pairs="neighbours", reference=3), 1e-6), (None, 1e-6)],
    ids=["plain", "rotated", "neighbours rotated, with a norm", "with a norm"],
)
def test_a_layer_has_the_gradients_of_xla_whoever_sums_those_of_its_biases(
    monkeypatch, rotate, norm_eps
):
    kwargs = {"rotate": rotate, "norm_eps": norm_eps}
    want = layer_with_gradients("xla", monkeypatch, **kwargs)
    # Output, tokens, two kernels, four biases and the table; scale and bias of a norm.
    assert len(want) == 9 + 2 * (norm_eps is not None)
    for summed in (True, False):
        got = layer_with_gradients("pallas_tpu", monkeypatch, summed=summed, **kwargs)
        for name, array in want.items():
            # The keys' bias adds the same to all logits of a query where nothing is rotated: its
            # gradient is zero but for rounding.
            largest = max(np.abs(array).max(), 1.0)
            assert np.abs(got[name] - array).max() < TOLERANCE * largest, name


@pytest.mark.slow
def test_a_bias_that_nobody_sums_would_be_seen(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "_start_sums", lambda refs, here: None)
    want = layer_with_gradients("xla", monkeypatch)
    got = layer_with_gradients("pallas_tpu", monkeypatch)
    (name,) = (name for name in want if "v_bias" in name)
    assert not np.abs(got[name] - want[name]).max() < 1e-2 * np.abs(want[name]).max()


def exact_attention(q, k, v, bias, scale):
    """In numpy and float64. [B, N, A, d] x 3, [A, N, N] -> [B, N, A, d]."""
    q, k, v, bias = (np.asarray(x, np.float64) for x in (q, k, v, bias))
    logits = np.einsum("bqhd,bkhd->bhqk", q * scale, k) + bias
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


def test_the_gradient_of_the_bias_is_the_slope_of_exact_attention():
    q, k, v, bias = inputs(12, heads=2, width=64, seed=4)
    weights, along = rand(*q.shape, seed=5), rand(*bias.shape, seed=6)

    def loss(bias):
        return jnp.sum(attend(q, k, v, bias=bias, scale=0.125) * weights)

    step = 1e-4
    ends = [
        np.sum(exact_attention(q, k, v, np.float64(bias) + move * along, 0.125) * weights)
        for move in (step, -step)
    ]
    slope = (ends[0] - ends[1]) / (2 * step)
    assert np.sum(np.asarray(jax.grad(loss)(bias)) * along) == pytest.approx(slope, rel=1e-5)


@pytest.mark.slow
def test_in_bfloat16_it_errs_no_more_than_twice_as_much_as_xla():
    *tokens, bias = inputs(65, heads=2, width=64, seed=7)
    q, k, v = (x.astype(jnp.bfloat16) for x in tokens)
    weights = rand(*q.shape, seed=8)

    def output_and_gradients(function, dtype):
        def loss(q, k, v, bias):
            out = function(q, k, v, bias=bias, scale=0.125)
            return jnp.sum(out.astype(jnp.float32) * weights), out

        arrays = [x.astype(dtype) for x in (q, k, v)]
        grads, out = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*arrays, bias)
        return [np.asarray(x, np.float64) for x in (out, *grads)]

    # Float32 is exact compared with bfloat16, and its output is compared with float64 itself.
    exact = output_and_gradients(xla.attend, jnp.float32)
    assert worst(exact[:1], [exact_attention(q, k, v, bias, 0.125)]) < TOLERANCE
    ours = output_and_gradients(attend, jnp.bfloat16)
    theirs = output_and_gradients(xla.attend, jnp.bfloat16)
    for got, reference, want in zip(ours, theirs, exact, strict=True):
        error, allowed = (np.sqrt(np.mean((x - want) ** 2)) for x in (got, reference))
        assert 0 < error < 2 * allowed


@pytest.mark.parametrize("groups", [0, 4, 32])
def test_each_device_computes_its_own_examples_and_heads(groups):
    """On 2 x 2 x 2 devices, the gradient of a shared bias is summed over those that share it."""
    arrays = inputs(9, batch=32, groups=groups)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with kernels.split_over(mesh, batch=sharding.BATCH_AXES, heads="tensor"):
        got = with_gradients(attend, arrays)
    assert worst(got, with_gradients(xla.attend, arrays)) < TOLERANCE


def control(monkeypatch, name, wrong, **kind):
    """How far results are off with one part replaced by a wrong one."""
    arrays = inputs(16, **kind)
    monkeypatch.setattr(pallas_tpu, name, wrong)
    return worst(with_gradients(attend, arrays), with_gradients(xla.attend, arrays))


def test_channels_of_another_head_would_be_seen(monkeypatch):
    class Careless(pallas_tpu._Tile):
        def only(self, x, head):
            return x

    assert control(monkeypatch, "_Tile", Careless, heads=2, width=64) > 1e-2


def test_a_bias_of_another_row_would_be_seen(monkeypatch):
    def first_bias(q, k, bias_ref, row, head):
        return pallas_tpu._dot(k, q, 1, 1) + bias_ref[0, head]

    assert control(monkeypatch, "_logits", first_bias, groups=2) > 1e-2


def test_a_sum_that_starts_anew_with_every_program_would_be_seen(monkeypatch):
    arrays = inputs(8, batch=4, heads=1)
    monkeypatch.setattr(pallas_tpu, "MAX_LOGITS", 1)  # a row in a program
    want = with_gradients(xla.attend, arrays)
    assert worst(with_gradients(attend, arrays), want) < TOLERANCE
    monkeypatch.setattr(pallas_tpu, "_BATCH", pallas_tpu._GROUPS)  # where each program is the first
    assert worst(with_gradients(attend, arrays)[4:], want[4:]) > 1e-2


def work(batch, tokens, heads, width, groups=1):
    q = jax.ShapeDtypeStruct((batch, tokens, heads * width), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((groups, heads, tokens, tokens), jnp.float32)
    return pallas_tpu._Work.of(q, bias, width, interpret=False)


@pytest.mark.parametrize(
    ("shape", "rows", "heads", "grid"),
    [
        ((128, 197, 12, 64), 1, 12, (1, 1, 128)),
        ((64, 257, 16, 64), 1, 4, (4, 1, 64)),  # more heads would be too much code
        ((64, 577, 16, 64), 1, 2, (8, 1, 64)),  # two heads fill the lanes of a register
        ((64, 257, 16, 80), 1, 8, (2, 1, 64)),  # eight heads end with a register
        ((256, 49, 3, 32, 64), 32, 3, (1, 2, 4)),  # rows of a program have a bias each
        ((256, 49, 3, 32), 32, 3, (1, 1, 8)),
    ],
)
def test_work_is_cut_into_programs(shape, rows, heads, grid, monkeypatch):
    monkeypatch.setattr(pallas_tpu, "MAX_LOGITS", LIMIT)
    cut = work(*shape)
    assert (cut.rows, cut.block_heads, cut.grid) == (rows, heads, grid)


@pytest.mark.parametrize("groups", [0, 64])
def test_a_kernels_name_says_what_it_computes(groups):
    q = jnp.zeros((64, 9, 3, 32), jnp.bfloat16)
    bias = jnp.zeros((groups, 3, 9, 9)) if groups else None
    jaxpr = str(jax.make_jaxpr(lambda q: attend(q, q, q, bias=bias, scale=1.0))(q))
    name = f"attention_forward_64x9x3x32_{groups}_bfloat16"
    assert name in jaxpr
    call = pallas_tpu.parse(name)
    assert call is not None and (call.q.shape, call.q.dtype) == ((64, 9, 96), jnp.bfloat16)
    assert (call.kind, call.width, call.bias and call.bias.shape[0]) == (
        "forward",
        32,
        groups or None,
    )
    assert pallas_tpu.parse("flash_attention") is None


@pytest.mark.parametrize(
    ("dtype", "widths", "platform", "message"),
    [
        (jnp.bfloat16, (64,), "cpu", "needs a TPU, and this run computes on cpu"),
        (jnp.float16, (64,), "tpu", "bfloat16 or float32, and dtype is float16"),
        (jnp.bfloat16, (64, 36), "tpu", "multiple of 8, and this network's have 36"),
    ],
)
def test_what_it_cannot_do_is_refused(dtype, widths, platform, message):
    with kernels.compiling_for(platform), pytest.raises(ConfigError, match=message):
        kernels.choose("pallas_tpu", dtype=dtype, head_widths=widths)
