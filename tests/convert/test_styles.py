"""Networks of any size, read by the names of their library and by what stands beside the weights.

The oracle is the class of transformers that wrote the folder, at its own size and at another.
"""

import dataclasses
import functools
import json
from pathlib import Path
import shutil

from flax import nnx
import jax
import numpy as np
import pytest

from fd_jax import model_folder
from fd_jax.convert import cli, exporting, importing, verifying
from fd_jax.convert.containers import safetensors_io
from fd_jax.convert.containers.opening import open_container
from fd_jax.errors import ConfigError, ConversionError

TOLERANCE = 1e-5
HALF = [0.5, 0.4, 0.6]
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 12,
    "patch_size": 4,
}
DINOV2 = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
SWIN = {
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "image_size": 32,
    "patch_size": 4,
}
# Class -> the class of its config, and the fields in which it is unlike its defaults.
CLASSES = {
    "ViTModel": ("ViTConfig", {**SMALL, "layer_norm_eps": 1e-3}),
    "ViTForImageClassification": ("ViTConfig", {**SMALL, "num_labels": 3}),
    "DeiTModel": ("DeiTConfig", SMALL),
    "ViTMSNModel": ("ViTMSNConfig", {**SMALL, "hidden_act": "gelu_new"}),
    "IJepaModel": ("IJepaConfig", SMALL),
    "ViTMAEModel": ("ViTMAEConfig", {**SMALL, "mask_ratio": 0.0}),
    "BeitModel": ("BeitConfig", {**SMALL, "use_relative_position_bias": True}),
    "Data2VecVisionModel": (
        "Data2VecVisionConfig",
        {**SMALL, "use_shared_relative_position_bias": True, "use_mean_pooling": False},
    ),
    "CLIPVisionModel": ("CLIPVisionConfig", {**SMALL, "hidden_act": "gelu"}),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", SMALL),
    "SiglipVisionModel": ("SiglipVisionConfig", SMALL),
    "Dinov2Model": ("Dinov2Config", DINOV2),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", DINOV2),
    "DINOv3ViTModel": (
        "DINOv3ViTConfig",
        {**SMALL, "num_register_tokens": 2, "rope_theta": 50.0, "key_bias": True},
    ),
    "InternVLVisionModel": ("InternVLVisionConfig", {**SMALL, "attention_bias": True}),
    "SwinModel": ("SwinConfig", SWIN),
    "Swinv2Model": ("Swinv2Config", {**SWIN, "pretrained_window_sizes": [3, 2]}),
}


@functools.cache
def torch_model(name, **changes):
    """A model of transformers with random weights, norms and biases included."""
    import torch
    import transformers

    config, fields = CLASSES[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**{**fields, **changes}))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def saved(name, folder, **changes):
    """The folder that a model's own library writes, with an image processor's config."""
    torch_model(name, **changes).save_pretrained(folder)
    statistics = {"image_mean": HALF, "image_std": HALF, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return folder


def contents(folder):
    """Copies of the tensors in a folder, whose file may then be written anew."""
    return {n: np.array(t.load()) for n, t in open_container(folder).tensors.items()}


def reference(name, images, **changes):
    """Tokens after the final norm as the class has them."""
    import torch

    model = torch_model(name, **changes)
    model = getattr(model, "vision_model", getattr(model, "vit", model))
    pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
    size = {} if images.shape[1] == model.config.image_size else {"interpolate_pos_encoding": True}
    size = {} if any(word in name for word in ("Dino", "DINO", "Swin", "InternVL")) else size
    if "MAE" in name:  # which orders patches by random numbers before it masks none
        size = {"noise": torch.arange(9.0).expand(len(images), 9)}
    with torch.no_grad():
        tokens = model(pixels, **size).last_hidden_state
        if hasattr(model, "post_layernorm") and "CLIP" in name:
            tokens = model.post_layernorm(tokens)
    return tokens.numpy()


def features(spec, params, images):
    definition = spec.abstract()[0]
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda params, images: nnx.merge(definition, params)(images).tokens)
        return np.asarray(run(params["encoder"], images))


