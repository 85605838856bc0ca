"""Linear layers of int8 and float8 numbers against plain numpy, and the networks that have them."""

from flax import nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fd_jax import sharding
from fd_jax.errors import ConfigError
from fd_jax.models import narrow, quantized, trees
from tests import tiny
from tests.cost.test_flops import convnext
from tests.models import evas, resnets

ALL = ("qkv", "proj", "fc1", "fc2")
# A network of each kind of attention and MLP, and the layers of its blocks that are quantised.
NETWORKS = {
    "vit": (tiny.teacher_spec(), ALL),
    "rotations of neighbours and a gate": (evas.spec("EVA-02-CLIP"), (*ALL, "gate")),
    "swin": (tiny.swin_spec(1), ALL),
    "swin_v2": (tiny.swin_spec(2), ALL),
    "convnext": (convnext(), ("fc1", "fc2")),
}
LARGEST = {"int8": 127, "float8_e4m3fn": 448}


def parameters(spec, scale=0.3):
    shapes = spec.abstract()[1]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    return tiny.randomize(zeros, 3, scale=scale)


def network(spec, params, matmuls, dtype=jnp.float32):
    """The quantised network of float32 parameters."""
    definition, _ = spec.abstract(matmuls=matmuls, dtype=dtype)
    return nnx.merge(definition, jax.tree.map(jnp.asarray, quantized.rounded(params, matmuls)))


def nearest(x, kind, axis):
    """The numbers that stand for x, in float64, and their factors; `axis` None: one for all."""
    most = np.float32(LARGEST[kind])
    largest = np.abs(x).max(axis=axis, keepdims=True)
    largest = np.where(largest, largest, 1).astype(np.float32)
    scaled, factors = x * (most / largest), largest / most
    if kind == "int8":
        return np.rint(scaled).astype(np.float64), factors  # ties to even
    return scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float64), factors


def by_numpy(x, kernel, bias, kind, *, per_channel=True):
    """The layer in float64 after rounding. [..., D] x [D, *out] -> [..., *out]."""
    rows, row_factors = nearest(x, kind, -1 if per_channel else None)
    columns, factors = nearest(kernel, kind, 0 if per_channel else None)
    row_factors = row_factors.reshape(*row_factors.shape[:-1], *(1,) * (kernel.ndim - 1))
    return np.tensordot(rows, columns, axes=1) * row_factors * factors[0] + bias


@pytest.mark.parametrize("kind", narrow.KINDS)
@pytest.mark.parametrize("leading", [(5,), (2, 3), (2, 3, 4)])
def test_a_layer_is_that_of_numpy(kind, leading):
    """Of matrices, and of the fused kernel [D, 3, D], which each leading shape is multiplied by."""
    spec = tiny.teacher_spec()
    params = parameters(spec)
    block = network(spec, params, kind).blocks["1"]
    own = params["blocks"]["1"]
    x = np.random.default_rng(4).normal(size=(*leading, 48)).astype(np.float32)
    x[0] *= 100  # tokens of very different lengths
    x[1].flat[:48] = 0
    pairs = ((block.attn.qkv, own["attn"]["qkv"]), (block.mlp.fc1, own["mlp"]["fc1"]))
    for layer, weights in pairs:
        bias = weights.get("bias", np.float32(0))
        want = by_numpy(x, weights["kernel"], bias, kind)
        got = np.asarray(layer(jnp.asarray(x)))
        assert got.dtype == np.float32 and got.shape == want.shape
        # To the rounding of float32: of its factors, and of sums of a few hundred products.
        scale = np.abs(want).max(axis=tuple(range(len(leading), want.ndim)), keepdims=True)
        assert np.all(np.abs(got - want) <= 2e-6 * scale)
        # Negative control: without the rounding it is another number.
        exact = np.tensordot(x.astype(np.float64), weights["kernel"], axes=1) + bias
        assert np.any(np.abs(got - exact) > 1e-3 * scale)


@pytest.mark.parametrize("kind", narrow.KINDS)
def test_one_channel_of_large_weights_costs_the_others_nothing(kind):
    spec = tiny.teacher_spec()
    params = parameters(spec)
    weights = params["blocks"]["0"]["mlp"]["fc1"]
    weights["kernel"][:, 7] *= 1e5
    x = np.random.default_rng(5).normal(size=(64, 48)).astype(np.float32)
    exact = x.astype(np.float64) @ weights["kernel"] + weights["bias"]
    got = network(spec, params, kind).blocks["0"].mlp.fc1(jnp.asarray(x))

    def worst(result):
        """The largest relative error among the output channels."""
        return (np.linalg.norm(result - exact, axis=0) / np.linalg.norm(exact, axis=0)).max()

    assert worst(np.asarray(got)) < {"int8": 0.015, "float8_e4m3fn": 0.06}[kind]
    # Negative control: with one factor for the whole kernel the others are rounded away.
    shared = by_numpy(x, weights["kernel"], weights["bias"], kind, per_channel=False)
    assert worst(shared) > 0.3


