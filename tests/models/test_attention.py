"""Attention against torch, with wrong variants that must be seen."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fd_jax.models import attention
from fd_jax.models.kernels import xla
from fd_jax.models.rotary import Rope, Rotation
from tests.models.arrays import init, rand, t

B, N, D, A = 3, 10, 24, 4  # examples, tokens, channels, heads
GRID = (3, 3)
TOLERANCE = 1e-5


def make_attention(qkv_bias="qkv", *, table=True, implementation="xla", **kwargs):
    bias = attention.RelativePositionBias(GRID, A, cls_token=True) if table else None
    module = attention.Attention(
        D,
        A,
        qkv_bias=qkv_bias,
        rel_pos_bias=bias,
        implementation=implementation,
        dtype=jnp.float32,
        kernel_init=init,
        out_init=init,
        rngs=nnx.Rngs(0),
        **kwargs,
    )
    for seed, name in enumerate(("q_bias", "k_bias", "v_bias")):
        if getattr(module, name) is not None:
            getattr(module, name)[...] = jnp.asarray(rand(D, seed=seed))
    module.proj.bias[...] = jnp.asarray(rand(D, seed=5))
    if bias is not None:
        bias.table[...] = jnp.asarray(rand(*bias.table.shape, seed=6))
    return module


def torch_attention(module, x, *, order="qkv", scale=None, with_table=True):
    """Plain torch in float64 from the module's own arrays."""
    kernel = t(module.qkv.kernel[...])  # [D, 3, D]
    parts = {}
    for i, name in enumerate("qkv"):
        bias = getattr(module, f"{name}_bias")
        rows = t(x) @ kernel[:, i] + (0 if bias is None else t(bias[...]))
        parts[name] = rows.reshape(B, N, A, D // A).transpose(1, 2)
    q, k, v = (parts[name] for name in order)
    logits = (q * (scale or (D // A) ** -0.5)) @ k.transpose(-1, -2)
    if module.rel_pos_bias is not None and with_table:
        index = attention.relative_position_index(GRID, cls_token=True)
        table = t(module.rel_pos_bias.table[...])
        logits = logits + table[torch.from_numpy(index.astype(np.int64))].permute(2, 0, 1)
    out = logits.softmax(-1) @ v
    out = out.transpose(1, 2).reshape(B, N, D)
    return (out @ t(module.proj.kernel[...]) + t(module.proj.bias[...])).numpy()


def run(module, x):
    return np.asarray(module(jnp.asarray(x), shared_bias=None, rotate=None))


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
@pytest.mark.parametrize("qkv_bias", ["qkv", "qv", "none"])
def test_attention(qkv_bias, implementation, cudnn_by_xla):
    module = make_attention(qkv_bias, implementation=implementation)
    assert (module.k_bias is not None) == (qkv_bias == "qkv")
    x = rand(B, N, D, seed=9)
    np.testing.assert_allclose(run(module, x), torch_attention(module, x), atol=TOLERANCE)


@pytest.mark.parametrize(
    "wrong", [{"order": "kqv"}, {"scale": 1.0}, {"with_table": False}], ids=str
)
def test_wrong_attention_is_seen(wrong):
    module = make_attention()
    x = rand(B, N, D, seed=9)
    right, other = torch_attention(module, x), torch_attention(module, x, **wrong)
    assert np.abs(right - other).max() > 100 * TOLERANCE


def test_only_the_tree_shows_a_k_bias():
    """A bias on k adds the same number to every key of a query, which softmax takes out again.

    No comparison of outputs can see it, so the tree is what tells the families apart; a bias on v
    in its place is seen.
    """
    module, x = make_attention("qv"), rand(B, N, D, seed=9)
    assert "k_bias" not in nnx.to_pure_dict(nnx.state(module))
    other = make_attention("qkv")  # the same arrays, and a k bias
    assert np.abs(other.k_bias[...]).min() > 0
    want = run(module, x)
    np.testing.assert_allclose(run(other, x), want, atol=TOLERANCE)
    other.k_bias[...], other.v_bias[...] = other.v_bias[...], jnp.zeros(D)
    assert np.abs(run(other, x) - want).max() > 100 * TOLERANCE


def test_shared_bias_equals_own_table():
    module = make_attention()
    x = rand(B, N, D, seed=9)
    bias = module.rel_pos_bias()
    plain = make_attention(table=False)
    shared = plain(jnp.asarray(x), shared_bias=bias, rotate=None)
    np.testing.assert_allclose(shared, run(module, x), atol=1e-6)


def test_relative_position_index_anchors():
    index = attention.relative_position_index((14, 14), cls_token=True)
    assert index.shape == (197, 197)
    assert index.max() + 1 == 732
    assert (index[0, 5], index[5, 0], index[0, 0]) == (729, 730, 731)
    assert index[7, 7] == 364
    assert (index[1, 196], index[196, 1]) == (0, 728)
    index = attention.relative_position_index((16, 16), cls_token=True)
    assert (index[0, 5], index[5, 0], index[0, 0], index[9, 9]) == (961, 962, 963, 480)
    index = attention.relative_position_index((14, 14), cls_token=False)
    assert index.shape == (196, 196) and index.max() + 1 == 729


def test_gradients_of_attention_are_torchs(monkeypatch):
    module = make_attention()
    x, weights = rand(B, N, D, seed=9), rand(B, N, D, seed=10)
    graph, params = nnx.split(module)

    def loss(x, params):
        out = nnx.merge(graph, params)(x, shared_bias=None, rotate=None)
        return jnp.sum(out * weights)

    def gradients():
        x_grad, grads = jax.grad(loss, argnums=(0, 1))(jnp.asarray(x), params)
        table = grads["rel_pos_bias"]["table"][...]
        return {"x": x_grad, "kernel": grads["qkv"]["kernel"][...], "table": table}

    got = gradients()
    tensors = {
        name: t(leaf).requires_grad_()
        for name, leaf in (
            ("x", x),
            ("kernel", module.qkv.kernel[...]),
            ("table", module.rel_pos_bias.table[...]),
        )
    }
    rows = torch.einsum("bnd,dce->cbne", tensors["x"], tensors["kernel"])
    q, k, v = (
        (row + t(getattr(module, f"{name}_bias")[...])).reshape(B, N, A, D // A)
        for row, name in zip(rows, "qkv", strict=True)
    )
    index = torch.from_numpy(attention.relative_position_index(GRID, cls_token=True)).long()
    bias = tensors["table"][index].permute(2, 0, 1)
    logits = torch.einsum("bqad,bkad->baqk", q, k) * (D // A) ** -0.5 + bias
    out = torch.einsum("baqk,bkad->bqad", logits.softmax(-1), v).reshape(B, N, D)
    out = out @ t(module.proj.kernel[...]) + t(module.proj.bias[...])
    (out * t(weights)).sum().backward()
    # Control: a softmax whose normaliser has no gradient.
    monkeypatch.setattr(xla, "softmax_average", average_with_constant_total)
    wrong = gradients()
    for name, tensor in tensors.items():
        want = tensor.grad.numpy()
        size = np.abs(want).max()
        np.testing.assert_allclose(got[name], want, atol=2e-6 * size, err_msg=name)
        assert np.abs(wrong[name] - want).max() > 1e-2 * size


def average_with_constant_total(logits, v):
    total = jax.lax.stop_gradient(jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    return jnp.einsum("bhqk,bkhd->bqhd", jnp.exp(logits - total), v)


def average_of_rounded(logits, v):
    """Weights that are rounded after their division: they sum to nearly one."""

    @jax.custom_vjp
    def softmax(logits):
        return jax.nn.softmax(logits).astype(v.dtype)

    def backward(p, g):
        p, g = p.astype(jnp.float32), g.astype(jnp.float32)
        return (p * (g - jnp.sum(p * g, axis=-1, keepdims=True)),)

    softmax.defvjp(lambda logits: 2 * (softmax(logits),), backward)
    return jnp.einsum("bhqk,bkhd->bqhd", softmax(logits), v)


def test_bfloat16_gradients_of_a_softmax_do_not_feel_what_all_keys_share():
    """Rows with one large weight, and values with a common part, which cancels in float64."""
    tokens, width = 197, 64
    logits = rand(1, 1, tokens, tokens)
    logits[..., 0] += np.linspace(8, 12, tokens, dtype=np.float32)
    v = jnp.asarray(rand(1, tokens, 1, width, seed=1) + 1, jnp.bfloat16)
    g = jnp.asarray(rand(1, tokens, 1, width, seed=2) + 0.3, jnp.bfloat16)

    exact = t(logits).requires_grad_()
    values = t(v.astype(jnp.float32)).requires_grad_()
    out = torch.einsum("bhqk,bkhd->bqhd", exact.softmax(-1), values)
    (out * t(g.astype(jnp.float32))).sum().backward()
    want = exact.grad.numpy()

    def median_error(average):
        _, backward = jax.vjp(average, jnp.asarray(logits), v)
        errors = np.linalg.norm(backward(g)[0] - want, axis=-1) / np.linalg.norm(want, axis=-1)
        return np.median(errors)

    _, backward = jax.vjp(xla.softmax_average, jnp.asarray(logits), v)
    got_v = np.asarray(backward(g)[1], np.float32)
    np.testing.assert_allclose(got_v, values.grad.numpy(), atol=0.01 * np.abs(got_v).max())
    assert median_error(xla.softmax_average) < 0.01
    assert median_error(average_of_rounded) > 0.1


def test_rotation_is_dinov3s():
    from transformers.models.dinov3_vit import modeling_dinov3_vit as hf

    config = hf.DINOv3ViTConfig(
        hidden_size=32, num_attention_heads=2, image_size=64, patch_size=16, rope_theta=100.0
    )
    embed = hf.DINOv3ViTRopePositionEmbedding(config).eval()  # training jitters the coordinates
    cos, sin = embed(torch.zeros(1, 3, 64, 64))
    q, k = rand(2, 2, 5 + 16, 16, seed=1), rand(2, 2, 5 + 16, 16, seed=2)
    want, _ = hf.apply_rotary_pos_emb(torch.from_numpy(q), torch.from_numpy(k), cos, sin)
    rotate = Rotation(Rope(100.0), (4, 4), prefix=5, head_width=16)
    got = np.asarray(rotate(jnp.asarray(q.transpose(0, 2, 1, 3)))).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(got, want.numpy(), atol=TOLERANCE)
    wrong = Rotation(Rope(10000.0), (4, 4), prefix=5, head_width=16)
    other = np.asarray(wrong(jnp.asarray(q.transpose(0, 2, 1, 3)))).transpose(0, 2, 1, 3)
    assert np.abs(other - want.numpy()).max() > 100 * TOLERANCE


def test_bfloat16_stays_near_float32():
    module = make_attention()
    x = rand(B, N, D, seed=9)
    want = run(module, x)
    module.qkv.dtype = module.proj.dtype = jnp.bfloat16
    got = module(jnp.asarray(x, jnp.bfloat16), shared_bias=None, rotate=None)
    assert got.dtype == jnp.bfloat16
    assert np.abs(np.asarray(got, np.float32) - want).max() < 0.05 * np.abs(want).max()
