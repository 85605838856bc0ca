"""Implementations of attention against XLA's: padding, masks, grouped biases, meshes, refusals.

The GPU kernels cannot run here. What is ours around them runs with XLA inside; and programs are
lowered for CUDA as far as that goes without a card, so that a choice is seen to hold its kernel.
"""

import dataclasses
import functools
import re

from flax import nnx
import jax
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn
import jax.numpy as jnp
import numpy as np
import pytest

from fd_jax import sharding
from fd_jax.errors import ConfigError
from fd_jax.models import kernels
from fd_jax.models.attention import Attention, RelativePositionBias, attend
from fd_jax.models.kernels import base, cudnn, xla
from tests.models.arrays import init, rand
from tests.models.attentions import HEADS, WIDTH, inputs, with_gradients, worst

TOLERANCE = 5e-6  # of the largest value; float32
CUDNN_BY_XLA = functools.partial(cudnn.attend, implementation="xla")


CASES = [(197, {}), (257, {"masked": True}), (577, {}), (49, {"groups": 4, "batch": 8}), (16, {})]
CASES.append((15, {"groups": 4, "batch": 4}))  # a bias for every row


@pytest.mark.parametrize(("tokens", "kind"), CASES, ids=str)
def test_outputs_and_all_gradients_are_those_of_xla(tokens, kind):
    arrays = inputs(tokens, **kind)
    want = with_gradients(xla.attend, arrays)
    assert worst(with_gradients(CUDNN_BY_XLA, arrays), want) < TOLERANCE


def test_attention_without_a_bias_is_that_of_xla():
    q, k, v, _ = inputs(197)
    want = xla.attend(q, k, v, bias=None, scale=0.25)
    assert worst([CUDNN_BY_XLA(q, k, v, bias=None, scale=0.25)], [want]) < TOLERANCE


def test_a_key_that_is_padded_but_not_masked_would_be_seen(monkeypatch):
    arrays = inputs(197)
    monkeypatch.setattr(base, "MASKED", 0.0)
    got = with_gradients(CUDNN_BY_XLA, arrays)
    assert worst(got, with_gradients(xla.attend, arrays)) > 50 * TOLERANCE


def layer_with_gradients(implementation, monkeypatch, seen=None):
    """Output of an attention layer of 9 tokens; its gradients for the tokens and all parameters."""

    def by_xla(q, k, v, *, bias, scale):
        if seen is not None:
            seen.append(q.shape[1])
        return CUDNN_BY_XLA(q, k, v, bias=bias, scale=scale)

    replaced = dataclasses.replace(cudnn.IMPLEMENTATION, attend=by_xla)
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, "cudnn", replaced)
    table = RelativePositionBias((2, 4), HEADS, cls_token=True)
    layer = Attention(
        HEADS * WIDTH,
        HEADS,
        qkv_bias="qkv",
        rel_pos_bias=table,
        implementation=implementation,
        dtype=jnp.float32,
        kernel_init=init,
        out_init=init,
        rngs=nnx.Rngs(0),
    )
    for seed, bias in enumerate((layer.q_bias, layer.k_bias, layer.v_bias, table.table)):
        bias[...] = jnp.asarray(rand(*bias.shape, seed=seed))
    graph, params = nnx.split(layer)
    x, weights = rand(2, 9, HEADS * WIDTH), rand(2, 9, HEADS * WIDTH, seed=1)

    def loss(params, x):
        out = nnx.merge(graph, params)(x, shared_bias=None)
        return jnp.sum(out * weights), out

    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, jnp.asarray(x))
    return [out, *jax.tree.leaves(grads)]


@pytest.mark.slow
def test_a_token_that_a_layer_adds_before_its_kernel_changes_nothing(monkeypatch):
    seen = []
    got = layer_with_gradients("cudnn", monkeypatch, seen)
    want = layer_with_gradients("xla", monkeypatch)
    assert seen == [10]
    assert len(got) == 9  # output, tokens, two kernels, four biases and the table
    # The keys' bias adds the same to all logits of a query: its gradient is zero but for rounding.
    errors = [
        np.abs(g - w).max() / max(np.abs(w).max(), 1.0) for g, w in zip(got, want, strict=True)
    ]
    assert max(errors) < TOLERANCE
    monkeypatch.setattr(base, "MASKED", 0.0)
    assert worst(layer_with_gradients("cudnn", monkeypatch)[:2], want[:2]) > 50 * TOLERANCE


