"""ConvNeXts in the names of transformers, timm and Meta: features, logits, and the way back.

The oracles are the classes of transformers, and for timm its own outputs (`test_outputs.py`).
"""

import json
import re

import jax
import jax.export
import numpy as np
import pytest
from safetensors.numpy import save_file
import torch
import transformers

from fd_jax import inference, model_folder
from fd_jax.convert import exporting, importing, verifying
from fd_jax.convert.containers.opening import open_container
from fd_jax.errors import ConversionError
from tests.convert import oracles
from tests.convert.test_outputs import saved, write
from tests.models import convnexts

TOLERANCE = 1e-5
HALF = [0.5, 0.4, 0.6]
SMALL = {"hidden_sizes": [8, 12, 20, 24], "depths": [1, 2, 4, 1], "image_size": 64}
# Class -> kind of network, and what is unlike the defaults of its config.
CLASSES = {
    "ConvNextModel": ("v1", {}),
    "ConvNextForImageClassification": ("v1", {"num_labels": 5, "hidden_act": "gelu_new"}),
    "ConvNextV2Model": ("v2", {}),
    "ConvNextV2ForImageClassification": ("v2", {"num_labels": 5, "layer_norm_eps": 1e-3}),
    "DINOv3ConvNextModel": ("dinov3", {"layer_norm_eps": 1e-3}),
}


def torch_model(name):
    """A model of transformers with random weights, norms and biases included."""
    kind, fields = CLASSES[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(convnexts._CONFIGS[kind](**SMALL, **fields))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def hf_folder(name, folder):
    """The folder that transformers writes, with an image processor's config."""
    model = torch_model(name)
    model.save_pretrained(folder)
    statistics = {"image_mean": HALF, "image_std": HALF, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return model


def base(model):
    return getattr(model, "convnext", getattr(model, "convnextv2", model))


def images(spec):
    return convnexts.pictures(spec)


def features(result):
    network = convnexts.bind(result.spec, result.params["encoder"])
    return network(images(result.spec))


def contents(path):
    return {name: np.array(t.load()) for name, t in open_container(path).tensors.items()}


@pytest.mark.parametrize("name", CLASSES)
def test_a_folder_of_transformers_gives_the_features_of_its_class(name, tmp_path):
    kind, fields = CLASSES[name]
    model = hf_folder(name, tmp_path / "hf")
    result = importing.read("auto", tmp_path / "hf")
    spec = result.spec
    want = convnexts.hf_tokens(kind, base(model), images(spec))
    got = features(result)
    assert convnexts.relative(got.tokens, want) < TOLERANCE
    assert spec.mean == tuple(HALF)
    assert spec.arch["widths"] == [8, 12, 20, 24] and spec.arch["image_size"] == 64
    eps = fields.get("layer_norm_eps", 1e-12)
    assert spec.head_norm_eps == eps
    assert spec.arch["norm_eps"] == (eps if kind == "dinov3" else 1e-6)
    assert spec.origins["activation"] == "config.json: hidden_act"
    if "num_labels" in fields:
        parts = {part: result.params[part] for part in ("fc_norm", "head")}
        logits = oracles.run(lambda x: model(x).logits, images(spec))
        assert convnexts.relative(convnexts.classifier(spec, parts)(got), logits) < TOLERANCE


@pytest.mark.parametrize("name", CLASSES)
def test_names_in_memory_are_read_as_those_in_files(name, tmp_path):
    model = hf_folder(name, tmp_path / "hf")
    expected = importing.read("auto", tmp_path / "hf")
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "hf" / "model.safetensors").unlink()
    found = importing.read("auto", tmp_path / "hf")
    assert_same(found.params, expected.params)
    assert found.spec.arch == expected.spec.arch


def assert_same(one, other):
    one, other = (model_flat(tree) for tree in (one, other))
    assert one.keys() == other.keys()
    for path, array in one.items():
        np.testing.assert_array_equal(array, other[path], err_msg=path)


def model_flat(tree, prefix=""):
    found = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found |= model_flat(value, f"{path}/") if isinstance(value, dict) else {path: value}
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_what_was_imported_goes_back_bit_for_bit(name, tmp_path):
    model = hf_folder(name, tmp_path / "hf")
    importing.import_file("auto", tmp_path / "hf", tmp_path / "model")
    exporting.export("huggingface", tmp_path / "model", tmp_path / "back")
    before, after = contents(tmp_path / "hf"), contents(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value, err_msg=key)
    again = type(model).from_pretrained(tmp_path / "back").eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            base(again)(pixels).pooler_output, base(model)(pixels).pooler_output
        )
    exporting.export("source", tmp_path / "model", tmp_path / "source.safetensors")
    for key, value in contents(tmp_path / "source.safetensors").items():
        (original,) = (name for name in before if name in (key, f"{model.base_model_prefix}.{key}"))
        np.testing.assert_array_equal(value, before[original], err_msg=key)