def difference(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def pictures(size):
    return np.random.default_rng(1).standard_normal((2, size, size, 3)).astype(np.float32)


@pytest.mark.parametrize("name", CLASSES)
def test_a_folder_of_transformers_gives_the_features_of_its_class(name, tmp_path):
    folder = saved(name, tmp_path / "hf")
    result = importing.read("auto", folder)
    size = result.spec.arch["image_size"]
    ours = features(result.spec, result.params, pictures(size))
    assert difference(ours, reference(name, pictures(size))) < TOLERANCE
    assert result.spec.mean == tuple(HALF) and result.spec.std == tuple(HALF)
    assert result.spec.origins["activation"] == "config.json: hidden_act"


@pytest.mark.parametrize(
    "name",
    [
        *("ViTModel", "CLIPVisionModel", "BeitModel", "Dinov2Model", "Dinov2WithRegistersModel"),
        "InternVLVisionModel",
    ],
)
def test_features_at_another_size_are_those_of_the_class(name, tmp_path):
    result = importing.read("auto", saved(name, tmp_path / "hf"), image_size=20)
    ours = features(result.spec, result.params, pictures(20))
    assert difference(ours, reference(name, pictures(20))) < TOLERANCE


def test_swin_v2_keeps_its_windows_at_another_size_as_the_class_does(tmp_path):
    """The class decides windows and shifts when it is made, timm and Microsoft for every size.

    Windows of 8 on grids 8 and 4 are not shifted, and clipped to 4 in the second stage.
    """
    folder = saved("Swinv2Model", tmp_path / "hf", window_size=8)
    importing.import_file("auto", folder, tmp_path / "model", image_size=64)
    spec, params = model_folder.load(tmp_path / "model")
    theirs = reference("Swinv2Model", pictures(64), window_size=8)
    assert difference(features(spec, params, pictures(64)), theirs) < TOLERANCE
    free = {name: value for name, value in spec.arch.items() if name != "windows_at"}
    other = dataclasses.replace(spec, arch=free)
    assert difference(features(other, params, pictures(64)), theirs) > 100 * TOLERANCE
    exporting.export("huggingface", tmp_path / "model", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["image_size"] == 32
    with pytest.raises(ConversionError, match="asks for windows that the size of its input deci"):
        exporting.export("timm", tmp_path / "model", tmp_path / "timm.safetensors")
    with pytest.raises(ConfigError, match="windows of 8, which an input of 32 px decides, do not"):
        spec.resized(params["encoder"], 16)


@pytest.mark.parametrize("name", [n for n in CLASSES if n != "ViTForImageClassification"])
def test_names_in_memory_are_read_as_those_in_files(name, tmp_path):
    import torch

    folder = saved(name, tmp_path / "hf")
    expected = importing.read("auto", folder)
    other = tmp_path / "memory"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(torch_model(name).state_dict(), other / "pytorch_model.bin")
    found = importing.read("auto", other)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert found.spec.arch == expected.spec.arch


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "student/module.backbone.", "state_dict/net.0."]
)
def test_what_stands_before_all_names_is_taken_off(prefix, tmp_path):
    import torch

    folder = saved("Dinov2Model", tmp_path / "hf")
    expected = importing.read("auto", folder)
    tensors = contents(folder)
    *levels, before = prefix.split("/")
    tree = {f"{before}{n}": torch.from_numpy(v) for n, v in tensors.items()}
    for level in reversed(levels):
        tree = {level: tree, "epoch": 3}
    torch.save(tree, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = importing.read("auto", folder)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert any(prefix in remark for remark in found.remarks)


def test_of_two_networks_in_a_file_one_has_to_be_named(tmp_path):
    folder = saved("Dinov2Model", tmp_path / "hf")
    tensors = contents(folder)
    both = {f"teacher.{n}": v for n, v in tensors.items()}
    both |= {f"student.{n}": 2 * v for n, v in tensors.items()}
    safetensors_io.write(folder / "model.safetensors", both, {"format": "pt"})
    with pytest.raises(ConversionError, match=r"holds 2 networks, below 'student\.', 'teacher\.'"):
        importing.read("auto", folder)
    found = importing.read("auto", folder, part="student")
    token = found.params["encoder"]["cls_token"]
    np.testing.assert_array_equal(token, 2 * tensors["embeddings.cls_token"])


# --- the four ways in which a file was once taken for another without a word


def changed(folder, name, **fields):
    """Another value in a file beside the weights."""
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("Swinv2Model", "window_size", 2),
        ("Swinv2Model", "pretrained_window_sizes", [0, 0]),
        ("Dinov2Model", "num_attention_heads", 8),
        ("DINOv3ViTModel", "rope_theta", 100.0),
        ("ViTModel", "layer_norm_eps", 1e-12),
        ("CLIPVisionModel", "hidden_act", "quick_gelu"),
    ],
)
def test_facts_are_those_of_the_config_and_others_give_other_features(name, field, value, tmp_path):
    """Negative control: the comparison with the class notices every fact of config.json."""
    folder = changed(saved(name, tmp_path / "hf"), "config.json", **{field: value})
    result = importing.read("auto", folder)
    size = result.spec.arch["image_size"]
    ours = features(result.spec, result.params, pictures(size))
    assert difference(ours, reference(name, pictures(size))) > 100 * TOLERANCE
    assert difference(ours, reference(name, pictures(size), **frozen(field, value))) < TOLERANCE


