"""Necks, decoders and whole segmenters against transformers' modules with the same weights."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional
import transformers
from transformers.models.beit import modeling_beit
from transformers.models.upernet import modeling_upernet

from fd_jax import sharding
from fd_jax.errors import ConfigError
from fd_jax.models import batch_norm, convolution
from fd_jax.models import segmenter as segmenters
from fd_jax.models import spec as specs
from fd_jax.models.features import FeatureMap
from fd_jax.models.keys import param_keys
from fd_jax.models.segmenter import decoders, necks, resampling
from tests.models import swins, vits
from tests.models.arrays import rand

WIDTH, CLASSES, AUXILIARY = 16, 5, 12
BATCH, GRID = 3, (4, 6)
STAGE_WIDTHS = (8, 16, 24, 32)
BEIT = transformers.BeitConfig(
    hidden_size=WIDTH,
    num_attention_heads=2,
    num_labels=CLASSES,
    auxiliary_channels=AUXILIARY,
    out_indices=[3, 5, 7, 11],
)
UPERNET = transformers.UperNetConfig(
    backbone_config=transformers.SwinConfig(),
    hidden_size=WIDTH,
    num_labels=CLASSES,
    auxiliary_channels=AUXILIARY,
    auxiliary_in_channels=STAGE_WIDTHS[2],
)


def relative(got, want):
    want = np.asarray(want)
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


def worst(got, want):
    """The largest relative error over the leaves of two trees of one structure."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    return max(map(relative, jax.tree.leaves(got), jax.tree.leaves(want)))


def randomized(module, seed=0):
    """A torch module with no weight and no running statistic at its neutral start, in float64."""
    torch.manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif tensor.ndim > 1:
            tensor.normal_(0, tensor[0].numel() ** -0.5)
        elif tensor.is_floating_point():  # a convolution's own bias is drawn before the seed
            tensor.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
    return module.double()


def to_torch(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy()).double()


def from_torch(x):
    return np.moveaxis(x.detach().numpy(), 1, -1).astype(np.float32)


def tensors(module, field):
    """Torch's weights ("data") or their gradients ("grad") in our names; statistics separately.

    Returns:
      (parameters, running statistics), nested dicts.
    """

    def array(tensor):
        return getattr(tensor, field).detach().numpy().astype(np.float32)

    def conv(m, axes=(2, 3, 1, 0)):
        bias = {} if m.bias is None else {"bias": array(m.bias)}
        return {"kernel": array(m.weight).transpose(axes)} | bias

    deconv = functools.partial(conv, axes=(2, 3, 0, 1))

    def norm(m):
        scale = {"scale": array(m.weight), "bias": array(m.bias)}
        return scale, {"mean": m.running_mean.numpy(), "var": m.running_var.numpy()}

    def conv_norm(m):
        inner, outer = list(m.children())[:2]
        scale, statistics = norm(outer)
        return {"conv": conv(inner), "norm": scale}, {"norm": statistics}

    def many(names, modules):
        pairs = {str(name): conv_norm(m) for name, m in zip(names, modules, strict=True)}
        return {k: v[0] for k, v in pairs.items()}, {k: v[1] for k, v in pairs.items()}

    if isinstance(module, modeling_beit.BeitFPNNeck):
        scale, statistics = norm(module.fpn1.normalization)
        stride4 = {
            "deconv1": deconv(module.fpn1.conv_transpose1),
            "norm": scale,
            "deconv2": deconv(module.fpn1.conv_transpose2),
        }
        params = {"stride4": stride4, "stride8": {"deconv": deconv(module.fpn2)}}
        return params, {"stride4": {"norm": statistics}}
    if isinstance(module, modeling_beit.BeitFCNHead | modeling_upernet.UperNetFCNHead):
        params, statistics = conv_norm(module.convs[0])
        return {"hidden": params, "classifier": conv(module.classifier)}, {"hidden": statistics}
    beit = isinstance(module, modeling_beit.BeitUperHead)
    pooling = [b.conv if beit else b.layers[1] for b in module.psp_modules.blocks]
    parts = {
        "pooling": many(module.pool_scales, pooling),
        "bottleneck": conv_norm(module.psp_bottleneck if beit else module.bottleneck),
        "lateral": many(range(3), module.lateral_convs),
        "output": many(range(3), module.fpn_convs),
        "fusion": conv_norm(module.fpn_bottleneck),
    }
    params = {k: v[0] for k, v in parts.items()} | {"classifier": conv(module.classifier)}
    return params, {k: v[1] for k, v in parts.items()}


