"""ConvNeXt V1, V2 and DINOv3's against transformers, and what the class promises."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from fd_jax import inference, model_folder, optimizer
from fd_jax.errors import ConfigError
from fd_jax.models import convnext_blocks, depthwise, sizes
from fd_jax.models.convnext import ConvNeXt
from fd_jax.models.segmenter import network as segmenters
from fd_jax.models.spec import ModelSpec
from tests.models import convnexts

KINDS = tuple(convnexts.KINDS)
# For tests of which each kind takes long; V2 has all that V1 has but a layer scale.
ONE_OF_THEM = ["v2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("v1", "dinov3"))]
TWO_STAGES = {"depths": [1, 2], "widths": [8, 12], "image_size": [30, 37]}


def tokens(made, params, images, **runtime):
    """Not compiled as a whole, which takes longer than everything else here together."""
    return convnexts.bind(made, params, **runtime)(images).tokens


@pytest.mark.parametrize("kind", KINDS)
def test_features_equal_transformers(kind, tmp_path):
    made = convnexts.spec(kind)
    params, images = convnexts.random_params(made), convnexts.pictures(made)
    model = convnexts.hf_model(kind, made, params, tmp_path)
    want = convnexts.hf_tokens(kind, model, images)
    got = jax.jit(lambda p, x: tokens(made, p, x))(params, images)
    assert got.shape == want.shape == (2, 4, 24)
    assert convnexts.relative(got, want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONE_OF_THEM)
def test_features_equal_transformers_in_float64(kind, tmp_path):
    made = convnexts.spec(kind, depths=[1, 11], widths=[8, 12])  # as text, 10 comes before 2
    images = convnexts.pictures(made, dtype=np.float64)
    params = convnexts.random_params(made)
    model = convnexts.hf_model(kind, made, params, tmp_path).double()
    want = convnexts.hf_tokens(kind, model, images)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        got = np.asarray(tokens(made, wide, images, dtype=jnp.float64))
    assert got.dtype == np.float64
    assert convnexts.relative(got, want) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_block_equals_transformers(kind, tmp_path):
    made = convnexts.spec(kind)
    params, images = convnexts.random_params(made), convnexts.pictures(made)
    want = convnexts.hf_blocks(convnexts.hf_model(kind, made, params, tmp_path), images)
    every = range(sum(made.arch["depths"]))
    got = convnexts.bind(made, params).intermediates(images, every)
    grids = [(19, 17), *[(9, 8)] * 2, *[(4, 4)] * 4, (2, 2)]
    assert [features.grid for features in got] == grids
    for features, theirs in zip(got, want, strict=True):
        assert convnexts.relative(features.tokens, theirs) < 1e-5


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_classifiers_equal_transformers(kind, tmp_path):
    made = convnexts.spec(kind, classes=5)
    params, images = convnexts.random_params(made), convnexts.pictures(made)
    head = convnexts.head_params(made)
    model = convnexts.hf_classifier(kind, made, params, head, tmp_path)
    with torch.no_grad():
        want = model(convnexts.torch_images(images)).logits.numpy()
    features = convnexts.bind(made, params)(images)
    assert convnexts.relative(convnexts.classifier(made, head)(features), want) < 1e-5
    for wrong in ("mean", "norm_mean"):
        other = convnexts.spec(kind, classes=5, pooling=wrong)
        parts = head if "norm" in wrong else {"head": head["head"]}
        assert convnexts.relative(convnexts.classifier(other, parts)(features), want) > 1e-3


def test_the_epsilon_of_the_pooled_norm_is_its_own(tmp_path):
    """1e-12 where all other norms have 1e-6, for a mean token that hardly varies over channels."""
    made = convnexts.spec("v1", classes=5)
    params, images = convnexts.random_params(made), convnexts.pictures(made)
    for block in params["stages"]["3"]["blocks"].values():
        block["gamma"] *= 0
    last = params["stages"]["3"]["downsample"]["conv"]
    last["kernel"], last["bias"] = 1e-4 * last["kernel"], 1e-4 * last["bias"]
    head = convnexts.head_params(made)
    model = convnexts.hf_classifier("v1", made, params, head, tmp_path)
    with torch.no_grad():
        want = model(convnexts.torch_images(images)).logits.numpy()
    features = convnexts.bind(made, params)(images)
    assert convnexts.relative(convnexts.classifier(made, head)(features), want) < 1e-5
    other = convnexts.spec("v1", classes=5, final_norm_eps=None)
    assert other.head_norm_eps == 1e-6
    assert convnexts.relative(convnexts.classifier(other, head)(features), want) > 1e-2


def test_dinov3s_class_token_is_the_normalised_mean(tmp_path):
    """The one token of transformers' class that is left out here follows from the map."""
    made = convnexts.spec("dinov3")
    params, images = convnexts.random_params(made), convnexts.pictures(made)
    model = convnexts.hf_model("dinov3", made, params, tmp_path)
    with torch.no_grad():
        want = model(convnexts.torch_images(images)).pooler_output.numpy()
    network = convnexts.bind(made, params)
    mean = jnp.mean(network(images, final_norm=False).tokens, axis=1)
    assert convnexts.relative(network.norm(mean), want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONE_OF_THEM)