def frozen(field, value):
    return {field: tuple(value) if isinstance(value, list) else value}


def test_statistics_are_those_of_the_preprocessor(tmp_path):
    folder = saved("ViTModel", tmp_path / "hf")
    other = [0.1, 0.2, 0.3]
    changed(folder, "preprocessor_config.json", image_mean=other, rescale_factor=1 / 127.5)
    spec = importing.read("auto", folder).spec
    assert spec.mean == tuple(other) and spec.pixel_scale == 1 / 127.5
    assert spec.origins["mean"] == "preprocessor_config.json: image_mean"


def test_a_named_source_is_refused_where_the_files_say_otherwise(tmp_path):
    import transformers

    config = transformers.Dinov2Config(num_hidden_layers=12, hidden_size=384, image_size=518)
    model = transformers.Dinov2Model(config)
    model.save_pretrained(tmp_path / "hf")  # 12 heads, where the published network has 6
    with pytest.raises(ConversionError, match="num_attention_heads is 12, but .* heads 6"):
        importing.read("dinov2_vits14_hf", tmp_path / "hf")


# --- questions


def alone(folder):
    """The weights without anything beside them."""
    path = folder.parent / "weights.safetensors"
    shutil.copy(folder / "model.safetensors", path)
    return path


@pytest.mark.parametrize("name", ["ViTModel", "Swinv2Model", "DINOv3ViTModel"])
def test_what_nobody_tells_is_asked_for(name, tmp_path):
    path = alone(saved(name, tmp_path / "hf"))
    with pytest.raises(ConversionError, match="No tensor, and no file beside it, tells") as caught:
        importing.read("auto", path)
    message = str(caught.value)
    for fact in ("activation", "norm_eps", "mean", "std"):
        assert fact in message
    assert ("window" in message) == (name == "Swinv2Model")
    assert ("rope_theta" in message) == (name == "DINOv3ViTModel")


def test_stated_facts_answer_and_are_kept_with_their_origin(tmp_path):
    folder = saved("ViTModel", tmp_path / "hf")
    expected = importing.read("auto", folder)
    stated = [
        "heads=4",
        "activation=gelu_erf",
        "norm_eps=0.001",
        "mean=0.5,0.4,0.6",
        "std=0.5,0.4,0.6",
        "position_resize=size",
    ]
    found = importing.read("auto", alone(folder), facts=stated)
    assert found.spec.arch == expected.spec.arch
    assert set(found.spec.origins.values()) == {"--fact"}