def abstract(network, *args, **kwargs):
    """A module with shapes in the place of arrays."""
    return nnx.eval_shape(lambda: network(*args, **kwargs, rngs=param_keys(0)))


def own(kind):
    """Our module and transformers' of one kind, and the widths of the maps that it takes."""
    if kind == "neck":
        return (
            abstract(necks.Pyramid, WIDTH, dtype=jnp.float32),
            modeling_beit.BeitFPNNeck(BEIT),
            (WIDTH,) * 4,
        )
    if kind == "fcn":
        ours = abstract(
            decoders.FCN, WIDTH, CLASSES, channels=AUXILIARY, dropout=0.0, dtype=jnp.float32
        )
        return ours, modeling_beit.BeitFCNHead(BEIT), (WIDTH,) * 4
    widths = (WIDTH,) * 4 if kind == "beit" else STAGE_WIDTHS
    ours = abstract(
        decoders.UPerNet, widths, CLASSES, channels=WIDTH, dropout=0.0, dtype=jnp.float32
    )
    if kind == "beit":
        return ours, modeling_beit.BeitUperHead(BEIT), widths
    return ours, modeling_upernet.UperNetHead(UPERNET, widths), widths


def maps_for(kind, widths):
    """Maps of one size for the neck; otherwise four levels whose sides do not divide evenly."""
    sides = [GRID] * 4 if kind == "neck" else [(14, 22), (7, 11), GRID, (3, 5)]
    return [
        rand(BATCH, *side, width, seed=i)
        for i, (side, width) in enumerate(zip(sides, widths, strict=True))
    ]


def run_ours(definition, kind, params, running, maps, *, training):
    module = nnx.merge(definition, params)
    statistics = batch_norm.Statistics(running, training=training)
    if kind == "neck":
        out = module(maps, statistics)
    else:
        out = module(maps[2] if kind == "fcn" else maps, statistics, None)
    return out, statistics.updated()


def flat(outputs):
    """Outputs as one array; the neck has four, the others one."""
    if not isinstance(outputs, list | tuple):
        return outputs
    library = torch if isinstance(outputs[0], torch.Tensor) else jnp
    return library.concatenate([x.reshape(-1) for x in outputs])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("kind", ["neck", "beit", "upernet", "fcn"])
def test_modules_equal_transformers(kind, training, monkeypatch):
    ours, theirs, widths = own(kind)
    theirs = randomized(theirs).train(training)
    definition, shapes = specs.split(ours)
    params, running = tensors(theirs, "data")
    params, running = jax.tree.map(np.array, (params, running))  # torch renews them in place
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
    fresh = batch_norm.fresh_statistics(ours)
    assert jax.tree.map(np.shape, running) == jax.tree.map(np.shape, fresh)

    maps = maps_for(kind, widths)
    inputs = [to_torch(x).requires_grad_() for x in maps]
    want = flat(theirs(inputs))
    weights = rand(*want.shape, seed=9)
    (want * torch.from_numpy(weights).double()).sum().backward()

    def loss(params, maps):
        out, new = run_ours(definition, kind, params, running, maps, training=training)
        # Torch's neck and heads have channels first.
        out = [jnp.moveaxis(x, -1, 1) for x in (out if kind == "neck" else [out])]
        out = flat(out if kind == "neck" else out[0])
        return jnp.sum(out * weights), (out, new)

    if training:
        step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        (grads, grad_maps), (got, new) = step(params, maps)
    else:
        _, (got, new) = jax.jit(loss)(params, maps)
    assert relative(got, want.detach().numpy()) < 1e-5
    assert worst(new, tensors(theirs, "data")[1]) < 1e-5
    if not training:
        if kind in ("beit", "upernet"):
            resize = functional.interpolate
            monkeypatch.setattr(
                functional, "interpolate", lambda *a, **k: resize(*a, **k | {"align_corners": True})
            )
            assert relative(got, theirs(inputs).detach().numpy()) > 1e-2
        return

    expected, _ = tensors(theirs, "grad")
    if kind == "neck":
        # BatchNorm takes the mean away, so this gradient is zero but for rounding.
        for tree in (grads, expected):
            bias = tree["stride4"]["deconv1"].pop("bias")
            assert np.abs(bias).max() < 1e-4
    assert worst(grads, expected) < 1e-4
    for mine, his in zip(grad_maps, inputs, strict=True):
        if his.grad is None:  # the auxiliary head reads one level
            assert not np.any(mine)
        else:
            assert relative(mine, from_torch(his.grad)) < 1e-4


