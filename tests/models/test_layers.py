"""Each layer against torch, with wrong variants that must be seen."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fd_jax.models import layers

B, N, D, A = 3, 10, 24, 4  # examples, tokens, channels, heads
GRID = (3, 3)
TOLERANCE = 1e-5


def rand(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def init(key, shape, dtype=jnp.float32, **_):
    return jax.random.normal(key, shape, dtype) * 0.2


def t(array):
    return torch.from_numpy(np.array(array)).double()


def make_attention(qkv_bias="qkv", *, table=True, kind="xla", **kwargs):
    bias = layers.RelativePositionBias(GRID, A, cls_token=True) if table else None
    module = layers.Attention(
        D,
        A,
        qkv_bias=qkv_bias,
        rel_pos_bias=bias,
        kind=kind,
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
        index = layers.relative_position_index(GRID, cls_token=True)
        table = t(module.rel_pos_bias.table[...])
        logits = logits + table[torch.from_numpy(index.astype(np.int64))].permute(2, 0, 1)
    out = logits.softmax(-1) @ v
    out = out.transpose(1, 2).reshape(B, N, D)
    return (out @ t(module.proj.kernel[...]) + t(module.proj.bias[...])).numpy()


def run(module, x):
    return np.asarray(module(jnp.asarray(x), shared_bias=None, rotate=None))


@pytest.mark.parametrize("kind", ["xla", "dot_product"])
@pytest.mark.parametrize("qkv_bias", ["qkv", "qv", "none"])
def test_attention(qkv_bias, kind):
    module = make_attention(qkv_bias, kind=kind)
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
    index = layers.relative_position_index((14, 14), cls_token=True)
    assert index.shape == (197, 197)
    assert index.max() + 1 == 732
    assert (index[0, 5], index[5, 0], index[0, 0]) == (729, 730, 731)
    assert index[7, 7] == 364
    assert (index[1, 196], index[196, 1]) == (0, 728)
    index = layers.relative_position_index((16, 16), cls_token=True)
    assert (index[0, 5], index[5, 0], index[0, 0], index[9, 9]) == (961, 962, 963, 480)
    index = layers.relative_position_index((14, 14), cls_token=False)
    assert index.shape == (196, 196) and index.max() + 1 == 729


ACTIVATIONS = {
    "gelu_erf": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize(("name", "reference"), ACTIVATIONS.items())
def test_mlp(name, reference):
    module = layers.Mlp(
        D,
        4 * D,
        activation=name,
        dtype=jnp.float32,
        kernel_init=init,
        out_init=init,
        rngs=nnx.Rngs(1),
    )
    module.fc1.bias[...] = jnp.asarray(rand(4 * D, seed=1))
    x = rand(B, N, D, seed=2)
    hidden = t(x) @ t(module.fc1.kernel[...]) + t(module.fc1.bias[...])

    def out(function):
        return (function(hidden) @ t(module.fc2.kernel[...])).numpy()

    np.testing.assert_allclose(module(jnp.asarray(x)), out(reference), atol=TOLERANCE)
    others = {"gelu_erf": "gelu_tanh", "gelu_tanh": "quick_gelu", "quick_gelu": "gelu_erf"}
    module.activation = others[name]
    assert np.abs(module(jnp.asarray(x)) - out(reference)).max() > 10 * TOLERANCE


@pytest.mark.parametrize(("name", "reference"), ACTIVATIONS.items())
def test_gradients_of_activations_are_torchs(name, reference):
    x, weights = rand(7, D, scale=2.0), rand(7, D, seed=1)

    def grad(name):
        return jax.grad(lambda x: jnp.sum(layers.activate(x, name) * weights))(x)

    tensor = t(x).requires_grad_()
    (reference(tensor) * t(weights)).sum().backward()
    np.testing.assert_allclose(grad(name), tensor.grad.numpy(), atol=TOLERANCE)
    other = "quick_gelu" if name == "gelu_erf" else "gelu_erf"
    assert np.abs(grad(other) - tensor.grad.numpy()).max() > 10 * TOLERANCE


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
    index = torch.from_numpy(layers.relative_position_index(GRID, cls_token=True)).long()
    bias = tensors["table"][index].permute(2, 0, 1)
    logits = torch.einsum("bqad,bkad->baqk", q, k) * (D // A) ** -0.5 + bias
    out = torch.einsum("baqk,bkad->bqad", logits.softmax(-1), v).reshape(B, N, D)
    out = out @ t(module.proj.kernel[...]) + t(module.proj.bias[...])
    (out * t(weights)).sum().backward()
    # Control: a softmax whose normaliser has no gradient.
    monkeypatch.setattr(layers, "softmax_average", average_with_constant_total)
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

    _, backward = jax.vjp(layers.softmax_average, jnp.asarray(logits), v)
    got_v = np.asarray(backward(g)[1], np.float32)
    np.testing.assert_allclose(got_v, values.grad.numpy(), atol=0.01 * np.abs(got_v).max())
    assert median_error(layers.softmax_average) < 0.01
    assert median_error(average_of_rounded) > 0.1


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_layer_norm(eps):
    module = layers.LayerNorm(D, eps=eps, dtype=jnp.float32, rngs=nnx.Rngs(0))
    scale, bias = rand(D, seed=1), rand(D, seed=2)
    module.scale[...], module.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
    x = rand(B, N, D, seed=3, scale=3e-3)

    def want(eps):
        return torch.nn.functional.layer_norm(t(x), (D,), t(scale), t(bias), eps).numpy()

    np.testing.assert_allclose(module(x), want(eps), atol=TOLERANCE)
    assert np.abs(module(x) - want(1e-5 if eps == 1e-6 else 1e-6)).max() > 100 * TOLERANCE


def test_layer_norm_of_tokens_with_a_large_common_part():
    """Flax's default, E[x^2] - E[x]^2, loses four digits here."""
    x = rand(B, N, D, seed=3) + 300
    module = layers.LayerNorm(D, eps=1e-6, dtype=jnp.float32, rngs=nnx.Rngs(0))
    want = torch.nn.functional.layer_norm(t(x), (D,), eps=1e-6).numpy()
    np.testing.assert_allclose(module(x), want, atol=1e-4)
    fast = nnx.LayerNorm(D, epsilon=1e-6, use_fast_variance=True, rngs=nnx.Rngs(0))
    assert np.abs(fast(x) - want).max() > 1e-3


