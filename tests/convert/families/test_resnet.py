"""ResNets in the names of transformers and timm: features, logits, and the way back.

The oracles are the classes of transformers, and for timm its own outputs (`test_outputs.py`).
"""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
import torch
import transformers

from fd_jax import inference, model_folder
from fd_jax.convert import exporting, importing, verifying
from fd_jax.convert.containers.opening import open_container
from fd_jax.convert.trees import flat
from fd_jax.errors import ConversionError
from tests.convert import oracles
from tests.convert.test_outputs import saved, write
from tests.models import resnets

TOLERANCE = 1e-5
HALF = [0.5, 0.4, 0.6]
SMALL = {"embedding_size": 12, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 2, 1, 1]}
CLASSES = {
    "v1.5": ("ResNetModel", {}),
    "v1": ("ResNetForImageClassification", {"downsample_in_bottleneck": True, "num_labels": 5}),
    "basic": ("ResNetModel", {"layer_type": "basic", "embedding_size": 16}),
}


def hf_folder(kind, folder, **fields):
    """The folder that transformers writes, with the config of an image processor."""
    name, more = CLASSES[kind]
    torch.manual_seed(0)
    config = transformers.ResNetConfig(**{**SMALL, **more, **fields})
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for weight in (*model.parameters(), *model.buffers()):
            if weight.is_floating_point():
                weight.add_(0.2 * torch.rand_like(weight))
    model.save_pretrained(folder)
    beside = {"image_mean": HALF, "image_std": HALF, "rescale_factor": 1 / 255, "crop_pct": 0.875}
    beside["size"] = {"shortest_edge": 70}
    (folder / "preprocessor_config.json").write_text(json.dumps(beside))
    return model


def base(model):
    return getattr(model, "resnet", model)


def contents(path):
    return {name: np.array(t.load()) for name, t in open_container(path).tensors.items()}


@pytest.mark.parametrize("kind", CLASSES)
def test_a_folder_of_transformers_gives_the_features_of_its_class_and_goes_back(kind, tmp_path):
    model = hf_folder(kind, tmp_path / "hf")
    result = importing.import_file("auto", tmp_path / "hf", tmp_path / "model")
    spec, (_, parts) = result.spec, model_folder.load(tmp_path / "model")
    images = resnets.pictures(spec)
    want = resnets.hf_tokens(base(model), images)
    got = resnets.bind(spec, parts["encoder"])(images)
    assert resnets.relative(got.tokens, want) < TOLERANCE
    assert (spec.mean, spec.arch["image_size"]) == (tuple(HALF), 70)
    wanted = resnets.spec(kind, image_size=70).arch
    assert spec.arch == wanted
    if "head" in parts:
        logits = oracles.run(lambda x: model(x).logits, images)
        found = inference.load_model(tmp_path / "model").logits(images)
        assert resnets.relative(found, logits) < TOLERANCE
    exporting.export("huggingface", tmp_path / "model", tmp_path / "back")
    before, after = contents(tmp_path / "hf"), contents(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value, err_msg=key)
    again, info = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())
    np.testing.assert_array_equal(resnets.hf_tokens(base(again.eval()), images), want)
    assert importing.read("auto", tmp_path / "back").spec.arch == spec.arch
    assert verifying.verify("auto", tmp_path / "hf", tmp_path / "model").agrees


def test_names_in_memory_and_in_larger_models_are_read(tmp_path):
    model = hf_folder("v1", tmp_path / "hf")
    expected = importing.read("auto", tmp_path / "hf").params
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "hf" / "model.safetensors").unlink()
    found = flat(importing.read("auto", tmp_path / "hf").params)
    for path, array in flat(expected).items():
        np.testing.assert_array_equal(found.pop(path), array, err_msg=path)
    assert not found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; networks here have 'relu'"),
        ({"downsample_in_first_stage": True}, "downsample_in_first_stage True"),
    ],
)
def test_configs_of_other_networks_are_refused(fields, message, tmp_path):
    hf_folder("v1.5", tmp_path / "hf", **fields)
    with pytest.raises(ConversionError, match=message):
        importing.read("auto", tmp_path / "hf")


FACTS = ("image_size=64", "activation=relu", "norm_eps=1e-5", "mean=0.5,0.5,0.5", "std=1,1,1")


