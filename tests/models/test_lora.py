"""Low-rank updates against plain numpy, in every family, and the names by which they are placed."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fd_jax import sharding
from fd_jax.errors import ConfigError
from fd_jax.models import lora, trees
from fd_jax.models.keys import param_keys
from fd_jax.models.lora import Lora
from fd_jax.models.spec import split
from tests import tiny
from tests.cost.test_flops import convnext
from tests.models import evas

MLP = ("fc1", "fc2")
ALL = ("qkv", "proj", *MLP)
# Networks whose attention and MLPs differ in how they multiply by their kernels.
NETWORKS = {
    "vit": (tiny.teacher_spec(), ALL),
    "rotations of neighbours and a gate": (evas.spec("EVA-02-S"), (*ALL, "gate")),
    "swin": (tiny.swin_spec(1), ALL),
    "swin_v2": (tiny.swin_spec(2), ALL),
    "convnext": (convnext(), MLP),
}
ALPHA, RANK = 6.0, 3


def made(spec, updates, trains=lambda path: True):
    """Definition and random parameters of a network with updates."""

    def build():
        network = spec.build(rngs=param_keys(0))
        return lora.add(network, updates, rngs=param_keys(1), trains=trains)

    definition, shapes = split(nnx.eval_shape(build))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    return definition, tiny.randomize(zeros, 3, scale=0.2)


def by_numpy(params):
    """W + alpha / r * A B in float64, for every layer that has an update."""
    rest = {k: by_numpy(v) if isinstance(v, dict) else v for k, v in params.items() if k != "lora"}
    if "lora" in params:
        a, b = (np.asarray(params["lora"][name], np.float64) for name in "ab")
        update = np.einsum("dr,r...->d...", a, b)
        rest["kernel"] = (params["kernel"] + ALPHA / RANK * update).astype(np.float32)
    return rest


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "swin" else n for n in NETWORKS]
)
def test_a_network_with_updates_computes_what_the_merged_one_does(name):
    spec, targets = NETWORKS[name]
    updates = Lora(RANK, ALPHA, targets)
    definition, params = made(spec, updates)
    plain, shapes = spec.abstract()
    merged = by_numpy(params)
    assert trees.paths(merged) == trees.paths(shapes)
    ours = lora.merged(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, merged)
    images = spec.normalize(tiny.batch(2)["image"])

    def running(definition):
        return jax.jit(lambda params: nnx.merge(definition, params)(images).tokens)

    run = running(plain)
    got, want = np.asarray(running(definition)(params)), np.asarray(run(merged))
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, atol=2e-5 * scale)
    # Negative control: without the updates, and with the inverse of their scale, it is another.
    for wrong in (
        trees.chosen(params, lambda path: "/lora/" not in path),
        lora.merged(params, Lora(RANK, RANK * RANK / ALPHA, targets)),
    ):
        assert np.abs(run(wrong) - want).max() > 1e-3 * scale


def test_updates_begin_as_nothing():
    spec, targets = NETWORKS["vit"]
    network = spec.build(rngs=param_keys(0))
    layer = network.blocks["1"].mlp.fc2
    rows = np.random.default_rng(0).normal(size=(4, 96)).astype(np.float32)
    before = layer(rows)
    lora.add(network, Lora(RANK, ALPHA, targets), rngs=param_keys(1), trains=lambda _: True)
    np.testing.assert_array_equal(layer(rows), before)
    a = np.asarray(network.blocks["1"].mlp.fc2.lora.a[...])
    bound = 1 / np.sqrt(96)
    assert a.shape == (96, RANK) and 0.9 * bound < np.abs(a).max() <= bound
    assert abs(a.mean()) < 0.2 * bound
    others = [network.blocks[i].mlp.fc2.lora.a[...] for i in "01"]
    assert np.abs(others[0] - others[1]).max() > 0.1 * bound


def test_updates_are_given_to_the_named_layers_alone():
    spec, _ = NETWORKS["swin_v2"]
    _, params = made(spec, Lora(2, 1.0, MLP), trains=lambda path: not path.startswith("stages/0"))
    found = {path.partition("/lora/")[0] for path in trees.paths(params) if "/lora/" in path}
    # The networks of the position bias have layers of the same names.
    assert found == {f"stages/{s}/blocks/0/mlp/{name}" for s in "12" for name in MLP}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_update_has_one_place_on_the_mesh(name):
    spec, targets = NETWORKS[name]
    _, params = made(spec, Lora(2, 1.0, targets))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shardings = sharding.param_shardings(params, mesh)
    flat = {
        sharding_path: leaf.spec
        for sharding_path, leaf in (
            (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)
        )
        if "/lora/" in sharding_path
    }
    assert flat and all("fsdp" in place or "tensor" in place for place in flat.values())


@pytest.mark.parametrize(
    "updates,message",
    [
        (Lora(2, 1.0, ("fc1", "gate")), r"no layer gate in its blocks; it has qkv, proj, fc1, fc2"),
        (Lora(48, 1.0, ("proj",)), r"lora.rank=48, but blocks/0/attn/proj is a matrix 48 x 48"),
    ],
)
def test_updates_that_the_network_cannot_have_are_refused(updates, message):
    with pytest.raises(ConfigError, match=message):
        made(tiny.teacher_spec(), updates)


def test_an_update_keeps_the_dtypes_of_its_layer():
    """In bfloat16 its gradients are summed in float32, as those of kernels are."""
    network = tiny.teacher_spec().build(rngs=param_keys(0), dtype=jnp.bfloat16)
    lora.add(network, Lora(2, 1.0, MLP), rngs=param_keys(1), trains=lambda _: True)
    layer = network.blocks["0"].mlp.fc1
    rows = jnp.ones((4, 48), jnp.bfloat16)
    assert layer(rows).dtype == jnp.bfloat16
    definition, params = split(layer)

    def loss(params):
        return jnp.sum(nnx.merge(definition, params)(rows).astype(jnp.float32))

    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert jax.grad(loss)(params)["lora"]["b"].dtype == jnp.float32
    assert "preferred_element_type=float32" in text