def test_max_pool_and_its_gradient_equal_torch_where_values_are_equal():
    x = np.random.default_rng(0).integers(0, 3, (2, 5, 7, 4)).astype(np.float32)
    weight = rand(2, 2, 3, 4)
    tensor = torch.from_numpy(np.moveaxis(x, -1, 1).copy()).requires_grad_()
    want = functional.max_pool2d(tensor, 2)
    (want * torch.from_numpy(np.moveaxis(weight, -1, 1).copy())).sum().backward()
    got, gradient = jax.vjp(necks.max_pool, jnp.asarray(x))
    np.testing.assert_array_equal(got, from_torch(want))
    np.testing.assert_array_equal(gradient(jnp.asarray(weight))[0], from_torch(tensor.grad))
    shared = jax.grad(lambda x: jnp.sum(jnp.max(x)))(jnp.ones((2, 2)))  # what torch does not do
    np.testing.assert_array_equal(shared, 0.25)
    x[0, 3, 2, 1] = np.nan
    assert np.isnan(necks.max_pool(jnp.asarray(x))).sum() == 1


def test_whole_channels_are_dropped_before_the_classifier():
    _, theirs, widths = own("beit")
    ours = abstract(
        decoders.UPerNet, widths, CLASSES, channels=WIDTH, dropout=0.3, dtype=jnp.float32
    )
    theirs = randomized(theirs).train()
    params, running = jax.tree.map(np.array, tensors(theirs, "data"))
    maps = maps_for("beit", widths)
    drops = np.random.default_rng(4).uniform(size=(BATCH, WIDTH)).astype(np.float32)
    kept = torch.from_numpy(drops >= 0.3).double()
    assert 0 < kept.sum() < kept.numel()
    theirs.classifier.register_forward_pre_hook(
        lambda _, inputs: inputs[0] * kept[:, :, None, None] / 0.7
    )
    want = from_torch(theirs([to_torch(x) for x in maps]))
    module = nnx.merge(nnx.split(ours)[0], params)

    @jax.jit
    def run(drops):
        return module(maps, batch_norm.Statistics(running, training=True), drops)

    assert relative(run(drops), want) < 1e-5
    assert relative(run(drops[::-1]), want) > 0.1
    assert relative(run(None), want) > 0.1


def test_a_norm_in_the_wrong_place_would_be_seen():
    ours, theirs, widths = own("neck")
    theirs = randomized(theirs).eval()
    params, running = tensors(theirs, "data")
    maps = maps_for("neck", widths)
    got = run_ours(nnx.split(ours)[0], "neck", params, running, maps, training=False)[0][0]
    block = theirs.fpn1
    x = block.conv_transpose1(to_torch(maps[0]))
    right = block.conv_transpose2(block.activation(block.normalization(x)))
    assert relative(got, from_torch(right)) < 1e-5
    for wrong in (
        block.conv_transpose2(block.normalization(block.activation(x))),
        block.normalization(block.conv_transpose2(block.activation(x))),
        block.conv_transpose2(functional.gelu(block.normalization(x), approximate="tanh")),
    ):
        assert relative(got, from_torch(wrong)) > 1e-4


def test_auxiliary_head_of_upernet_equals_transformers():
    theirs = randomized(modeling_upernet.UperNetFCNHead(UPERNET, STAGE_WIDTHS)).eval()
    ours = abstract(
        decoders.FCN, STAGE_WIDTHS[2], CLASSES, channels=AUXILIARY, dropout=0.1, dtype=jnp.float32
    )
    params, running = tensors(theirs, "data")
    maps = maps_for("upernet", STAGE_WIDTHS)
    definition = nnx.split(ours)[0]
    got, _ = run_ours(definition, "fcn", params, running, maps, training=False)
    assert relative(got, from_torch(theirs([to_torch(x) for x in maps]))) < 1e-5


