"""ResNets against transformers and plain PyTorch, and what the class promises."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from fd_jax import inference, model_folder, optimizer
from fd_jax.errors import ConfigError
from fd_jax.models import convolution
from fd_jax.models.resnet import ResNet
from fd_jax.models.spec import ModelSpec
from tests.models import resnets


def one(kind, kinds):
    """The kinds, of which only one runs by default: each takes seconds."""
    return [pytest.param(k, marks=() if k == kind else pytest.mark.slow) for k in kinds]


TWO_STAGES = {"depths": [1, 2], "image_size": [30, 37]}


def tokens(made, params, images, **runtime):
    """Not compiled as a whole, which takes longer than everything else here together."""
    return resnets.bind(made, params, **runtime)(images).tokens


@pytest.mark.parametrize("kind", one("v1.5", resnets.OF_TRANSFORMERS))
def test_features_equal_transformers(kind, tmp_path):
    made = resnets.spec(kind)
    params, images = resnets.random_params(made), resnets.pictures(made)
    want = resnets.hf_tokens(resnets.hf_model(made, params, tmp_path), images)
    got = tokens(made, params, images)
    assert got.shape == want.shape == (2, 9, 40)
    assert resnets.relative(got, want) < 1e-5


@pytest.mark.parametrize("kind", one("basic", resnets.KINDS))
def test_features_equal_plain_pytorch_in_float64(kind):
    made = resnets.spec(kind)
    images = resnets.pictures(made, dtype=np.float64)
    params = resnets.random_params(made)
    want = resnets.in_torch(made, params, images, dtype=torch.float64)[0].detach().numpy()
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        got = np.asarray(tokens(made, wide, images, dtype=jnp.float64))
    assert got.dtype == np.float64
    assert resnets.relative(got, want) < 1e-12


# What no tensor tells, and a wrong value of it.
WRONG = {
    "v1": ({"stride_at": "second"}, {"norm_eps": 1e-6}),
    "D": ({"stride_at": "first"}, {"shortcut": "strided"}, {"activation": "relu"}),
}


@pytest.mark.parametrize("kind", one("D", WRONG))
def test_the_comparison_sees_what_no_tensor_tells(kind):
    made = resnets.spec(kind, **TWO_STAGES)
    params, images = resnets.random_params(made), resnets.pictures(made)
    want = resnets.in_torch(made, params, images)[0].detach().numpy()
    assert resnets.relative(tokens(made, params, images), want) < 1e-5
    for wrong in WRONG[kind]:
        other = resnets.spec(kind, **TWO_STAGES, **wrong)
        assert resnets.relative(tokens(other, params, images), want) > 1e-3, wrong


@pytest.mark.parametrize("kind", one("D", resnets.KINDS))
def test_training_equals_plain_pytorch(kind):
    """Features, running statistics after the pass, and the gradient of every parameter, float64."""
    made = resnets.spec(kind, **TWO_STAGES)
    images = resnets.pictures(made, 3, dtype=np.float64)
    with jax.enable_x64(True):
        params = resnets.random_params(made, dtype=np.float64)
        wide = {"dtype": jnp.dtype("float64"), "grad_dtype": jnp.dtype("float64")}
        cotangent = np.sin(np.arange(3 * 4 * 5 * 24)).reshape(3, 20, 24)

        def loss(params):
            features, running = resnets.bind(made, params, **wide).measured(images)
            return jnp.sum(features.tokens * cotangent), (features.tokens, running)

        grads, (got, running) = jax.jit(jax.grad(loss, has_aux=True))(params)
    want, tensors, run = resnets.in_torch(made, params, images, training=True, dtype=torch.float64)
    (want * torch.from_numpy(cotangent)).sum().backward()
    assert resnets.relative(got, want.detach().numpy()) < 1e-12
    running = resnets.flat(running)
    assert running.keys() == run.running.keys()
    for name, value in running.items():
        np.testing.assert_allclose(value, run.running[name].numpy(), rtol=1e-12, err_msg=name)
    largest = max(t.grad.abs().max() for t in tensors.values() if t.grad is not None)
    for name, ours in resnets.flat(grads).items():
        theirs = tensors[name].grad
        want = np.zeros_like(ours) if theirs is None else theirs.numpy()
        np.testing.assert_allclose(ours, want, rtol=1e-9, atol=1e-11 * largest, err_msg=name)


def test_a_pass_in_evaluation_neither_reads_nor_changes_statistics_of_the_batch():
    made = resnets.spec(**TWO_STAGES)
    params, images = resnets.random_params(made), resnets.pictures(made)
    network = resnets.bind(made, params)
    alone = network(images[:1]).tokens
    np.testing.assert_allclose(network(images).tokens[:1], alone, rtol=1e-5, atol=1e-5)
    trained = network.measured(images)[0].tokens
    assert resnets.relative(trained[:1], network.measured(images[:1])[0].tokens) > 1e-2
    assert resnets.relative(trained[:1], alone) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputing_changes_neither_gradients_nor_statistics(remat):
    made = resnets.spec(**TWO_STAGES)
    params, images = resnets.random_params(made), resnets.pictures(made)

    def run(**runtime):
        def loss(params):
            features, running = resnets.bind(made, params, **runtime).measured(images)
            out = features.tokens
            return jnp.mean(out * jnp.sin(jnp.arange(out.size)).reshape(out.shape)), running

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    for ours, leaf in zip(jax.tree.leaves(run(remat=remat)), jax.tree.leaves(run()), strict=True):
        np.testing.assert_allclose(ours, leaf, rtol=1e-4, atol=2e-5 * np.abs(leaf).max())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [1, 3, 7])
def test_convolutions_equal_pytorch(stride, side):
    """Sides that the stride divides and that it does not; the gradient of the kernel both ways."""
    rng = np.random.default_rng(side)
    x, kernel = rng.normal(size=(2, 8, 11, 3)), rng.normal(size=(side, side, 3, 5))
    pixels = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    weight = torch.tensor(kernel.transpose(3, 2, 0, 1), requires_grad=True)
    want = torch.nn.functional.conv2d(pixels, weight, stride=stride, padding=side // 2)
    g = rng.normal(size=tuple(want.shape)).transpose(0, 2, 3, 1)
    want.backward(torch.from_numpy(g.transpose(0, 3, 1, 2).copy()))
    with jax.enable_x64(True):
        wide = jnp.dtype("float64")
        got, back = jax.vjp(lambda a, b: convolution.convolve(a, b, wide, wide, stride), x, kernel)
        dx, dk = back(jnp.asarray(g))
        options = {"size": (side, side), "grad_dtype": wide, "stride": stride}
        other = convolution._kernel_gradient(x, g, **options)
    close = {"rtol": 1e-10, "atol": 1e-10}
    np.testing.assert_allclose(got.transpose(0, 3, 1, 2), want.detach(), **close)
    np.testing.assert_allclose(dx.transpose(0, 3, 1, 2), pixels.grad, **close)
    for each in (dk, other):
        np.testing.assert_allclose(each.transpose(3, 2, 0, 1), weight.grad, **close)


def test_maps_of_blocks_and_of_first_stages():
    four = resnets.spec()
    params, images = resnets.random_params(four), resnets.pictures(four)
    found = resnets.bind(four, params).intermediates(images, range(5))
    assert [each.grid for each in found] == [(20, 18), *[(10, 9)] * 2, (5, 5), (3, 3)]
    assert [each.tokens.shape[-1] for each in found] == [16, 24, 24, 32, 40]
    two = ModelSpec("resnet", ResNet.first_stages(four.arch, 2))
    kept = ResNet.first_stages_params(params, four.arch, 2)
    assert model_folder.flat_shapes(kept) == model_folder.flat_shapes(two.abstract()[1])
    got = resnets.bind(two, kept)(images)
    assert got.grid == (10, 9)
    np.testing.assert_allclose(got.tokens, found[2].tokens, rtol=1e-6, atol=1e-6)


def test_parameter_counts():
    """torchvision's figures without the classifier, and the statistics beside them."""
    shapes = {
        "basic": ([64], [64, 128, 256, 512], [64, 128, 256, 512], [2, 2, 2, 2], 11_689_512, 512),
        "v1.5": ([64], [256, 512, 1024, 2048], [64, 128, 256, 512], [3, 4, 6, 3], 25_557_032, 2048),
    }
    for kind, (stem, widths, inner, depths, published, width) in shapes.items():
        made = resnets.spec(
            kind, stem_widths=stem, widths=widths, inner_widths=inner, depths=depths
        )
        leaves = resnets.flat(made.abstract()[1])
        trained = sum(x.size for name, x in leaves.items() if not ResNet.is_statistic(name))
        assert trained == published - (width * 1000 + 1000)
        statistics = sum(x.size for name, x in leaves.items() if ResNet.is_statistic(name))
        assert statistics == sum(x.size for x in leaves.values() if len(x.shape) == 1) / 2