def test_loss_and_gradients_equal_torchs(kind, tmp_path):
    """Smooth L1 against random features, through every parameter, in float64."""
    made = convnexts.spec(kind, **TWO_STAGES)
    images = convnexts.pictures(made, dtype=np.float64)
    params = convnexts.random_params(made)
    target = np.random.default_rng(8).normal(size=(2, 3 * 4, 12))
    model = convnexts.hf_model(kind, made, params, tmp_path).double()
    with jax.enable_x64(True):

        def loss(params):
            runtime = {"dtype": jnp.float64, "grad_dtype": jnp.float64}
            out = convnexts.bind(made, params, **runtime)(images).tokens
            return jnp.mean(optax.huber_loss(out, jnp.asarray(target), delta=2.0)) / 2

        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        got, grads = jax.value_and_grad(loss)(wide)
        grads = jax.tree.map(np.asarray, grads)
    state = model(convnexts.torch_images(images)).last_hidden_state
    out = state[:, 1:] if kind == "dinov3" else state.flatten(2).transpose(1, 2)
    want = torch.nn.functional.smooth_l1_loss(out, torch.from_numpy(target), beta=2.0)
    want.backward()
    np.testing.assert_allclose(got, want.item(), rtol=1e-12)
    theirs = {name.removeprefix("model."): p.grad for name, p in model.named_parameters()}
    ours = convnexts.to_hf(kind, grads, made.arch)
    pooled = {"layernorm.weight", "layernorm.bias"} if kind != "dinov3" else set()
    assert ours.keys() == theirs.keys() - pooled
    for name, grad in ours.items():
        want = theirs[name].numpy()
        assert np.abs(grad - want).max() / np.abs(want).max() < 1e-10, name


def without_residual(self, x):
    return ResponseNormed(self, x) - x


ResponseNormed = convnext_blocks.ResponseNorm.__call__


def turned(x, kernel):
    return depthwise._convolve_by_xla(x, kernel[::-1, ::-1])


def from_the_other_side(self, x):
    """Leaves out the first row and column where a side is odd, not the last ones."""
    _, height, width, _ = x.shape
    return Halved(self, x[:, height % 2 :, width % 2 :])


Halved = convnext_blocks.Downsample.__call__

WRONG_ARCH = {
    "norm epsilon": ("v1", {"norm_eps": 1e-5}),
    "tanh GELU": ("v1", {"activation": "gelu_tanh"}),
    "normalised tokens": ("v1", {"final_norm": True}),
    "DINOv3 without its norm": ("dinov3", {"final_norm": False}),
    "DINOv3 with another epsilon": ("dinov3", {"final_norm_eps": 1e-3}),
}
WRONG_CODE = {
    "response norm without its residual": (
        "v2",
        (convnext_blocks.ResponseNorm, "__call__", without_residual),
    ),
    "mean response without an epsilon": ("v2", (convnext_blocks, "RESPONSE_EPS", 1e-2)),
    "turned kernels": ("v1", (depthwise, "_convolve_by_shifts", turned)),
    "halving from the other side": (
        "v1",
        (convnext_blocks.Downsample, "__call__", from_the_other_side),
    ),
}