def test_a_program_holds_the_network_for_any_number_of_pictures(tmp_path):
    hf_folder("ConvNextV2Model", tmp_path / "hf")
    importing.import_file("auto", tmp_path / "hf", tmp_path / "model")
    exporting.export("stablehlo", tmp_path / "model", tmp_path / "program.bin")
    program = jax.export.deserialize(bytearray((tmp_path / "program.bin").read_bytes()))
    model = inference.load_model(tmp_path / "model")
    pictures = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    want = model(model.preprocess(pictures)).tokens
    assert convnexts.relative(program.call(pictures), want) < TOLERANCE


@pytest.mark.parametrize("name", ["ConvNextV2Model", "DINOv3ConvNextModel"])
def test_verify_compares_every_block(name, tmp_path):
    hf_folder(name, tmp_path / "hf")
    importing.import_file("auto", tmp_path / "hf", tmp_path / "model")
    compared = verifying.verify("auto", tmp_path / "hf", tmp_path / "model")
    assert compared.agrees
    last = "final norm" if "DINO" in name else "block 7"
    assert [row[0] for row in compared.rows] == [
        "embedding",
        *(f"block {number}" for number in range(8)),
        *(["final norm"] if last == "final norm" else []),
    ]


TIMM = ("convnext", "convnext_v2")


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_a_network_of_timm_goes_back_bit_for_bit_and_to_transformers(name, tmp_path):
    (tmp_path / "timm").mkdir()
    folder = write(saved(name), tmp_path / "timm")
    before = contents(folder)
    importing.import_file("auto", folder, tmp_path / "model")
    exporting.export("timm", tmp_path / "model", tmp_path / "back")
    after = contents(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value, err_msg=key)
    exporting.export("huggingface", tmp_path / "model", tmp_path / "hf")
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    result = importing.read("auto", folder)
    kind = "v2" if name == "convnext_v2" else "v1"
    want = convnexts.hf_tokens(kind, model, images(result.spec))
    assert convnexts.relative(features(result).tokens, want) < TOLERANCE
    assert verifying.verify("auto", folder, tmp_path / "model").agrees


def as_convolutions(tensors):
    """As timm stores the MLPs of its smaller networks (`conv_mlp`)."""
    return {
        name: value[:, :, None, None] if re.search(r"blocks.*mlp\.fc[12]\.weight$", name) else value
        for name, value in tensors.items()
    }


def as_metas(tensors):
    """Meta's own names, from which timm's are made by its `checkpoint_filter_fn`."""
    found = {}
    for name, value in tensors.items():
        new = re.sub(r"^stem\.", "downsample_layers.0.", name)
        new = re.sub(r"^stages\.(\d+)\.downsample", r"downsample_layers.\1", new)
        new = re.sub(r"^stages\.(\d+)\.blocks", r"stages.\1", new)
        new = new.replace("conv_dw", "dwconv").replace("head.norm", "norm")
        if "mlp.grn" in new:
            value = value[None, None, None]
        new = new.replace("mlp.grn.weight", "grn.gamma").replace("mlp.grn.bias", "grn.beta")
        found[new.replace("mlp.fc", "pwconv")] = value
    return found


def with_deep_head(tensors):
    more = {"head.pre_logits.fc.weight": (64, 64), "head.pre_logits.fc.bias": (64,)}
    more |= {"head.fc.weight": (7, 64), "head.fc.bias": (7,)}
    return tensors | {name: np.ones(shape, np.float32) for name, shape in more.items()}