def test_a_stated_fact_overrules_a_config_and_no_tensor(tmp_path):
    folder = saved("ViTModel", tmp_path / "hf")
    spec = importing.read("auto", folder, facts=["heads=8", "mean=0,0,0", "mlp_width=96"]).spec
    assert spec.arch["heads"] == 8 and spec.mean == (0, 0, 0)
    assert spec.origins["heads"] == (
        "stated by the user, against 4 (config.json: num_attention_heads)"
    )
    assert spec.origins["mean"].startswith("stated by the user, against (0.5, 0.4, 0.6) (preproc")
    for fact, tensors in {"mlp_width=64": 96, "cls_token=no": True, "registers=1": 0}.items():
        with pytest.raises(ConversionError, match=f"but {tensors} .the tensors."):
            importing.read("auto", folder, facts=[fact])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heads", "expected NAME=VALUE"),
        ("noses=3", "expected NAME=VALUE with a name of image_size, heads"),
        ("heads=many", "'many' is no heads"),
        ("gated_mlp=maybe", "'maybe' is no gated_mlp; expected yes or no"),
    ],
)
def test_facts_that_cannot_be_read_are_refused(text, message, tmp_path):
    with pytest.raises(ConversionError, match=message):
        importing.read("auto", saved("ViTModel", tmp_path / "hf"), facts=[text])


def test_facts_are_refused_with_a_source_that_has_them(tmp_path):
    path = alone(saved("ViTModel", tmp_path / "hf"))
    with pytest.raises(ConversionError, match="--source=dino_vitb16 has all facts"):
        importing.read("dino_vitb16", path, facts=["heads=4"])


# --- refusals


def test_a_network_of_a_known_style_is_described_and_its_problems_are_listed(tmp_path):
    folder = saved("Dinov2Model", tmp_path / "hf")
    tensors = contents(folder)
    tensors["encoder.layer.0.attention.q_norm.weight"] = np.ones(32, np.float32)
    del tensors["encoder.layer.1.norm1.bias"]
    safetensors_io.write(folder / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(ConversionError) as caught:
        importing.read("auto", folder)
    message = str(caught.value)
    assert "transformers' Dinov2Model, 32 x 2, patch 4, 12 px" in message
    assert "missing encoder.layer.1.norm1.bias" in message
    assert "unexpected encoder.layer.0.attention.q_norm.weight" in message


def test_a_config_of_another_class_is_refused(tmp_path):
    folder = saved("Dinov2Model", tmp_path / "hf")
    changed(folder, "config.json", model_type="swin")
    with pytest.raises(ConversionError, match="model_type 'swin', but the tensors have the names"):
        importing.read("auto", folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 64, "width is 32 .the tensors., but 64 .config.json: hidden_size"),
        ("num_hidden_layers", 3, "depth is 2 .the tensors., but 3"),
        ("hidden_act", "tanh", "hidden_act is 'tanh'; expected one of 'gelu'"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(field, value, message, tmp_path):
    folder = saved("Dinov2Model", tmp_path / "hf")
    changed(folder, "config.json", **{field: value})
    with pytest.raises(ConversionError, match=message):
        importing.read("auto", folder)


@pytest.mark.parametrize(
    ("field", "value", "ours"),
    [("norm_type", "rms_norm", "'layer_norm'"), ("use_qk_norm", True, "False")],
)
def test_an_internvl_with_other_norms_is_refused(field, value, ours, tmp_path):
    folder = changed(saved("InternVLVisionModel", tmp_path / "hf"), "config.json", **{field: value})
    with pytest.raises(ConversionError, match=f"{field} {value!r}; networks here have {ours}"):
        importing.read("auto", folder)


def test_an_epsilon_that_only_some_norms_of_a_swin_would_have_is_refused(tmp_path):
    folder = changed(saved("SwinModel", tmp_path / "hf"), "config.json", layer_norm_eps=1e-6)
    with pytest.raises(ConversionError, match="layer_norm_eps 1e-06; networks here have 1e-05"):
        importing.read("auto", folder)


# --- what follows an import


@pytest.mark.parametrize("name", ["DeiTModel", "Dinov2Model", "Swinv2Model", "CLIPVisionModel"])
def test_verify_compares_with_the_model_of_the_own_config(name, tmp_path):
    folder = saved(name, tmp_path / "hf")
    importing.import_file("auto", folder, tmp_path / "model")
    compared = verifying.verify("auto", folder, tmp_path / "model")
    assert compared.agrees and compared.untouched
    spec, params = model_folder.load(tmp_path / "model")
    wrong = dataclasses.replace(spec, arch={**spec.arch, "activation": "quick_gelu"})
    model_folder.save(tmp_path / "wrong", wrong, params)
    assert not verifying.verify("auto", folder, tmp_path / "wrong").agrees


@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "Dinov2Model", "SwinModel", "InternVLVisionModel"]
)
def test_export_gives_the_tensors_back(name, tmp_path):
    folder = saved(name, tmp_path / "hf")
    importing.import_file("auto", folder, tmp_path / "model")
    exporting.export("source", tmp_path / "model", tmp_path / "back.safetensors")
    before = open_container(folder).tensors
    written = safetensors_io.read(tmp_path / "back.safetensors").tensors
    assert set(written) == {name for name in before if "mask_token" not in name}
    for key, tensor in written.items():
        np.testing.assert_array_equal(tensor.load(), before[key].load(), err_msg=key)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("prefix", ["module.", "student/module.backbone."])