def test_linear_head_equals_torch():
    bn, conv = torch.nn.BatchNorm2d(WIDTH), torch.nn.Conv2d(WIDTH, CLASSES, 1)
    theirs = randomized(torch.nn.Sequential(bn, conv)).train()
    ours = abstract(
        segmenters.Segmenter,
        widths=(WIDTH,),
        classes=CLASSES,
        neck="none",
        decoder="linear",
        auxiliary_channels=0,
    )
    running = jax.tree.map(jnp.asarray, ours.fresh_statistics())
    norm = running["decoder"]["norm"]
    norm |= {"mean": bn.running_mean.numpy().copy(), "var": bn.running_var.numpy().copy()}
    params = {
        "decoder": {
            "norm": {"scale": bn.weight.detach().numpy(), "bias": bn.bias.detach().numpy()},
            "classifier": {
                "kernel": conv.weight.detach().numpy().transpose(2, 3, 1, 0),
                "bias": conv.bias.detach().numpy(),
            },
        }
    }
    module = nnx.merge(nnx.split(ours)[0], params)
    x = rand(BATCH, *GRID, WIDTH)
    maps = [FeatureMap(x.reshape(BATCH, -1, WIDTH), cls=0, registers=0, grid=GRID)]
    assert ours.droppable == 0
    out = module(maps, running, np.zeros((BATCH, 0)))
    assert relative(out.logits, from_torch(theirs(to_torch(x)))) < 1e-5
    assert relative(out.running["decoder"]["norm"]["var"], bn.running_var.numpy()) < 1e-6
    out = module(maps, out.running)
    assert relative(out.logits, from_torch(theirs.eval()(to_torch(x)))) < 1e-5


def vit_with_hidden_states(folder):
    shape = {
        "image_size": 32,
        "patch_size": 8,
        "width": 16,
        "depth": 6,
        "heads": 2,
        "mlp_width": 32,
    }
    spec = vits.student_spec(shape, "rpb")
    params = vits.random_params(spec)
    return spec, params, vits.beit(spec, params, folder, shared=False)


def test_logits_on_a_vit_equal_transformers(tmp_path):
    spec, encoder_params, beit = vit_with_hidden_states(tmp_path / "beit")
    encoder = vits.bind(spec, encoder_params)
    where = segmenters.levels(encoder)
    assert where == segmenters.Levels((1, 2, 3, 5), (16,) * 4, "pyramid")
    parts = {
        "neck": modeling_beit.BeitFPNNeck(BEIT),
        "decoder": modeling_beit.BeitUperHead(BEIT),
        "auxiliary": modeling_beit.BeitFCNHead(BEIT),
    }
    parts = {name: randomized(module).eval() for name, module in parts.items()}
    ours = abstract(
        segmenters.Segmenter,
        widths=where.widths,
        classes=CLASSES,
        neck=where.neck,
        decoder="upernet",
        channels=WIDTH,
        auxiliary_channels=AUXILIARY,
        dropout=0.0,
    )
    both = {name: jax.tree.map(np.array, tensors(m, "data")) for name, m in parts.items()}
    params = {name: value[0] for name, value in both.items()}
    running = {name: value[1] for name, value in both.items()}
    assert jax.tree.map(np.shape, running) == jax.tree.map(np.shape, ours.fresh_statistics())
    images = vits.pictures(spec, BATCH)

    @jax.jit
    def run(drops=None):
        segmenter = nnx.merge(nnx.split(ours)[0], params)
        return segmenter(encoder.intermediates(images, where.blocks), running, drops)

    out = run()
    assert out.auxiliary is None
    assert worst(out.running, running) == 0

    with torch.no_grad():
        pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
        hidden = beit(pixels, output_hidden_states=True).hidden_states

    def theirs(states):
        with torch.no_grad():
            grids = [x[:, 1:].mT.reshape(BATCH, -1, 4, 4).double() for x in states]
            levels = parts["neck"](grids)
            return from_torch(parts["decoder"](levels)), from_torch(parts["auxiliary"](levels))

    # hidden_states begins with the embedding
    states = [hidden[block + 1] for block in where.blocks]
    want, want_auxiliary = theirs(states)
    assert out.logits.shape == (BATCH, 16, 16, CLASSES)
    assert relative(out.logits, want) < 2e-5
    with torch.no_grad():
        normed = [beit.layernorm(x) for x in states]
    wrong = {
        "final norm on the maps": normed,
        "one block too early": [hidden[block] for block in where.blocks],
        "norm on the last map only": [*states[:3], normed[3]],
    }
    for name, values in wrong.items():
        assert relative(out.logits, theirs(values)[0]) > 1e-2, name

    drops = np.full((BATCH, ours.droppable), 0.5)
    parts = {name: module.train() for name, module in parts.items()}
    want, want_auxiliary = theirs(states)
    out = run(drops)
    assert relative(out.logits, want) < 1e-4
    assert relative(out.auxiliary, want_auxiliary) < 1e-4
    statistics = {name: tensors(module, "data")[1] for name, module in parts.items()}
    assert worst(out.running, statistics) < 1e-4


