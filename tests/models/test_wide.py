"""Wider features: a last block of more channels, and a lift after the final norm."""

from flax import nnx
import jax
import numpy as np
import pytest

from fd_jax import inference, model_folder, optimizer
from fd_jax.convert import exporting
from fd_jax.cost import flops
from fd_jax.errors import ConfigError, ConversionError
from fd_jax.models import transfer
from fd_jax.models.spec import FAMILIES, ModelSpec
from fd_jax.models.vit import ViT
from tests import tiny
from tests.models import resnets, vits

WIDE = {"depth": 3, "last_width": 72, "position": "rpb", "layer_scale": 0.1}


def pictures(count=2):
    return np.random.default_rng(3).normal(size=(count, 32, 32, 3)).astype(np.float32)


def bind(spec, params, **runtime):
    return nnx.merge(spec.abstract(**runtime)[0], params)


def test_a_wide_last_block_is_a_plain_one_on_widened_tokens():
    """The two plain networks that it is made of: one of two blocks, and one of one."""
    wide = tiny.teacher_spec(**WIDE)
    params, images = vits.random_params(wide), pictures()
    blocks = params["blocks"]
    first = tiny.teacher_spec(**{**WIDE, "depth": 2, "last_width": None, "final_norm": False})
    rest = {k: v for k, v in params.items() if k not in ("norm", "widen")}
    tokens = bind(first, {**rest, "blocks": {"0": blocks["0"], "1": blocks["1"]}})(images).tokens
    widened = tokens @ params["widen"]["kernel"] + params["widen"]["bias"]
    last = {"depth": 1, "width": 72, "heads": 6, "mlp_width": 144, "last_width": None}
    plain = tiny.teacher_spec(**{**WIDE, **last})
    one = vits.random_params(plain) | {"blocks": {"0": blocks["2"]}, "norm": params["norm"]}
    network = bind(plain, one)
    visits = network._visits(images, None, None)
    positions = next(visits).positions
    want = network.norm(network._run_block(network.blocks["0"], widened, None, *positions))
    got = bind(wide, params)(images)
    assert got.tokens.shape == (2, 17, 72)
    np.testing.assert_allclose(got.tokens, want, rtol=1e-5, atol=1e-5)
    maps = bind(wide, params).intermediates(images, range(3))
    assert [each.tokens.shape[-1] for each in maps] == [48, 48, 72]


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ({"last_width": 48}, "last_width=48: expected more than the width 48"),
        ({"last_width": 50}, "last_width=50: .* a multiple of 12"),
        ({"depth": 1}, "of at least two"),
        ({"position": "shared_rpb"}, "last_width=72, but position='shared_rpb'"),
    ],
)
def test_impossible_last_blocks_are_refused(arch, message):
    with pytest.raises(ConfigError, match=message):
        tiny.teacher_spec(**{**WIDE, **arch}).abstract()


LIFTED = {
    "vit": tiny.teacher_spec(lift=80),
    "swin": tiny.swin_spec(1, lift=80),
    "resnet": resnets.spec(image_size=32, lift=80),
}


@pytest.mark.parametrize(
    "family", ["vit", *(pytest.param(f, marks=pytest.mark.slow) for f in LIFTED if f != "vit")]
)
def test_a_lift_is_a_linear_map_of_the_last_tokens(family, tmp_path):
    spec = LIFTED[family]
    params = jax.tree.map(np.asarray, vits.random_params(spec))
    if family == "resnet":
        params = resnets.random_params(spec)
    plain = ModelSpec(spec.family, {k: v for k, v in spec.arch.items() if k != "lift"})
    rest = {name: value for name, value in params.items() if name != "lift"}
    before = bind(plain, rest)(pictures())
    lift = params["lift"]
    model_folder.save(tmp_path / "m", spec, {"encoder": params})
    model = inference.load_model(tmp_path / "m")
    got = model(pictures())
    want = before.tokens @ lift["kernel"] + lift["bias"]
    np.testing.assert_allclose(got.tokens, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    assert got.tokens.shape[-1] == 80 and "of width 80" in repr(model)
    if spec.arch.get("final_norm"):
        with pytest.raises(ConfigError, match="target.after_norm=True"):
            bind(spec, params)(pictures(), final_norm=False)
    with pytest.raises(ConversionError, match="no place for encoder/lift"):
        exporting.export("huggingface", tmp_path / "m", tmp_path / "hf")
    depth = bind(spec, params).depth
    assert FAMILIES[spec.family].block_of("lift/kernel", spec.arch) == depth


def test_what_starts_from_a_lifted_network(tmp_path):
    spec, parts = LIFTED["vit"], {"encoder": vits.random_params(LIFTED["vit"])}
    keeps = transfer.Changes(image_size=32, final_norm=True, untie=False, keep_head=False)
    assert transfer.target_spec(spec, keeps).arch["lift"] == 80
    assert "lift" in transfer.start(spec, parts, keeps)[0]["encoder"]
    bare = transfer.Changes(image_size=32, final_norm=False, untie=False, keep_head=False)
    with pytest.raises(ConfigError, match="lifts its tokens to 80 channels .*final_norm=True"):
        transfer.target_spec(spec, bare)
    without = transfer.Changes(32, final_norm=False, untie=False, keep_head=False, lift=False)
    assert "lift" not in transfer.target_spec(spec, without).arch
    taken, lines = transfer.start(spec, parts, without)
    assert "lift" not in taken["encoder"] and "encoder/lift" in lines[-1]


def test_layers_and_work_of_wider_features():
    wide = tiny.teacher_spec(**WIDE, lift=80)
    assert ViT.layer_id("widen/kernel", wide.arch) == ViT.layer_id("blocks/2/norm1/bias", wide.arch)
    assert ViT.layer_id("lift/bias", wide.arch) == 4
    again = ModelSpec.from_json(wide.to_json(), where="")
    assert again.arch == wide.arch
    mask = optimizer.decay_mask(wide.abstract()[1], ViT.NO_DECAY)
    assert mask["widen"]["kernel"] and mask["lift"]["kernel"] and not mask["lift"]["bias"]
    work = flops.network(tiny.teacher_spec(**{**WIDE, "last_width": None}), trains=False).forward
    tokens, narrow = 17, 2 * 48 * 4 * 48 + 4 * 17 * 48 + 4 * 48 * 96
    broad = 2 * 72 * 4 * 72 + 4 * 17 * 72 + 4 * 72 * 144
    more = tokens * (broad - narrow + 2 * 48 * 72 + 2 * 72 * 80)
    assert flops.network(wide, trains=False).forward - work == pytest.approx(more)