@pytest.mark.parametrize("use_bias", [True, False])
def test_patch_embed_is_torchs_convolution(use_bias):
    module = layers.PatchEmbed(
        4, D, use_bias=use_bias, dtype=jnp.float32, kernel_init=init, rngs=nnx.Rngs(0)
    )
    if use_bias:
        module.bias[...] = jnp.asarray(rand(D, seed=1))
    images = rand(B, 12, 8, 3, seed=2)
    weight = t(module.kernel[...]).permute(3, 2, 0, 1)
    bias = t(module.bias[...]) if use_bias else None
    out = torch.nn.functional.conv2d(t(images).permute(0, 3, 1, 2), weight, bias, stride=4)
    want = out.flatten(2).transpose(1, 2).numpy()
    np.testing.assert_allclose(module(jnp.asarray(images)), want, atol=TOLERANCE)


def test_linear_and_its_gradients_are_torchs():
    x, kernel, bias = rand(7, D), rand(D, 3, D, seed=1), rand(3, D, seed=2)
    weights = rand(7, 3, D, seed=3)

    def loss(x, kernel, bias):
        return jnp.sum(layers.linear(x, kernel, bias, jnp.float32, jnp.float32) * weights)

    got = jax.grad(loss, argnums=(0, 1, 2))(x, kernel, bias)
    tensors = [t(a).requires_grad_() for a in (x, kernel, bias)]
    out = torch.einsum("md,dce->mce", tensors[0], tensors[1]) + tensors[2]
    (out * t(weights)).sum().backward()
    for grad, tensor in zip(got, tensors, strict=True):
        np.testing.assert_allclose(grad, tensor.grad.numpy(), rtol=1e-5, atol=1e-5)


def test_weight_gradients_leave_the_matmul_in_float32():
    """In bfloat16 compute, the gradient of the float32 master never passes through bfloat16."""
    x, kernel, bias = rand(512, D), rand(D, D, seed=1), rand(D, seed=2)

    def grad(grad_dtype):
        def loss(kernel, bias):
            y = layers.linear(x.astype(jnp.bfloat16), kernel, bias, jnp.bfloat16, grad_dtype)
            return jnp.sum(y.astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1))(kernel, bias)

    exact = x.astype(jnp.bfloat16).astype(np.float64).sum(0)
    kernel_grad, bias_grad = grad(jnp.float32)
    np.testing.assert_allclose(kernel_grad[:, 0], exact, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(bias_grad, 512)
    rounded, _ = grad(jnp.bfloat16)
    assert np.abs(rounded[:, 0] - exact).max() > 1e-3


def test_drop_path_formula_and_expectation():
    branch = rand(20000, 1, 2, seed=1)
    uniform = np.random.default_rng(0).random(20000).astype(np.float32)
    out = np.asarray(layers.drop_path(jnp.asarray(branch), jnp.asarray(uniform), rate=0.3))
    kept = np.floor(0.7 + uniform)
    np.testing.assert_allclose(out, branch / 0.7 * kept[:, None, None], rtol=1e-5)
    assert kept.mean() == pytest.approx(0.7, abs=0.01)
    same = layers.drop_path(jnp.asarray(branch), None, rate=0.3)
    np.testing.assert_array_equal(same, branch)


def test_drop_path_of_rows_is_that_of_their_examples():
    branch, uniform = rand(B, N, D), np.array([0.1, 0.9, 0.2], np.float32)
    want = layers.drop_path(jnp.asarray(branch), uniform, rate=0.5)
    rows = layers.drop_path(jnp.asarray(branch.reshape(B * N, D)), uniform, rate=0.5)
    np.testing.assert_array_equal(rows.reshape(B, N, D), want)
    assert not np.array_equal(want[0], want[1])


def test_rotation_is_dinov3s():
    from transformers.models.dinov3_vit import modeling_dinov3_vit as hf

    config = hf.DINOv3ViTConfig(
        hidden_size=32, num_attention_heads=2, image_size=64, patch_size=16, rope_theta=100.0
    )
    embed = hf.DINOv3ViTRopePositionEmbedding(config).eval()  # training jitters the coordinates
    cos, sin = embed(torch.zeros(1, 3, 64, 64))
    q, k = rand(2, 2, 5 + 16, 16, seed=1), rand(2, 2, 5 + 16, 16, seed=2)
    want, _ = hf.apply_rotary_pos_emb(torch.from_numpy(q), torch.from_numpy(k), cos, sin)
    rotate = layers.Rotation((4, 4), prefix=5, head_width=16, theta=100.0)
    got = np.asarray(rotate(jnp.asarray(q.transpose(0, 2, 1, 3)))).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(got, want.numpy(), atol=TOLERANCE)
    wrong = layers.Rotation((4, 4), prefix=5, head_width=16, theta=10000.0)
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