@pytest.mark.parametrize("name", WRONG_ARCH)
def test_a_wrong_architecture_is_seen(name, tmp_path):
    kind, arch = WRONG_ARCH[name]
    made = convnexts.spec(kind)
    params, images = convnexts.random_params(made), convnexts.pictures(made)
    want = convnexts.hf_tokens(kind, convnexts.hf_model(kind, made, params, tmp_path), images)
    other = convnexts.spec(kind, **arch)
    rest = {path: value for path, value in params.items() if path != "norm"}
    norm = params.get("norm", {"scale": np.ones(24), "bias": np.zeros(24)})
    assert (
        convnexts.relative(
            tokens(other, {**rest, "norm": norm} if other.arch["final_norm"] else rest, images),
            want,
        )
        > 1e-4
    )


@pytest.mark.parametrize("name", WRONG_CODE)
def test_wrong_arithmetic_is_seen(name, monkeypatch, tmp_path):
    kind, patch = WRONG_CODE[name]
    made = convnexts.spec(kind)
    params, images = convnexts.random_params(made), convnexts.pictures(made)
    want = convnexts.hf_tokens(kind, convnexts.hf_model(kind, made, params, tmp_path), images)
    monkeypatch.setattr(*patch)
    assert convnexts.relative(tokens(made, params, images), want) > 1e-4


@pytest.mark.parametrize("size", [7, 3])
def test_both_forms_of_the_depthwise_convolution_are_torchs(size):
    """What CPUs run and what other devices do: result, and gradients of input and kernel."""
    rng = np.random.default_rng(0)
    x, g = (rng.normal(size=(2, 5, 6, 4)) for _ in range(2))
    kernel = rng.normal(size=(size, size, 1, 4))
    image = convnexts.torch_images(x).requires_grad_()
    weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()).requires_grad_()
    out = torch.nn.functional.conv2d(image, weight, padding=size // 2, groups=4)
    out.backward(convnexts.torch_images(g))
    want = np.moveaxis(out.detach().numpy(), 1, -1)
    want_dx = np.moveaxis(image.grad.numpy(), 1, -1)
    want_dk = weight.grad.numpy().transpose(2, 3, 1, 0)
    with jax.enable_x64(True):
        forms = (depthwise._convolve_by_shifts, depthwise._convolve_by_xla)
        for convolved in forms:
            np.testing.assert_allclose(convolved(x, kernel), want, rtol=1e-12, atol=1e-12)
        arguments = {"size": (size, size), "grad_dtype": jnp.float64}
        for gradient in (
            depthwise._kernel_gradient_by_shifts,
            depthwise._kernel_gradient_by_xla,
        ):
            np.testing.assert_allclose(gradient(x, g, **arguments), want_dk, rtol=1e-12, atol=1e-12)
        dx, dk = jax.vjp(
            lambda x, k: depthwise.convolve(x, k, jnp.float64, jnp.float64), x, kernel
        )[1](g)
        np.testing.assert_allclose(dx, want_dx, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(dk, want_dk, rtol=1e-12, atol=1e-12)


def test_the_kernels_gradient_is_summed_in_the_dtype_asked_for():
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(8, 16, 16, 4)), jnp.bfloat16) for _ in range(2))
    kernel = jnp.zeros((7, 7, 1, 4))

    def gradient(x, g, dtype, grad_dtype):
        run = jax.vjp(lambda k: depthwise.convolve(x, k, dtype, grad_dtype), kernel)[1]
        return np.asarray(run(g)[0])

    want = gradient(x.astype(jnp.float32), g.astype(jnp.float32), jnp.float32, jnp.float32)
    wide = gradient(x, g, jnp.bfloat16, jnp.float32)
    assert wide.dtype == np.float32
    assert convnexts.relative(wide, want) < 1e-6
    assert convnexts.relative(gradient(x, g, jnp.bfloat16, jnp.bfloat16), want) > 1e-4