def test_initialisation():
    """Kaiming's normal distribution by outputs; the last norm of a branch starts at zero."""
    made = resnets.spec(widths=[64], inner_widths=[32], depths=[1])
    params = nnx.to_pure_dict(nnx.split(made.build(rngs=nnx.Rngs(0)))[1])
    for name, leaf in resnets.flat(params).items():
        leaf = np.asarray(leaf)
        if name.endswith("kernel"):
            height, width, _, out = leaf.shape
            assert leaf.std() == pytest.approx(np.sqrt(2 / (height * width * out)), rel=0.1), name
        else:
            last = name == "stages/0/blocks/0/branch/2/norm/scale"
            expected = float(name.endswith(("scale", "var")) and not last)
            np.testing.assert_array_equal(leaf, expected, err_msg=name)


def test_branches_drop_by_example():
    made = resnets.spec(**TWO_STAGES)
    params, images = resnets.random_params(made), resnets.pictures(made)
    bound = resnets.bind(made, params, drop_path=0.5)
    rates = [bound.stages[s].blocks[b].drop_path for s, b in (("0", "0"), ("1", "0"), ("1", "1"))]
    assert rates == [0, 0.25, 0.5]
    drops = np.full((2, 3, 2), 0.99, np.float32)
    kept = np.asarray(bound(images, drops=jnp.asarray(drops)).tokens)
    drops[:, :, 1] = 0.1  # the second number of a block decides nothing: there is one branch
    np.testing.assert_array_equal(bound(images, drops=jnp.asarray(drops)).tokens, kept)
    drops[1, 2, 0] = 0.1  # example 1 loses the branch of the last block
    out = np.asarray(bound(images, drops=jnp.asarray(drops)).tokens)
    np.testing.assert_array_equal(out[0], kept[0])
    before = bound.intermediates(images, [1], drops=jnp.asarray(drops))[0].tokens
    np.testing.assert_allclose(out[1], before[1], rtol=1e-6)  # which ReLU does not change


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ({"widths": [8, 16]}, r"widths=\[8, 16\], inner_widths=.* one of each for every stage"),
        ({"patch_size": 2}, "patch_size=2: the stem of a ResNet makes a token of 4 x 4 pixels"),
        ({"stem_widths": [8, 8]}, r"stem_widths=\[8, 8\]: expected the channels of one"),
        ({"image_size": [31, 64]}, "image_size 31 x 64 is less than 32"),
        ({"activation": "tanh"}, "activation='tanh' is unknown"),
        ({"stride_at": "third"}, "stride_at='third' is unknown"),
        ({"shortcut": "none"}, "shortcut='none' is unknown"),
        ({"bottleneck": False}, "stride_at='second': blocks without a bottleneck"),
    ],
)
def test_impossible_networks_are_refused(arch, message):
    made = resnets.spec()
    with pytest.raises(ConfigError, match=message):
        ModelSpec("resnet", {**made.arch, **arch}).abstract()


