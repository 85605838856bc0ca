"""A network that is not quite a public one: exported with equal features, or refused."""

from flax import nnx
import jax
import numpy as np
import pytest
import transformers

from fd_jax.convert import formats
from fd_jax.convert.trees import encoder, flat
from fd_jax.errors import ConfigError, ConversionError
from fd_jax.models.spec import ModelSpec
from tests.convert import oracles, synthetic

PLAIN = {
    **synthetic.SMALL,
    "image_size": 12,
    "position": "ape",
    "cls_token": True,
    "registers": 0,
    "ln_pre": False,
    "final_norm": True,
    "activation": "gelu_erf",
    "norm_eps": 1e-6,
    "layer_scale": None,
    "qkv_bias": "qkv",
    "patch_bias": True,
}
# One network per class of transformers.
BASES = {
    "vit": PLAIN,
    "beit": {**PLAIN, "position": "shared_rpb", "qkv_bias": "qv", "layer_scale": 0.1},
    "clip_vision_model": {**PLAIN, "ln_pre": True, "patch_bias": False, "activation": "quick_gelu"},
    "siglip_vision_model": {**PLAIN, "cls_token": False, "activation": "gelu_tanh"},
    "dinov2": {**PLAIN, "layer_scale": 1.0},
    "dinov2_with_registers": {**PLAIN, "layer_scale": 1.0, "registers": 2},
    "dinov3_vit": {
        **PLAIN,
        "position": "rope",
        "rope_theta": 100.0,
        "layer_scale": 1.0,
        "registers": 2,
        "qkv_bias": "qv",
    },
}
CHANGES = (
    {},
    {"position": "ape"},
    {"position": "rpb"},
    {"position": "none"},
    {"cls_token": False},
    {"registers": 2},
    {"registers": 0},
    {"ln_pre": True},
    {"final_norm": False},
    {"layer_scale": None},
    {"qkv_bias": "none"},
    {"qkv_bias": "qv"},
    {"patch_bias": False},
    {"mlp_width": 80},
    {"activation": "gelu_tanh"},
    {"norm_eps": 1e-3},
)
# AutoModel takes the bare network, whose pooler is new.
POOLER = {"pooler.dense.weight", "pooler.dense.bias", "pooler.layernorm.weight"}
POOLER |= {"pooler.layernorm.bias"}


def random_params(spec):
    """Random parameters by path."""
    rng = np.random.default_rng(0)
    shapes = flat(spec.abstract()[1])
    return {
        f"encoder/{name}": (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)
        for name, leaf in shapes.items()
    }


def opened(folder, images):
    """Kind and features of what `AutoModel` makes of a folder; no key missing or left over."""
    model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not {key for keys in info.values() for key in keys} - POOLER, info
    model.eval()
    tokens = oracles.run(lambda x: model(x).last_hidden_state, images)
    if model.config.model_type == "clip_vision_model":  # it normalises its class token only
        norm = getattr(model, "vision_model", model).post_layernorm
        tokens = oracles.run(lambda x: norm(model(x).last_hidden_state), images)
    return model.config.model_type, tokens


@pytest.mark.parametrize("base", BASES)
def test_a_network_beside_the_public_ones_is_written_right_or_refused(base, tmp_path):
    images = np.random.default_rng(1).standard_normal((1, 12, 12, 3)).astype(np.float32)
    kinds = []
    for index, change in enumerate(CHANGES):
        arch = {**BASES[base], **change}
        if arch["position"] != "rope":
            arch.pop("rope_theta", None)
        spec = ModelSpec("vit", arch)
        try:
            params = random_params(spec)
            folder = tmp_path / str(index)
            formats.FORMATS["huggingface"].write(spec, params, folder)
        except (ConfigError, ConversionError):
            kinds.append("refused")
            continue
        kind, expected = opened(folder, images)
        kinds.append(kind)
        # Eagerly: these run once, and compiling costs more.
        with jax.disable_jit(), jax.default_matmul_precision("highest"):
            nested = encoder(params)
            ours = np.asarray(nnx.merge(spec.abstract()[0], nested)(images).tokens)
        assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max(), (kind, change)
    assert kinds[0] == base
    assert "refused" in kinds


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ("vit", {"position": "ape_rope"}),
        ("vit", {"mlp_norm": True}),
        ("vit", {"attn_norm": True}),
        ("dinov3_vit", {"rope_pairs": "neighbours"}),
        ("dinov3_vit", {"rope_reference": 3}),
        ("dinov3_vit", {"rope_axes": "xy"}),
        ("dinov3_vit", {"position": "ape_rope"}),
    ],
    ids=str,
)
def test_what_no_class_of_transformers_has_is_refused_also_where_no_tensor_shows_it(
    base, change, tmp_path
):
    spec = ModelSpec("vit", {**BASES[base], **change})
    params = random_params(spec)
    with pytest.raises(ConversionError, match="cannot be written as huggingface"):
        formats.FORMATS["huggingface"].write(spec, params, tmp_path / "hf")
    # timm has a class for each of them, see test_timm_folders.py.
    assert formats.FORMATS["timm"].write(spec, params, tmp_path / "timm").left == []


@pytest.mark.parametrize("base", ["vit", "dinov3_vit"])
def test_gates_have_a_class_of_transformers_where_it_has_a_switch(base, tmp_path):
    spec = ModelSpec("vit", {**BASES[base], "gated_mlp": True, "activation": "silu"})
    params = random_params(spec)
    assert formats.FORMATS["timm"].write(spec, params, tmp_path / "timm").left == []
    write = formats.FORMATS["huggingface"].write
    if base == "dinov3_vit":
        assert write(spec, params, tmp_path / "hf").left == []
        return
    with pytest.raises(ConversionError, match="cannot be written as"):
        write(spec, params, tmp_path / "hf")