def swin_and_upernet(folder):
    made = swins.spec(1, depths=[1, 2, 1, 1], heads=[2, 2, 4, 4], embed_width=8, window=2)
    backbone = swins.hf_config(made.arch)
    backbone.set_output_features_output_indices(
        out_features=["stage1", "stage2", "stage3", "stage4"], out_indices=None
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone,
        hidden_size=WIDTH,
        num_labels=CLASSES,
        auxiliary_channels=AUXILIARY,
        auxiliary_in_channels=32,
    )
    theirs = randomized(transformers.UperNetForSemanticSegmentation(config)).float().eval()
    encoder_params = swins.random_params(made)
    swin = swins.hf_model(made, encoder_params, folder)
    theirs.backbone.swin.load_state_dict(swin.state_dict())
    return made, encoder_params, theirs


def test_logits_on_a_swin_equal_transformers(tmp_path):
    made, encoder_params, theirs = swin_and_upernet(tmp_path / "swin")
    encoder = swins.bind(made, encoder_params)
    where = segmenters.levels(encoder)
    assert where == segmenters.Levels((0, 2, 3, 4), (8, 16, 32, 64), "stage_norms")
    ours = abstract(
        segmenters.Segmenter,
        widths=where.widths,
        classes=CLASSES,
        neck=where.neck,
        decoder="upernet",
        channels=WIDTH,
        auxiliary_channels=AUXILIARY,
    )
    head, running = jax.tree.map(np.array, tensors(theirs.decode_head, "data"))
    side, side_running = jax.tree.map(np.array, tensors(theirs.auxiliary_head, "data"))
    norms = [theirs.backbone.hidden_states_norms[f"stage{i}"] for i in range(1, 5)]
    stage_norms = {
        str(i): {"scale": m.weight.detach().numpy(), "bias": m.bias.detach().numpy()}
        for i, m in enumerate(norms)
    }
    params = {"neck": {"norms": stage_norms}, "decoder": head, "auxiliary": side}
    running = {"decoder": running, "auxiliary": side_running}
    images = swins.pictures(made, BATCH)

    @jax.jit
    def logits(params):
        module = nnx.merge(nnx.split(ours)[0], params)
        out = module(encoder.intermediates(images, where.blocks), running)
        return resampling.resize(out.logits, images.shape[1:3])

    with torch.no_grad():
        want = theirs(torch.from_numpy(np.moveaxis(images, -1, 1).copy())).logits
    assert relative(logits(params), from_torch(want)) < 2e-5
    swapped = stage_norms | {"3": jax.tree.map(lambda x: x[::-1], stage_norms["3"])}
    wrong = params | {"neck": {"norms": swapped}}
    assert relative(logits(wrong), from_torch(want)) > 1e-3