def test_a_silent_channel_has_torchs_gradient():
    """The norm of a channel that is zero everywhere has no slope; torch takes zero for it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 4)).astype(np.float32)
    x[0, :, 1] = 0
    scale, bias = (rng.normal(size=4).astype(np.float32) for _ in range(2))
    made = convnext_blocks.ResponseNorm(4)
    definition = nnx.split(made)[0]
    norm = nnx.merge(definition, {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)})
    got = jax.grad(lambda x: jnp.sum(jnp.sin(norm(x))))(jnp.asarray(x))
    theirs = torch.from_numpy(x).requires_grad_()
    lengths = torch.linalg.vector_norm(theirs, dim=1, keepdim=True)
    shares = lengths / (lengths.mean(dim=-1, keepdim=True) + 1e-6)
    y = torch.from_numpy(scale) * (theirs * shares) + torch.from_numpy(bias) + theirs
    torch.sin(y).sum().backward()
    assert np.isfinite(got).all()
    assert convnexts.relative(got, theirs.grad.numpy()) < 1e-5


def test_feature_map_has_patches_only():
    made = convnexts.spec("dinov3")
    params, images = convnexts.random_params(made), convnexts.pictures(made)
    network = convnexts.bind(made, params)
    features = network(images)
    assert (features.cls, features.registers, features.grid) == (0, 0, (2, 2))
    assert (network.width, network.grid, network.depth) == (24, (2, 2), 8)
    np.testing.assert_array_equal(features.full, features.tokens)
    embedded = network.embed(images)
    assert embedded.shape == (2, 19 * 17, 8)


def test_a_segmenter_reads_the_map_of_each_stage():
    where = segmenters.levels(nnx.merge(*convnexts.spec("v2").abstract()))
    assert where == ((0, 2, 6, 7), (8, 12, 20, 24), "stage_norms")
    with pytest.raises(ConfigError, match="a network of 2 stages has no four levels"):
        segmenters.levels(nnx.merge(*convnexts.spec("v2", **TWO_STAGES).abstract()))


def test_pixels_of_a_token_whatever_is_left_over():
    made = convnexts.spec("v1")
    grids = nnx.merge(*made.abstract()).grids
    assert [sizes.token_side([77, 70], 4, grid) for grid in grids] == [4, 8, 16, 32]
    assert made.stride == 32


def test_tokens_that_are_sent_to_a_run_go_on():
    made = convnexts.spec("v1")
    params, images = convnexts.random_params(made), convnexts.pictures(made)
    network = convnexts.bind(made, params)
    visits = network._visits(images, None, None)
    first = next(visits)
    second = visits.send(0 * first.after)
    np.testing.assert_array_equal(second.before[0, 0], second.before[1, 5])
    assert convnexts.relative(second.after, network.intermediates(images, [1])[0].tokens) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_first_stages_are_an_earlier_map(kind):
    """A final norm starts anew, as that of a Swin does."""
    four = convnexts.spec(kind)
    params, images = convnexts.random_params(four), convnexts.pictures(four)
    two = ModelSpec("convnext", ConvNeXt.first_stages(four.arch, 2))
    kept = ConvNeXt.first_stages_params(params, four.arch, 2)
    assert model_folder.flat_shapes(kept) == model_folder.flat_shapes(two.abstract()[1])
    network = convnexts.bind(two, kept)
    want = convnexts.bind(four, params).intermediates(images, [2])[0]
    got = network(images, final_norm=False)
    np.testing.assert_allclose(got.tokens, want.tokens, rtol=1e-6, atol=1e-6)
    assert got.grid == want.grid == (9, 8)
    if kind == "dinov3":
        np.testing.assert_array_equal(kept["norm"]["scale"], np.ones(12))
    assert ConvNeXt.first_stages_params(params, four.arch, 4) is params


def test_another_size_changes_no_parameter(tmp_path):
    made = convnexts.spec("v2", depths=[1], widths=[8], image_size=20)
    params = convnexts.random_params(made)
    larger, same = made.resized(params, [26, 35])
    assert same is params
    assert larger.arch["image_size"] == [26, 35]
    images = convnexts.pictures(larger)
    model = convnexts.hf_model("v2", made, params, tmp_path)
    want = convnexts.hf_tokens("v2", model, images)
    got = convnexts.bind(larger, params)(images)
    assert got.grid == (6, 8)
    assert convnexts.relative(got.tokens, want) < 1e-5


def test_parameter_counts():
    """torchvision's 28,589,128 (Tiny) and 88,591,464 (Base) without head and pooled norm."""

    def count(widths, depths):
        spec = convnexts.spec("v1", widths=widths, depths=depths, image_size=224)
        return sum(leaf.size for leaf in jax.tree.leaves(spec.abstract()[1]))

    tiny = count([96, 192, 384, 768], [3, 3, 9, 3])
    assert tiny == 28_589_128 - (768 * 1000 + 1000) - 2 * 768
    base = count([128, 256, 512, 1024], [3, 3, 27, 3])
    assert base == 88_591_464 - (1024 * 1000 + 1000) - 2 * 1024