def test_biases_in_another_order_than_their_groups_would_be_seen(monkeypatch):
    arrays = inputs(49, groups=4, batch=8)
    want = with_gradients(xla.attend, arrays)

    def other_order(x, groups):
        batch, tokens, heads, width = x.shape
        x = x.reshape(groups, batch // groups, tokens, heads, width).transpose(1, 2, 0, 3, 4)
        return x.reshape(batch // groups, tokens, groups * heads, width)

    monkeypatch.setattr(base, "_groups_to_heads", other_order)
    assert worst(with_gradients(CUDNN_BY_XLA, arrays), want) > 1e-2


def lowered_for_cuda(function, tokens, *, gradient):
    """The program's text for NVIDIA GPUs, with its number of tokens padded or not."""
    q = jax.ShapeDtypeStruct((2, tokens, HEADS, 64), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((HEADS, tokens, tokens), jnp.float32)

    def loss(q, k, v, bias):
        return jnp.sum(function(q, k, v, bias=bias, scale=0.125).astype(jnp.float32))

    made = jax.grad(loss, argnums=(0, 1, 2, 3)) if gradient else loss
    return jax.jit(made).trace(q, q, q, bias).lower(lowering_platforms=("cuda",)).as_text()


def kernel_calls(text):
    return re.findall(r"custom_call @([\w$.]*(?:fmha)\w*)", text)


def test_a_program_with_cudnn_holds_its_kernels(monkeypatch):
    # The version that the driver's library would report; everything after that is jax's own.
    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91000)
    forward = lowered_for_cuda(kernels.IMPLEMENTATIONS["cudnn"].attend, 197, gradient=False)
    assert kernel_calls(forward) == ["__cudnn$fmhaScaleBiasSoftmax"]
    both = lowered_for_cuda(kernels.IMPLEMENTATIONS["cudnn"].attend, 197, gradient=True)
    assert kernel_calls(both) == [
        "__cudnn$fmhaScaleBiasSoftmax",
        "__cudnn$fmhaScaleBiasSoftmaxBackward",
    ]
    # Queries, keys and bias reach the kernel with one token more; 197 is refused in training.
    assert re.search(r"fmhaScaleBiasSoftmaxBackward.*tensor<1x2x198x198xbf16>", both)
    plain = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    with pytest.raises(NotImplementedError, match="197"):
        lowered_for_cuda(
            lambda q, k, v, bias, scale: plain(
                q, k, v, bias=bias[None].astype(q.dtype), scale=scale
            ),
            197,
            gradient=True,
        )


def test_a_program_with_xla_holds_no_kernel():
    """Control; and so did the attention that was called "dot_product"."""
    assert kernel_calls(lowered_for_cuda(xla.attend, 197, gradient=True)) == []

    def removed(q, k, v, *, bias, scale):
        return jax.nn.dot_product_attention(q, k, v, bias=bias[None].astype(q.dtype), scale=scale)

    assert kernel_calls(lowered_for_cuda(removed, 197, gradient=True)) == []


@pytest.mark.parametrize("groups", [0, 4, 32])
def test_each_device_computes_its_own_examples_and_heads(groups):
    """On 2 x 2 x 2 devices: a quarter of the examples, half of the heads, the bias summed.

    As many biases as rows lie with their rows; fewer belong to the rows of every device.
    """
    arrays = inputs(17, batch=32, groups=groups)
    want = with_gradients(xla.attend, arrays)
    seen = []

    def watched(q, k, v, *, bias, scale):
        seen.append((q.shape, bias.shape))
        return CUDNN_BY_XLA(q, k, v, bias=bias, scale=scale)

    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with kernels.split_over(mesh, batch=sharding.BATCH_AXES, heads="tensor"):
        got = with_gradients(base.per_device(watched), arrays)
    assert {shape for shape, _ in seen} == {(8, 17, 1, WIDTH)}
    assert {shape[-3] for _, shape in seen} == {1}
    assert {shape[0] for _, shape in seen} == {{0: 1, 4: 4, 32: 8}[groups]}
    assert worst(got, want) < TOLERANCE
    # Control: without the mesh the kernel would see all of them.
    seen.clear()
    with_gradients(base.per_device(watched), arrays)
    assert {shape for shape, _ in seen} == {(32, 17, HEADS, WIDTH)}


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_auto_is_what_was_measured_to_be_fastest(platform, dtype):
    """docs/performance.md has the figures: cuDNN's won on a GPU, in the dtype that it computes."""
    want = "cudnn" if platform == "gpu" and dtype == jnp.bfloat16 else "xla"
    with kernels.compiling_for(platform):
        assert kernels.choose("auto", dtype=dtype, head_widths=(64,)) == want


def test_auto_passes_over_what_a_network_cannot_use():
    with kernels.compiling_for("gpu"):
        assert kernels.choose("auto", dtype=jnp.bfloat16, head_widths=(64, 36)) == "xla"


@pytest.mark.parametrize("capability", ["7.5", "gfx942", "8.0", "9.0", ""])
def test_only_gpus_that_cudnns_attention_knows_get_it(monkeypatch, capability):
    """An empty one is that of ahead-of-time compilation, where there is no GPU to ask."""
    monkeypatch.setattr(cudnn, "_capability", lambda: capability)
    settle = functools.partial(kernels.choose, dtype=jnp.bfloat16, head_widths=(64,))
    with kernels.compiling_for("gpu"):
        if capability in ("7.5", "gfx942"):
            assert settle("auto") == "xla"
            with pytest.raises(ConfigError, match=f"8.0 .Ampere. or later.*{capability}"):
                settle("cudnn")
        else:
            assert settle("auto") == settle("cudnn") == "cudnn"


@pytest.mark.parametrize(
    ("name", "dtype", "widths", "platform", "message"),
    [
        ("flash", jnp.bfloat16, (64,), "gpu", "'flash' is unknown; .* 'auto', 'xla', 'cudnn'"),
        ("dot_product", jnp.bfloat16, (64,), "gpu", "removed.*write 'xla'.*or 'cudnn'"),
        ("cudnn", jnp.float32, (64,), "gpu", "bfloat16 or float16, and dtype is float32"),
        ("cudnn", jnp.bfloat16, (64, 136), "gpu", "up to 128 channels .* network's have 136"),
        ("cudnn", jnp.bfloat16, (36,), "gpu", "multiples of 8.*have 36"),
        ("cudnn", jnp.bfloat16, (64,), "tpu", "needs an NVIDIA GPU.*computes on tpu"),
    ],
)
def test_what_an_implementation_cannot_do_is_refused(name, dtype, widths, platform, message):
    with kernels.compiling_for(platform), pytest.raises(ConfigError, match=message):
        kernels.choose(name, dtype=dtype, head_widths=widths)


def test_wide_heads_are_taken_on_hopper(monkeypatch):
    monkeypatch.setattr(cudnn, "_capability", lambda: "9.0")
    wide = functools.partial(kernels.choose, "cudnn", dtype=jnp.bfloat16)
    with kernels.compiling_for("gpu"):
        assert wide(head_widths=(256,)) == "cudnn"
        with pytest.raises(ConfigError, match="up to 256"):
            wide(head_widths=(264,))


def test_an_unknown_name_never_reaches_a_network():
    q = jnp.ones((1, 4, 1, 8))
    with pytest.raises(KeyError):
        attend(q, q, q, bias=None, scale=1.0, implementation="auto")


def test_chips_of_another_machine_are_named_for_a_while_only():
    with kernels.compiling_for("gpu"):
        assert base.platform() == "gpu"
    assert base.platform() == "cpu"
