"""DINOv2 and DINOv3 with gated MLPs against transformers' classes."""

import numpy as np
import pytest
import transformers

from tests import tiny
from tests.convert import oracles
from tests.models import hugging_face, vits
from tests.models.torch_names import filled, renamed
from tests.models.vits import relative

TOLERANCE = 1e-5
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"image_size": 32, "patch_size": 8}


def dinov2(**arch):
    """Two thirds of four times the width, rounded up to a multiple of 8, as in DINOv2-g."""
    fields = {"gated_mlp": True, "mlp_width": 128, "activation": "silu", "layer_scale": 0.5}
    return tiny.teacher_spec(**{**fields, **arch})


def dinov2_model(params):
    config = transformers.Dinov2Config(
        **SIZES, mlp_ratio=4, use_swiglu_ffn=True, layer_norm_eps=1e-6, use_mask_token=False
    )
    tensors = renamed(params, hugging_face.DINOV2)
    return filled(transformers.Dinov2Model(config), tensors)


def dinov3(activation, **arch):
    fields = {"gated_mlp": True, "activation": activation, "position": "rope", "registers": 2}
    fields |= {"qkv_bias": "qv", "layer_scale": 0.5, "norm_eps": 1e-5, "rope_theta": 100.0}
    return tiny.teacher_spec(**{**fields, **arch})


def dinov3_model(params, activation):
    config = transformers.DINOv3ViTConfig(
        **SIZES,
        intermediate_size=96,
        num_register_tokens=2,
        rope_theta=100.0,
        key_bias=False,
        use_gated_mlp=True,
        layer_norm_eps=1e-5,
        hidden_act={"silu": "silu", "gelu_erf": "gelu"}[activation],
    )
    tensors = renamed(params, hugging_face.DINOV3)
    tensors["embeddings.mask_token"] = np.zeros((1, 1, 48))
    return filled(transformers.DINOv3ViTModel(config), tensors)


def theirs(model, images):
    return oracles.run(lambda x: model(x).last_hidden_state, images)


def test_dinov2_with_a_gate_equals_transformers():
    spec = dinov2()
    params, images = vits.random_params(spec), vits.pictures(spec, 2)
    want = theirs(dinov2_model(params), images)
    assert relative(vits.bind(spec, params)(images).tokens, want) < TOLERANCE
    wrong = dinov2(activation="gelu_tanh")
    assert relative(vits.bind(wrong, params)(images).tokens, want) > 100 * TOLERANCE


@pytest.mark.parametrize("activation", ["silu", "gelu_erf"])
def test_dinov3_with_a_gate_equals_transformers(activation):
    spec = dinov3(activation)
    params, images = vits.random_params(spec), vits.pictures(spec, 2)
    want = theirs(dinov3_model(params, activation), images)
    assert relative(vits.bind(spec, params)(images).tokens, want) < TOLERANCE
    blocks = {}
    for index, block in params["blocks"].items():
        mlp = block["mlp"]
        blocks[index] = {**block, "mlp": {**mlp, "gate": mlp["fc1"], "fc1": mlp["gate"]}}
    exchanged = vits.bind(spec, {**params, "blocks": blocks})(images).tokens
    assert relative(exchanged, want) > 100 * TOLERANCE