def test_initialisation():
    """0.02 for every kernel, zeros for biases and the response norm, the layer scale as given."""
    made = convnexts.spec("v2", widths=[64], depths=[1], layer_scale=1e-3)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(made.build(rngs=nnx.Rngs(0)))[1]))
    for path, leaf in optimizer_paths(params):
        if path.endswith("kernel"):
            assert leaf.std() == pytest.approx(0.02, rel=0.1), path
        elif path.endswith("gamma"):
            np.testing.assert_array_equal(leaf, np.float32(1e-3))
        else:
            expected = 1 if path.endswith("scale") and "grn" not in path else 0
            np.testing.assert_array_equal(leaf, expected, err_msg=path)


def optimizer_paths(tree):
    return [(optimizer.path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


def test_drop_path_rates_grow_over_all_stages():
    network = nnx.eval_shape(lambda: convnexts.spec("v1").build(rngs=nnx.Rngs(0), drop_path=0.7))
    rates = [
        block.drop_path
        for _, stage in sorted(network.stages.items())
        for _, block in sorted(stage.blocks.items())
    ]
    np.testing.assert_allclose(rates, 0.7 * np.arange(8) / 7)


@pytest.mark.slow
def test_branches_drop_by_example():
    made = convnexts.spec("v1")
    params, images = convnexts.random_params(made), convnexts.pictures(made)
    bound = convnexts.bind(made, params, drop_path=0.5)

    def run(drops):
        return bound(images, drops=drops).tokens

    kept = np.asarray(run(jnp.full((2, 8, 2), 0.99)))
    drops = np.full((2, 8, 2), 0.99, np.float32)
    drops[:, :, 1] = 0.1  # the second number of a block decides nothing: there is one branch
    np.testing.assert_array_equal(run(jnp.asarray(drops)), kept)
    drops[1, 7, 0] = 0.1  # example 1 loses the last block
    out = np.asarray(run(jnp.asarray(drops)))
    np.testing.assert_array_equal(out[0], kept[0])
    before = bound.intermediates(images, [6], drops=jnp.asarray(drops))[0].tokens
    halved = bound.stages["3"].downsample(before.reshape(2, 4, 4, -1)).reshape(2, 4, -1)
    np.testing.assert_allclose(out[1], halved[1], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_recomputing_changes_nothing():
    made = convnexts.spec("v2", **TWO_STAGES)
    params, images = convnexts.random_params(made), convnexts.pictures(made)

    def grads(**runtime):
        def loss(params):
            out = convnexts.bind(made, params, **runtime)(images).tokens
            return jnp.mean(out * jnp.sin(jnp.arange(out.size)).reshape(out.shape))

        return jax.jit(jax.grad(loss))(params)

    want = grads()
    for remat in ("dots", "full"):
        got = grads(remat=remat)
        for ours, leaf in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(ours, leaf, rtol=0, atol=2e-5 * np.abs(leaf).max())


@pytest.mark.slow
def test_bfloat16_stays_near():
    made = convnexts.spec("v2", **TWO_STAGES)
    params, images = convnexts.random_params(made), convnexts.pictures(made)
    got = tokens(made, params, images, dtype=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    want = tokens(made, params, images)
    assert jnp.sqrt(jnp.mean(jnp.square(got - want)) / jnp.mean(jnp.square(want))) < 0.1


@pytest.mark.parametrize(
    "arch,message",
    [
        ({"widths": [8, 16]}, r"widths=\[8, 16\] has 2 stages, depths=\[1, 2, 4, 1\] has 4"),
        ({"kernel_size": 6}, "kernel_size=6: expected an odd whole number"),
        ({"image_size": [31, 64]}, "image_size 31 x 64 is less than 32, patch_size 4 x 8"),
        ({"patch_size": 0}, "patch_size"),
        ({"activation": "tanh"}, "activation='tanh' is unknown"),
    ],
)
def test_impossible_networks_are_refused(arch, message):
    with pytest.raises(ConfigError, match=message):
        convnexts.spec("v1", **arch).abstract()


def test_what_there_is_not():
    made = convnexts.spec("v1")
    network = convnexts.bind(made, convnexts.random_params(made))
    images = convnexts.pictures(made)
    with pytest.raises(ValueError, match=r"\(64, 64\) pixels; this model .* \(77, 70\)"):
        network(np.zeros((1, 64, 64, 3), np.float32))
    with pytest.raises(ConfigError, match="a ConvNeXt sees all patches"):
        network(images, keep=np.zeros((2, 3), np.int32))
    with pytest.raises(ConfigError, match="no attention.*its features instead"):
        network.attention_maps(images, [0])
    with pytest.raises(ConfigError, match="no attention"):
        network.measure_attention(images, lambda number, attention: attention.weights())
    with pytest.raises(ValueError, match="blocks \\[8\\]"):
        network.intermediates(images, [8])
    assert made.choose_attention("auto", dtype=jnp.float32) == "none"
    assert made.choose_attention("cudnn", dtype=jnp.float32) == "none"


# Layers of ConvNeXt-B, depths 3/3/27/3, as its optim_factory.py numbers them
# (docs/reference.md#layer-decay): the halving before a stage goes with the stage's first group.
HALVING = {1: 2, 2: 3, 3: 12}
GROUPS = {0: [1] * 3, 1: [2] * 3, 2: [3 + block // 3 for block in range(27)], 3: [12] * 3}


@pytest.mark.parametrize("kind", KINDS)
def test_layer_and_decay_of_every_parameter(kind):
    made = convnexts.spec(kind, depths=[3, 3, 27, 3], widths=[8, 8, 8, 8])
    tree = made.abstract()[1]
    mask = optimizer.decay_mask(tree, ConvNeXt.NO_DECAY)
    decayed = {optimizer.path_name(path) for path, on in jax.tree.leaves_with_path(mask) if on}
    for path, shape in model_folder.flat_shapes(tree).items():
        first, *rest = path.split("/")
        if first == "stages":
            stage = int(rest[0])
            layer = HALVING[stage] if rest[1] == "downsample" else GROUPS[stage][int(rest[2])]
        else:
            layer = 13 if first == "norm" else 0
        assert ConvNeXt.layer_id(path, made.arch) == layer, path
        assert (path in decayed) == (len(shape) > 1), path
    assert ConvNeXt.layer_id("head/kernel", made.arch) == 13


def test_model_folder(tmp_path):
    made = convnexts.spec("v1", **TWO_STAGES)
    params = convnexts.random_params(made)
    model_folder.save(tmp_path / "m", made, {"encoder": params})
    model = inference.load_model(tmp_path / "m")
    assert model.spec == made
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 100, 120, 3), dtype=np.uint8)
    images = model.preprocess(list(pictures), resize=True)
    assert images.shape == (2, 30, 37, 3)
    np.testing.assert_allclose(model(images).tokens, tokens(made, params, images), atol=1e-6)
    assert "convnext" in repr(model) and "3 x 4 patches of width 12" in repr(model)
    with pytest.raises(ConfigError, match="a ConvNeXt has no attention"):
        model.attention_maps(images)
    square = inference.load_model(tmp_path / "m", image_size=96)
    assert square.spec.arch["image_size"] == 96