def test_what_no_tensor_tells_is_asked_for(tmp_path):
    """Of a file of torchvision's, whose names are timm's; what a published network says of it."""
    folder = write(saved("resnet"), tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(ConversionError) as caught:
        importing.read("auto", folder)
    for fact in ("image_size", "stride_at", "activation", "norm_eps", "mean", "std"):
        assert fact in str(caught.value)
    result = importing.read("auto", folder, facts=(*FACTS, "stride_at=second"))
    assert result.spec.origins["shortcut"] == "the code of timm's and torchvision's ResNet"
    assert "how many batches" in next(iter(result.dropped))


def test_a_published_name_tells_all_of_it(tmp_path):
    """Of a network with the real widths of a ResNet-18, which are its shapes."""
    tensors = {}

    def convolution(name, norm, out, width, side):
        tensors[f"{name}.weight"] = np.zeros((out, width, side, side), np.float16)
        for part in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{norm}.{part}"] = np.ones(out, np.float16)

    convolution("conv1", "bn1", 64, 3, 7)
    widths = [64, 64, 128, 256, 512]
    for stage in range(4):
        for block in range(2):
            at, out = f"layer{stage + 1}.{block}", widths[stage + 1]
            convolution(f"{at}.conv1", f"{at}.bn1", out, out if block else widths[stage], 3)
            convolution(f"{at}.conv2", f"{at}.bn2", out, out, 3)
            if stage and not block:
                down = f"{at}.downsample"
                convolution(f"{down}.0", f"{down}.1", out, widths[stage], 1)
    save_file(tensors, tmp_path / "resnet18.safetensors")
    with pytest.raises(ConversionError, match=r"--arch=resnet18\.\w+"):
        importing.read("auto", tmp_path / "resnet18.safetensors")
    result = importing.read("auto", tmp_path / "resnet18.safetensors", arch="resnet18.tv_in1k")
    arch = result.spec.arch
    assert (arch["image_size"], arch["activation"], arch["norm_eps"]) == (224, "relu", 1e-5)
    assert (arch["bottleneck"], arch["stride_at"], arch["depths"]) == (False, "first", [2] * 4)


def test_networks_that_cannot_be_had_are_refused_by_name(tmp_path):
    tensors = contents(write(saved("resnet"), tmp_path))
    second = tensors["layer1.0.conv2.weight"]
    ones = np.ones(4, np.float32)
    wrong = {
        r"attention of channels.*SE-ResNet": {"layer1.0.se.fc1.weight": second},
        r"pooling by attention.*CLIP's ResNet": {"attnpool.positional_embedding": second},
        r"Res2Net": {"layer1.0.convs.0.weight": second},
        r"ResNeSt": {"layer1.0.conv2.conv.weight": second},
        r"ResNet-RS": {"maxpool.0.weight": second},
        r"read 2 of 4 channels: groups of them .ResNeXt.": {"layer1.0.conv2.weight": second[:, :2]},
        r"kernels of 1 x 1 and 1 x 1 and 1 x 1": {"layer1.0.conv2.weight": second[:, :, :1, :1]},
        r"its stem has kernels of 3 x 3 x 3": {
            "conv1.weight": tensors["conv1.weight"][:, :, :3, :3]
        },
        r"unexpected layer1.0.more": {"layer1.0.more": ones},
    }
    for number, (message, changes) in enumerate(wrong.items()):
        path = tmp_path / f"{number}.safetensors"
        arrays = {k: np.ascontiguousarray(v) for k, v in (tensors | changes).items()}
        save_file(arrays, path)
        with pytest.raises(ConversionError, match=message):
            importing.read("auto", path, facts=(*FACTS, "stride_at=second"))


@pytest.mark.parametrize("name", ["resnet", "resnet_d"])
def test_a_network_of_timm_goes_back_bit_for_bit(name, tmp_path):
    (tmp_path / "timm").mkdir()
    folder = write(saved(name), tmp_path / "timm")
    importing.import_file("auto", folder, tmp_path / "model")
    exporting.export("timm", tmp_path / "model", tmp_path / "back")
    before, after = contents(folder), contents(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, value in before.items():
        if key.endswith("num_batches_tracked"):
            value = np.zeros((), np.int64)
        np.testing.assert_array_equal(after[key], value, err_msg=key)


def test_a_student_opens_as_its_class_of_transformers(tmp_path):
    """As a run exports it, with a projector beside the encoder."""
    made = resnets.spec(image_size=64)
    params = resnets.random_params(made)
    projector = {"kernel": np.ones((40, 48), np.float32), "bias": np.ones(48, np.float32)}
    model_folder.save(tmp_path / "m", made, {"encoder": params, "projector": projector})
    written = exporting.export("huggingface", tmp_path / "m", tmp_path / "hf")
    assert written.left == ["projector/bias", "projector/kernel"]
    model, info = transformers.AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert isinstance(model, transformers.ResNetModel) and not any(info.values())
    images = resnets.pictures(made)
    want = resnets.hf_tokens(model.eval(), images)
    assert resnets.relative(resnets.bind(made, params)(images).tokens, want) < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "arch", "message"),
    [
        ("D", {}, "a stem of one convolution, strided shortcuts"),
        ("v1.5", {"inner_widths": [8] * 4}, "bottlenecks of a quarter"),
        ("v1.5", {"norm_eps": 1e-3}, "norm epsilon 1e-5"),
        ("v1.5", {"activation": "silu"}, "ReLU"),
    ],
)
def test_what_transformers_cannot_hold_is_refused(kind, arch, message, tmp_path):
    folder = resnets.save(tmp_path / "m", kind, image_size=64, **arch)
    with pytest.raises(ConversionError, match=message):
        exporting.export("huggingface", folder, tmp_path / "hf")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("v1", "halve the grid in their 3 x 3 convolution"),
        ("v1.5", "a stem of 64 channels, or of three widths"),
    ],
)
def test_what_timm_cannot_hold_is_refused(kind, message, tmp_path):
    folder = resnets.save(tmp_path / "m", kind, image_size=64)
    with pytest.raises(ConversionError, match=message):
        exporting.export("timm", folder, tmp_path / "timm")