def test_what_there_is_not():
    made = resnets.spec()
    network = resnets.bind(made, resnets.random_params(made))
    images = resnets.pictures(made)
    for run in (network, network.measured):
        with pytest.raises(ConfigError, match="a ResNet sees all patches"):
            run(images, keep=np.zeros((2, 3), np.int32))
    with pytest.raises(ConfigError, match="a ResNet has no attention.*its features instead"):
        network.attention_maps(images, [0])
    small = resnets.spec(image_size=32)
    bound = resnets.bind(small, resnets.random_params(small))
    with pytest.raises(ConfigError, match="BatchNorm got a single value per channel"):
        jax.eval_shape(bound.measured, resnets.pictures(small, 1))
    assert made.choose_attention("auto", dtype=jnp.float32) == "none"
    assert not made.has_attention and made.stride == 32


def test_layer_and_decay_of_every_parameter():
    """One layer for each block, the stem before them; statistics never decay."""
    made = resnets.spec("D", depths=[1, 2, 1, 1])
    tree = made.abstract()[1]
    first = {0: 1, 1: 2, 2: 4, 3: 5}  # layer of the first block of each stage
    for vectors in (False, True):
        mask = resnets.flat(optimizer.decay_mask(tree, ResNet.NO_DECAY, vectors=vectors))
        for path, leaf in resnets.flat(tree).items():
            decays = len(leaf.shape) > 1 or vectors and not ResNet.is_statistic(path)
            assert mask[path] == decays, path
    for path in resnets.flat(tree):
        parts = path.split("/")
        layer = first[int(parts[1])] + int(parts[3]) if parts[0] == "stages" else 0
        assert ResNet.layer_id(path, made.arch) == layer, path
        assert ResNet.block_of(path, made.arch) == layer - 1, path
    assert ResNet.layer_id("head/kernel", made.arch) == 6


def test_model_folder(tmp_path):
    folder = resnets.save(tmp_path / "m", classes=5, **TWO_STAGES)
    model = inference.load_model(folder)
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 256, (2, 100, 120, 3), dtype=np.uint8))
    images = model.preprocess(pictures, resize=True)
    got = model(images)
    want = tokens(model.spec, model.params["encoder"], images)
    np.testing.assert_allclose(got.tokens, want, rtol=1e-5, atol=1e-5)
    assert "resnet" in repr(model) and "4 x 5 patches of width 24" in repr(model)
    mean = np.asarray(got.patches).mean(axis=1)
    head = model.params["head"]
    logits = mean @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(model.logits(images), logits, rtol=1e-4, atol=1e-4)
    square = inference.load_model(folder, image_size=96)
    assert square.spec.arch["image_size"] == 96