def test_the_source_is_given_back_under_its_whole_names(prefix, memory, tmp_path):
    """Below two nestings, with a head beside the network and with the names of memory."""
    import torch

    name = "ViTForImageClassification"
    folder = saved(name, tmp_path / "hf")
    tensors = torch_model(name).state_dict() if memory else contents(folder)
    tensors = {n: torch.tensor(np.asarray(v)) for n, v in tensors.items()}
    *levels, before = prefix.split("/")
    tree = {f"{before}{n}": value for n, value in tensors.items()}
    for level in levels:
        tree = {level: tree}
    torch.save(tree, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    importing.import_file("auto", folder, tmp_path / "model")
    exporting.export("source", tmp_path / "model", tmp_path / "back.safetensors")
    back = safetensors_io.read(tmp_path / "back.safetensors").tensors
    assert set(back) == {f"{prefix}{n}" for n in tensors}
    for key, tensor in back.items():
        np.testing.assert_array_equal(tensor.load(), tensors[key.removeprefix(prefix)], key)
    spec = model_folder.load_spec(tmp_path / "model")
    assert spec.source_names[""] == f"{prefix}vit." and spec.source_names["../"] == prefix


# The class that opens what came from another one.
OPENED_AS = {
    "ViTMSNModel": "ViTModel",
    "ViTMAEModel": "ViTModel",
    "IJepaModel": "SiglipVisionModel",
    "Data2VecVisionModel": "BeitModel",
}
# Tensors that no network here has.
NOT_KEPT = ("pooler.dense", "mask_token", "position_ids", "relative_position_index", "decoder")


@pytest.mark.parametrize("name", CLASSES)
def test_a_folder_of_transformers_goes_back_to_its_class(name, tmp_path):
    """Its class opens it with every key, and its tensors are those it had, bit for bit."""
    import transformers

    folder = saved(name, tmp_path / "hf")
    importing.import_file("auto", folder, tmp_path / "model")
    written = exporting.export("huggingface", tmp_path / "model", tmp_path / "back")
    assert not written.left
    kind = OPENED_AS.get(name, name)
    assert f"transformers.{kind}.from_pretrained('{tmp_path}/back')" in written.remarks[0]
    model, info = getattr(transformers, kind).from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    lost = {key for keys in info.values() for key in keys}
    assert not {key for key in lost if not any(word in key for word in NOT_KEPT)}, info
    before, after = torch_model(name).state_dict(), model.state_dict()
    changed = ("distillation_token", "position_embeddings") if name == "DeiTModel" else ()
    kept = {n for n in before if not any(word in n for word in (*NOT_KEPT, *changed))}
    assert kept <= after.keys() or kind != name
    for key in kept & after.keys():
        np.testing.assert_array_equal(after[key].numpy(), before[key].numpy(), err_msg=key)
    images = pictures(np.ravel(model.config.image_size)[0])  # InternVL's is a pair
    ours = importing.read("auto", tmp_path / "back")
    found = features(ours.spec, ours.params, images)
    assert difference(found, reference(name, images)) < TOLERANCE
    assert ours.spec.mean == tuple(HALF)


def test_the_distillation_token_of_a_deit_keeps_its_head(tmp_path):
    """One of two heads is kept; the token's position is added to it, and the command says so."""
    import torch
    import transformers

    config = transformers.DeiTConfig(**SMALL, num_labels=3)
    torch.manual_seed(0)
    model = transformers.DeiTForImageClassificationWithTeacher(config).eval()
    model.save_pretrained(tmp_path / "hf")
    statistics = {"image_mean": HALF, "image_std": HALF, "rescale_factor": 1 / 255}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(statistics))
    importing.import_file("auto", tmp_path / "hf", tmp_path / "model")
    written = exporting.export("huggingface", tmp_path / "model", tmp_path / "back")
    assert any("sum of themselves and their positions" in line for line in written.remarks)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "back").eval()
    assert type(again).__name__ == "DeiTForImageClassification"
    pixels = torch.from_numpy(np.moveaxis(pictures(12), -1, 1).copy())
    with torch.no_grad():
        np.testing.assert_array_equal(again(pixels).logits, model(pixels).cls_logits)
    back = open_container(tmp_path / "back").tensors
    assert not back["deit.embeddings.position_embeddings"].load()[:, 1].any()