@pytest.mark.parametrize("size", [(1, 2), (5, 4), (18, 16)])
@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_adaptive_pooling_equals_torch(size, bins):
    x = rand(2, *size, 3)
    got = resampling.adaptive_mean(x, bins)
    want = from_torch(torch.nn.AdaptiveAvgPool2d(bins)(to_torch(x)))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_pooling_with_separate_bins_would_be_seen():
    """Where bins do not divide the size, neighbours overlap; a reshape cannot give that."""
    x = rand(1, 4, 1, 1)
    got = resampling.pooling_matrix(4, 3) @ x[0, :, 0, 0]
    separate = [x[0, a:b, 0, 0].mean() for a, b in ((0, 1), (1, 2), (2, 4))]
    assert relative(got, separate) > 0.1


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    "size,target",
    [
        ((4, 6), (8, 12)),
        ((1, 1), (3, 5)),
        ((3, 7), (16, 9)),
        ((9, 18), (37, 37)),
        ((11, 8), (4, 3)),
        ((5, 6), (1, 6)),
    ],
)
def test_bilinear_equals_torch(size, target, align_corners):
    x = rand(2, *size, 3)
    got = resampling.resize(x, target, align_corners=align_corners)
    options = {"size": target, "mode": "bilinear"}
    want = functional.interpolate(to_torch(x), **options, align_corners=align_corners)
    np.testing.assert_allclose(got, from_torch(want), atol=2e-6)
    if size != (1, 1):
        swapped = functional.interpolate(to_torch(x), **options, align_corners=not align_corners)
        assert relative(got, from_torch(swapped)) > 1e-2


@functools.cache
def tiny_segmenter(**changes):
    settings = {"channels": 8, "auxiliary_channels": 4, "dropout": 0.1, **changes}
    return segmenters.Segmenter(
        widths=(8,) * 4,
        classes=3,
        neck="pyramid",
        decoder="upernet",
        rngs=nnx.Rngs(0),
        **settings,
    )


@pytest.mark.slow
def test_statistics_are_those_of_the_global_batch_on_every_mesh():
    definition, params = specs.split(tiny_segmenter())
    running = tiny_segmenter().fresh_statistics()
    tokens = [rand(8, 24, 8, seed=i) + np.arange(8)[:, None, None] for i in range(4)]
    drops = np.random.default_rng(0).uniform(size=(8, 12)).astype(np.float32)

    def forward(params, tokens, drops):
        maps = [FeatureMap(x, cls=0, registers=0, grid=GRID) for x in tokens]
        return nnx.merge(definition, params)(maps, running, drops)

    results = {}
    for devices, fsdp in ((1, 1), (2, 1), (8, 2)):
        mesh = sharding.make_mesh(fsdp=fsdp, devices=jax.devices()[:devices])
        rows = sharding.batch_sharding(mesh)
        placed = jax.device_put(
            (params, tokens, drops), (sharding.param_shardings(params, mesh), rows, rows)
        )
        results[devices] = jax.device_get(jax.jit(forward)(*placed))
    for devices in (2, 8):
        assert worst(results[devices].running, results[1].running) < 1e-5
        assert relative(results[devices].logits, results[1].logits) < 1e-5

    # Devices that each use their own half of the batch, and average the statistics afterwards.
    halves = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), (tokens, drops))
    wrong = jax.jit(jax.vmap(forward, in_axes=(None, 0, 0)))(params, *halves).running
    wrong = jax.tree.map(lambda x: x.mean(axis=0), wrong)
    assert worst(wrong, results[1].running) > 1e-2


def test_kernel_gradient_as_a_convolution_and_as_matmuls():
    """CPUs take one of them and accelerators the other."""
    x, g = rand(2, 5, 7, 3), rand(2, 5, 7, 4, seed=1)
    options = {"size": (3, 3), "grad_dtype": jnp.float32}
    got = convolution._kernel_gradient(x, g, **options)
    assert relative(convolution._kernel_gradient_by_matmuls(x, g, **options), got) < 1e-6
    want = jax.vjp(lambda k: convolution._convolve(x, k), jnp.zeros((3, 3, 3, 4)))[1](g)[0]
    assert relative(got, want) < 1e-6


def test_bfloat16_keeps_statistics_logits_and_gradients_in_float32():
    def fcn(dtype):
        return decoders.FCN(8, 3, channels=4, dropout=0.0, dtype=dtype, rngs=nnx.Rngs(0))

    params = specs.split(fcn(jnp.float32))[1]
    running = batch_norm.fresh_statistics(fcn(jnp.float32))
    x = rand(2, *GRID, 8)

    def loss(params, dtype):
        statistics = batch_norm.Statistics(running, training=True)
        module = nnx.merge(nnx.split(fcn(dtype))[0], params)
        logits = module(jnp.asarray(x, dtype), statistics, None)
        return jnp.sum(jnp.square(logits - 1)), (logits, statistics.updated())

    step = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    rough, exact = step(params, jnp.bfloat16), step(params, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(rough)} == {jnp.dtype(jnp.float32)}
    assert 1e-6 < max(map(relative, jax.tree.leaves(rough), jax.tree.leaves(exact))) < 0.05