FACTS = ("image_size=64", "activation=gelu_erf", "norm_eps=1e-6", "mean=0.5,0.5,0.5", "std=1,1,1")


@pytest.mark.parametrize("change", [as_convolutions, as_metas, with_deep_head])
@pytest.mark.parametrize("name", TIMM)
def test_other_forms_of_the_same_weights_give_the_same_parameters(name, change, tmp_path):
    tensors = contents(write(saved(name), tmp_path))
    paths = [tmp_path / "plain.safetensors", tmp_path / "other.safetensors"]
    for path, found in zip(paths, (tensors, change(tensors)), strict=True):
        save_file({k: np.ascontiguousarray(v) for k, v in found.items()}, path)
    results = [importing.read("auto", path, facts=FACTS) for path in paths]
    assert_same(results[0].params, results[1].params)
    assert results[0].spec.arch == results[1].spec.arch
    if change is with_deep_head:
        assert any("hidden layer" in reason for reason in results[1].dropped)


def test_the_hub_of_dinov3_normalises_tokens(tmp_path):
    """Its file has Meta's names, and the last norm twice."""
    tensors = as_metas(contents(write(saved("convnext"), tmp_path)))
    twice = {f"norms.3.{part}": tensors[f"norm.{part}"] for part in ("weight", "bias")}
    save_file(tensors | twice, tmp_path / "hub.safetensors")
    # The code of the network tells its activation and epsilon.
    facts = [fact for fact in FACTS if not fact.startswith(("activation", "norm_eps"))]
    result = importing.read("auto", tmp_path / "hub.safetensors", facts=facts)
    assert result.spec.arch["final_norm"] and "fc_norm" not in result.params
    np.testing.assert_array_equal(result.params["encoder"]["norm"]["bias"], tensors["norm.bias"])


def test_facts_that_no_tensor_tells_are_asked_for(tmp_path):
    folder = write(saved("convnext_v2"), tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(ConversionError) as caught:
        importing.read("auto", folder)
    for fact in ("image_size", "activation", "norm_eps", "mean", "std"):
        assert fact in str(caught.value)


def test_networks_that_cannot_be_had_are_refused(tmp_path):
    tensors = contents(write(saved("convnext"), tmp_path))
    path = tmp_path / "other.safetensors"
    first = "stages.1.blocks.0.conv_dw.weight"
    wrong = {
        "depthwise kernels are 5 x 5 and 7 x 7": {first: tensors[first][:, :, 1:-1, 1:-1]},
        "unexpected stages.0.blocks.0.shortcut": {"stages.0.blocks.0.shortcut": np.ones(8)},
    }
    for message, changes in wrong.items():
        arrays = {k: np.ascontiguousarray(v, np.float32) for k, v in (tensors | changes).items()}
        save_file(arrays, path)
        with pytest.raises(ConversionError, match=message):
            importing.read("auto", path, facts=FACTS)


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_a_network_without_a_pooled_norm_gets_one_that_features_do_not_depend_on(kind, tmp_path):
    """As a distilled student is; the norm is that of `pooler_output` alone."""
    made = convnexts.spec(kind, image_size=64)
    params = convnexts.random_params(made)
    model_folder.save(tmp_path / "m", made, {"encoder": params})
    exporting.export("huggingface", tmp_path / "m", tmp_path / "hf")
    model, info = convnexts.MODELS[kind].from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())
    want = convnexts.hf_tokens(kind, model.eval(), images(made))
    got = convnexts.bind(made, params)(images(made)).tokens
    assert convnexts.relative(got, want) < TOLERANCE
    again = importing.read("auto", tmp_path / "hf")
    np.testing.assert_array_equal(again.params["fc_norm"]["scale"], 1)
    assert again.spec.arch == {**made.arch, "layer_scale": again.spec.arch["layer_scale"]}


def test_a_class_that_assumes_another_norm_is_not_written(tmp_path):
    classes = convnexts.save(tmp_path / "c", "v1", classes=5, image_size=64)
    with pytest.raises(ConversionError, match="a head whose norm has the epsilon of all others"):
        exporting.export("timm", classes, tmp_path / "timm")
    assert not (tmp_path / "timm").exists()