def test_a_result_in_bfloat16_is_rounded_once():
    spec = tiny.teacher_spec()
    params = parameters(spec)
    x = np.random.default_rng(6).normal(size=(9, 48)).astype(ml_dtypes.bfloat16)
    layer, wide = (
        network(spec, params, "int8", dtype).blocks["0"].mlp.fc1
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    want = np.asarray(wide(jnp.asarray(x))).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(layer(jnp.asarray(x))), want)


def test_queries_keys_and_values_are_those_of_a_plain_layer_with_the_rounded_numbers():
    """With neighbours that rotate together, the factors are arranged with their channels."""
    spec = evas.spec("EVA-02-CLIP")
    params = parameters(spec)
    params["blocks"]["0"]["attn"]["qkv"]["kernel"] *= np.arange(1, 49, dtype=np.float32)
    x = np.random.default_rng(7).normal(size=(2, 17, 48)).astype(np.float32)
    rounded = {**params["blocks"]["0"]["attn"]["qkv"]}
    columns, factors = nearest(rounded["kernel"], "int8", 0)
    rows, row_factors = nearest(x, "int8", -1)
    plain = nnx.merge(spec.abstract()[0], params)
    plain.blocks["0"].attn.qkv.kernel[...] = jnp.asarray(columns * factors, jnp.float32)
    ours = network(spec, params, "int8")
    rotate = next(ours._visits(jnp.zeros((2, 32, 32, 3)), None, None)).positions[1]
    assert rotate is not None and rotate.pairs == "neighbours"
    got, want = (
        net.blocks["0"].attn.project(jnp.asarray(tokens, jnp.float32), (None,) * 3, rotate)
        for net, tokens in ((ours, x), (plain, rows * row_factors))
    )
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 * np.abs(other).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_linear_layers_of_every_block_are_quantised_and_nothing_else(name):
    spec, layers = NETWORKS[name]
    _, plain = spec.abstract()
    definition, shapes = spec.abstract(matmuls="int8")
    added = trees.paths(shapes) - trees.paths(plain)
    assert {path.rpartition("/")[2] for path in added} == {"kernel_scale"}
    places = {path.rpartition("/")[0] for path in added}
    blocks = sum(spec.arch.get("depths", [spec.arch.get("depth", 0)]))
    assert len(places) == blocks * len(layers)
    assert {path.rpartition("/")[2] for path in places} == set(layers)
    assert not any("rel_pos_bias" in path for path in places)
    held = quantized.rounded(parameters(spec), "int8")
    kinds = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), (held, shapes))
    assert kinds[0] == kinds[1]
    # Each has one place on the mesh, and the matmuls of the program are as many as the layers.
    sharding.param_shardings(shapes, sharding.make_mesh(data=2, fsdp=2, tensor=2))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    text = str(jax.make_jaxpr(lambda p, x: nnx.merge(definition, p)(x).tokens)(shapes, images))
    fused = name in ("swin", "swin_v2") or "qkv" not in layers
    parts = len(layers) if fused else len(layers) + 2  # a ViT's qkv are three matmuls
    assert text.count("preferred_element_type=int32") == blocks * parts


@pytest.mark.parametrize(
    "name,kind",
    [("vit", "int8"), ("vit", "float8_e4m3fn")]
    + [pytest.param(n, "int8", marks=pytest.mark.slow) for n in NETWORKS if n != "vit"],
)
def test_a_map_is_close_to_that_in_float32(name, kind):
    spec, _ = NETWORKS[name]
    params = parameters(spec, scale=0.2)
    images = spec.normalize(tiny.batch(2)["image"])

    def tokens(net):
        definition, state = nnx.split(net)
        return np.asarray(jax.jit(lambda state: nnx.merge(definition, state)(images).tokens)(state))

    want = tokens(nnx.merge(spec.abstract()[0], params))
    apart = np.linalg.norm(tokens(network(spec, params, kind)) - want) / np.linalg.norm(want)
    assert 1e-3 < apart < {"int8": 0.02, "float8_e4m3fn": 0.06}[kind]


@pytest.mark.parametrize(
    "spec,matmuls,message",
    [
        (resnets.spec(), "int8", "for the linear layers of attention and MLPs, and a ResNet has"),
        (tiny.teacher_spec(), "int4", "teacher.matmuls='int4' is unknown; expected one of 'int8'"),
    ],
)
def test_what_a_network_cannot_have_is_refused(spec, matmuls, message):
    with pytest.raises(ConfigError, match=message):
        spec.abstract(matmuls=matmuls)