def test_initial_weights():
    params = specs.split(tiny_segmenter(channels=64))[1]
    decoder = params["decoder"]
    assert np.std(decoder["classifier"]["kernel"]) == pytest.approx(0.01, rel=0.2)
    assert not np.any(decoder["classifier"]["bias"])
    kernel = decoder["fusion"]["conv"]["kernel"]
    assert np.std(kernel) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    theirs = torch.nn.ConvTranspose2d(8, 8, 2, stride=2)
    bound = theirs.weight.detach().abs().max().item()
    for deconv in (params["neck"]["stride8"]["deconv"], params["neck"]["stride4"]["deconv1"]):
        assert np.abs(deconv["kernel"]).max() == pytest.approx(bound, rel=0.05)
        assert np.abs(deconv["bias"]).max() <= 1 / 32**0.5


@pytest.mark.parametrize("depth,blocks", [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23))])
def test_blocks_of_the_published_networks(depth, blocks):
    shape = {"image_size": 32, "patch_size": 16, "width": 8, "heads": 1, "mlp_width": 8}
    spec = vits.student_spec({**shape, "depth": depth}, "ape")
    encoder = nnx.merge(*spec.abstract())
    assert segmenters.levels(encoder).blocks == blocks


def test_odd_grids_of_patch_14():
    """37 x 37 patches: the last level has 18 x 18, and everything is resized to the first."""
    definition, params = specs.split(tiny_segmenter())
    running = tiny_segmenter().fresh_statistics()
    maps = [FeatureMap(rand(2, 1 + 37 * 25, 8), cls=1, registers=0, grid=(37, 25))] * 4
    logits = jax.eval_shape(lambda: nnx.merge(definition, params)(maps, running).logits)
    assert logits.shape == (2, 148, 100, 3)
    x = rand(1, 5, 3, 2)
    want = functional.max_pool2d(to_torch(x), 2)
    np.testing.assert_array_equal(necks.max_pool(jnp.asarray(x)), from_torch(want))


def test_refusals():
    with pytest.raises(ConfigError, match="neck='fpn' is unknown"):
        segmenters.Segmenter(
            widths=(8,) * 4, classes=2, neck="fpn", decoder="upernet", rngs=nnx.Rngs(0)
        )
    with pytest.raises(ConfigError, match="3 maps; expected 4"):
        segmenters.Segmenter(
            widths=(8,) * 3, classes=2, neck="none", decoder="upernet", rngs=nnx.Rngs(0)
        )
    with pytest.raises(ConfigError, match="expected one width"):
        segmenters.Segmenter(
            widths=STAGE_WIDTHS, classes=2, neck="pyramid", decoder="upernet", rngs=nnx.Rngs(0)
        )
    with pytest.raises(ConfigError, match="auxiliary_channels=0"):
        segmenters.Segmenter(
            widths=(8,), classes=2, neck="none", decoder="linear", rngs=nnx.Rngs(0)
        )
    swin = nnx.merge(*swins.spec(1).abstract())
    with pytest.raises(ConfigError, match="a network of 3 stages has no four levels"):
        segmenters.levels(swin)
    shape = {"image_size": [8, 32], "patch_size": 8, "width": 8, "heads": 1, "mlp_width": 8}
    wide = nnx.merge(*vits.student_spec({**shape, "depth": 3}, "ape").abstract())
    with pytest.raises(ConfigError, match="a grid of 1 x 4 patches has no four levels"):
        segmenters.levels(wide)
    shallow = {**shape, "image_size": 32, "depth": 2}
    with pytest.raises(ConfigError, match="a ViT of 2 blocks"):
        segmenters.levels(nnx.merge(*vits.student_spec(shallow, "ape").abstract()))
    maps = [FeatureMap(rand(1, 24, 8), cls=0, registers=0, grid=GRID)] * 4
    module = tiny_segmenter()
    with pytest.raises(ConfigError, match="single value per channel.*at least 2"):
        module(maps, module.fresh_statistics(), jnp.full((1, 12), 0.5))
