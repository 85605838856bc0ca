"""EVA-02, Perception Encoder, RoPE-ViT and BEiT-3 against a plain reference in torch."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from fd_jax import losses, optimizer, sharding
from fd_jax.convert import trees
from fd_jax.diagnose import landscape
from fd_jax.errors import ConfigError
from fd_jax.models import architectures, sizes
from fd_jax.models.vit import ViT
from tests import tiny
from tests.models import evas, vits
from tests.models.torch_names import renamed
from tests.models.vits import relative

TOLERANCE = 1e-5
WIDE = (24, 48)  # a grid of 3 x 6


def reference_tokens(spec, params, images, **call):
    tensors = evas.wide(renamed(params, evas.names(spec.arch)))
    with torch.no_grad():
        return evas.reference(spec.arch, tensors)(torch.from_numpy(images).double(), **call).numpy()


@pytest.mark.parametrize("size", [pytest.param(32, marks=pytest.mark.slow), WIDE])
@pytest.mark.parametrize("name", evas.ARCHITECTURES)
def test_features_equal_the_reference(name, size):
    spec = evas.spec(name, image_size=size)
    params, images = vits.random_params(spec), vits.pictures(spec, 2)
    want = reference_tokens(spec, params, images)
    assert relative(vits.bind(spec, params)(images).tokens, want) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("EVA-02-S", {"rope_pairs": "halves"}),
        ("EVA-02-S", {"rope_reference": 6}),
        ("EVA-02-S", {"rope_reference": 0}),
        ("EVA-02-S", {"rope_reference": None}),
        ("EVA-02-S", {"rope_offset": 1.0}),
        ("EVA-02-S", {"rope_axes": "xy"}),
        ("EVA-02-S", {"rope_theta": 100.0}),
        ("EVA-02-S", {"position": "ape"}),
        ("EVA-02-S", {"activation": "gelu_erf"}),
        ("Perception Encoder", {"rope_offset": 0.0}),
        ("RoPE-ViT", {"rope_reference": 3}),
        ("EVA-02-B", {"norm_eps": 1e-2}),
    ],
    ids=str,
)
def test_a_wrong_network_is_seen(name, change):
    spec = evas.spec(name, image_size=WIDE)
    params, images = vits.random_params(spec), vits.pictures(spec, 2)
    right = np.asarray(vits.bind(spec, params)(images).tokens)
    wrong = evas.spec(name, image_size=WIDE, **change)
    assert relative(vits.bind(wrong, params)(images).tokens, right) > 100 * TOLERANCE


def test_exchanged_and_missing_parts_are_seen():
    spec = evas.spec("EVA-02-CLIP")
    params, images = vits.random_params(spec), vits.pictures(spec, 2)
    right = np.asarray(vits.bind(spec, params)(images).tokens)
    block = params["blocks"]["0"]
    mlp = block["mlp"]
    exchanged = {**mlp, "gate": mlp["fc1"], "fc1": mlp["gate"]}
    blocks = {**params["blocks"], "0": {**block, "mlp": exchanged}}
    other = vits.bind(spec, {**params, "blocks": blocks})(images)
    assert relative(other.tokens, right) > 100 * TOLERANCE
    for norm, part in (("mlp_norm", "mlp"), ("attn_norm", "attn")):
        blocks = {
            index: {**block, part: {n: v for n, v in block[part].items() if n != "norm"}}
            for index, block in params["blocks"].items()
        }
        lacking = evas.spec("EVA-02-CLIP", **{norm: False})
        other = vits.bind(lacking, {**params, "blocks": blocks})(images)
        assert relative(other.tokens, right) > 100 * TOLERANCE, norm


@pytest.mark.parametrize(
    "name",
    ["EVA-02-CLIP", *(pytest.param(n, marks=pytest.mark.slow) for n in ("BEiT-3", "RoPE-ViT"))],
)
def test_gradients_of_every_parameter_equal_torchs(name):
    """Smooth L1 against whitened random features, as a distillation step has it."""
    spec = evas.spec(name)
    params, images = vits.random_params(spec), vits.pictures(spec, 2)
    features = np.random.default_rng(8).normal(size=(2, 17, 48)).astype(np.float32)

    def loss(params):
        tokens = vits.bind(spec, params)(images).tokens
        return jnp.mean(losses.smooth_l1(tokens, losses.whiten(features), beta=2.0))

    got, grads = jax.jit(jax.value_and_grad(loss))(params)
    names = evas.names(spec.arch)
    tensors = evas.wide(renamed(params, names))
    tokens = evas.reference(spec.arch, tensors)(torch.from_numpy(images).double())
    target = functional.layer_norm(torch.from_numpy(features).double(), (48,), eps=1e-5)
    want = functional.smooth_l1_loss(tokens, target, beta=2.0)
    want.backward()
    np.testing.assert_allclose(got, want.item(), rtol=TOLERANCE)
    ours = renamed(grads, names)
    assert ours.keys() == tensors.keys()
    for name, grad in ours.items():
        wanted = tensors[name].grad.numpy()
        # The keys' bias adds the same to all logits of a query where nothing is rotated: its
        # gradient is zero but for rounding.
        largest = max(np.abs(wanted).max(), 1e-4)
        assert np.abs(grad - wanted).max() < 2 * TOLERANCE * largest, name


@pytest.mark.parametrize("name", ["Perception Encoder", "rotary with a register"])
def test_some_patches_are_rotated_by_their_places(name):
    spec = evas.spec(name, image_size=WIDE)
    params, images = vits.random_params(spec), vits.pictures(spec, 2)
    rng = np.random.default_rng(3)
    keep = np.stack([rng.permutation(18)[:7] for _ in range(2)])
    want = reference_tokens(spec, params, images, keep=torch.from_numpy(keep))
    got = vits.bind(spec, params)(images, keep=jnp.asarray(keep, jnp.int32)).tokens
    assert relative(got, want) < TOLERANCE
    wrong = reference_tokens(spec, params, images, keep=torch.from_numpy(keep[::-1].copy()))
    assert relative(got, wrong) > 100 * TOLERANCE


@pytest.mark.parametrize("size", [pytest.param(40, marks=pytest.mark.slow), WIDE])
def test_a_resized_network_has_a_resized_table_and_the_reference_of_before(size):
    square = evas.spec("Perception Encoder")
    params = vits.random_params(square)
    spec, resized = square.resized(params, size)
    images = vits.pictures(spec, 2)
    tensors = renamed(params, evas.names(square.arch))
    table = torch.from_numpy(tensors["pos_embed"])
    grid = tuple(side // 8 for side in sizes.sides(size))
    patches = table[:, 1:].reshape(1, 4, 4, 48).permute(0, 3, 1, 2)
    patches = functional.interpolate(patches, grid, mode="bicubic")
    patches = patches.permute(0, 2, 3, 1).reshape(1, -1, 48)
    tensors["pos_embed"] = torch.cat([table[:, :1], patches], 1).numpy()
    with torch.no_grad():
        network = evas.reference(square.arch, evas.wide(tensors))
        want = network(torch.from_numpy(images).double()).numpy()
    assert relative(vits.bind(spec, resized)(images).tokens, want) < TOLERANCE


@pytest.mark.parametrize("name", ["EVA-02-CLIP", "rotary with a register"])
def test_every_parameter_has_axes_a_filter_and_a_layer(name):
    spec = evas.spec(name)
    shapes = spec.abstract()[1]
    sharding.param_shardings(shapes, sharding.make_mesh(data=2, fsdp=2, tensor=2))
    params = vits.random_params(spec)
    direction = landscape.random_direction(params, jax.random.key(0), tables="zeroed")
    decays = optimizer.decay_mask(shapes, ViT.NO_DECAY)
    for path, moves in trees.flat(direction).items():
        kernel = path.endswith("kernel")
        assert np.any(moves) == kernel, path
        assert trees.flat(decays)[path] == kernel, path
        if path.startswith("blocks/1/"):
            assert ViT.layer_id(path, spec.arch) == 2


@pytest.mark.parametrize("position", ["ape", "rope"])
def test_a_field_that_is_left_out_has_the_value_that_changes_nothing(position):
    fields = {"rope_pairs": "halves", "rope_reference": None, "rope_offset": 0.0, "rope_axes": "yx"}
    fields |= {"rope_theta": 100.0, "partial_patches": "refuse", "lift": None, "last_width": None}
    fields |= dict.fromkeys(("gated_mlp", "mlp_norm", "attn_norm"), False)
    assert fields.keys() == set(architectures.OPTIONAL["vit"])

    def lowered(**arch):
        spec = tiny.teacher_spec(position=position, **arch)
        definition, shapes = spec.abstract()
        images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        forward = jax.jit(lambda params, images: nnx.merge(definition, params)(images).tokens)
        return forward.lower(shapes, images).as_text()

    assert lowered(**fields) == lowered()
    assert lowered(mlp_norm=True) != lowered()


def test_what_describes_no_rotation_is_refused():
    with pytest.raises(ConfigError, match="10 channels per head are no multiple of 4"):
        evas.spec("RoPE-ViT", width=40).abstract()
    with pytest.raises(ConfigError, match=r"rope_offset=1.0 is added to numbers of patches"):
        evas.spec("Perception Encoder", rope_reference=None).abstract()
    with pytest.raises(ConfigError, match="rope_pairs='thirds' is unknown"):
        evas.spec("RoPE-ViT", rope_pairs="thirds").abstract()
    with pytest.raises(ConfigError, match="rope_axes='zx' is unknown"):
        evas.spec("RoPE-ViT", rope_axes="zx").abstract()