def test_internvl_is_taken_out_of_its_model_and_written_for_its_own_class(tmp_path):
    """Of a model that also speaks; with a norm at the end, and no biases of q, k and v."""
    import torch
    import transformers

    changes = {"use_mean_pooling": False, "attention_bias": False}
    folder = saved("InternVLVisionModel", tmp_path / "hf", **changes)
    tensors = contents(folder)
    whole = {f"model.vision_tower.{name}": value for name, value in tensors.items()}
    whole["model.language_model.layers.0.mlp.up_proj.weight"] = np.ones((3, 2), np.float32)
    safetensors_io.write(folder / "model.safetensors", whole, {"format": "pt"})
    vision = json.loads((folder / "config.json").read_text())
    text = json.dumps({"model_type": "internvl", "vision_config": vision})
    (folder / "config.json").write_text(text)
    importing.import_file("auto", folder, tmp_path / "model")
    exporting.export("huggingface", tmp_path / "model", tmp_path / "back")
    back = contents(tmp_path / "back")
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)
    model = transformers.AutoModel.from_pretrained(tmp_path / "back").eval()
    assert type(model).__name__ == "InternVLVisionModel"
    with torch.no_grad():
        pixels = torch.from_numpy(np.moveaxis(pictures(12), -1, 1).copy())
        found = model(pixels).last_hidden_state.numpy()
    expected = reference("InternVLVisionModel", pictures(12), **changes)
    np.testing.assert_array_equal(found, expected)


def test_the_command_says_where_every_fact_is_from(tmp_path, capsys):
    folder = saved("ViTModel", tmp_path / "hf")
    out = tmp_path / "model"
    assert cli.main(["import", f"--input={folder}", f"--output={out}"]) == 0
    printed = capsys.readouterr().out
    assert "as hf_vit" in printed
    assert "mean, std, pixel_scale" not in printed  # each has a line of its own field
    assert "heads: config.json: num_attention_heads" in printed
    assert Path(out, "model.json").exists()
