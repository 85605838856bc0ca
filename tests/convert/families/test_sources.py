"""Every source, shrunk: a file of the real structure gives the features of the torch model."""

import dataclasses
import functools
import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fd_jax import inference, model_folder
from fd_jax.convert import exporting, families, importing
from fd_jax.convert.containers import safetensors_io
from fd_jax.convert.containers.opening import open_container
from fd_jax.convert.trees import flat
from fd_jax.errors import ConversionError
from fd_jax.models.spec import ModelSpec
from tests.convert import oracles, synthetic

TOLERANCE = 1e-5
NAMES = synthetic.names()
PARTS = [(name, part) for name in NAMES for part in families.SOURCES[name].parts]
# One source per table of rules.
VITS = (
    "openai_clip_vit_b16",
    "hf_clip_vit_base_patch16",
    "dino_vitb16",
    "dinov2_vitb14_reg4",
    "dinov2_vitb14_hf",
    "dinov3_vitb16",
    "dinov3_vitb16_hf",
    "siglip2_base_patch16_224_bigvision",
    "siglip2_base_patch16_224_hf",
    "fd_official_distilled_clip_vit_b",
    "timm_beit_base_patch16_224",
)
SWINS = (
    "swin_base_patch4_window7_224_hf",
    "swinv2_base_patch4_window8_256_hf",
    "timm_swin_base_patch4_window7_224",
    "timm_swinv2_base_window8_256",
    "swinv2_large_patch4_window12to16_192to256_22kto1k_ft",
)
# What transformers has no class for.
ALONE = ("esvit_swin_base_w14", "swinv2_giant")
TABLES = (*VITS, *SWINS, *ALONE)


@pytest.fixture(autouse=True)
def precise(monkeypatch):
    """Float32 products in full, and sources of shrunk files in the place of the real ones."""
    for name in NAMES:
        monkeypatch.setitem(families.SOURCES, name, _small(name))
    with jax.default_matmul_precision("highest"):
        yield


_small = functools.cache(synthetic.small_source)


@functools.cache
def _trees(name, variant=None):
    given = synthetic.structure(name, variant=variant)
    return given, synthetic.values(given)


@functools.cache
def _images(size):
    return np.random.default_rng(1).standard_normal((2, size, size, 3)).astype(np.float32)


@functools.cache
def _definition(family, arch):
    return ModelSpec(family, json.loads(arch)).abstract()[0]


@functools.partial(jax.jit, static_argnums=0)
def _run(definition, params, images):
    return nnx.merge(definition, params)(images).tokens


def features(spec, params, images):
    """Our features, or our logits where the network is a classifier on the mean patch."""
    definition = _definition(spec.family, json.dumps(spec.arch))
    tokens = np.asarray(_run(definition, params["encoder"], images))
    if "head" in params and spec.pooling == "mean":
        return tokens.mean(axis=1) @ params["head"]["kernel"] + params["head"]["bias"]
    if "fc_norm" not in params:
        return tokens
    mean = tokens[:, 1:].mean(axis=1)
    mean = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
    mean = mean * params["fc_norm"]["scale"] + params["fc_norm"]["bias"]
    return mean @ params["head"]["kernel"] + params["head"]["bias"]


def difference(ours, reference):
    """Largest difference, relative to the largest value."""
    return np.abs(ours - reference).max() / np.abs(reference).max()


def imported(name, part, folder, variant=None):
    """A shrunk file of a source, imported in memory, with the values in it."""
    given, trees = _trees(name, variant)
    path = synthetic.write(given, trees, folder)
    return importing.read(name, path, part=part), trees


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_features_of_every_source_equal_those_of_torch(name, part, tmp_path):
    result, trees = imported(name, part, tmp_path)
    images = _images(result.spec.arch["image_size"])
    oracle, tensors = oracles.reference(name, part, trees)
    expected = oracle(tensors, result.spec.arch, images, tmp_path / "torch")
    assert difference(features(result.spec, result.params, images), expected) < TOLERANCE


def test_stacked_and_separate_blocks_are_both_read(tmp_path):
    name = "siglip2_base_patch16_224_bigvision"
    result, trees = imported(name, None, tmp_path, variant="per block")
    images = _images(result.spec.arch["image_size"])
    expected = oracles.siglip_big_vision(trees[""], result.spec.arch, images, tmp_path / "torch")
    assert difference(features(result.spec, result.params, images), expected) < TOLERANCE


def test_deit_head_on_the_class_token_gives_the_logits_of_torch(tmp_path):
    name = "deit_base_patch16_224"
    result, trees = imported(name, None, tmp_path)
    images = _images(result.spec.arch["image_size"])
    expected = oracles.vit_logits(trees["model"], result.spec.arch, images, tmp_path / "torch")
    head = result.params["head"]
    tokens = features(result.spec, result.params, images)
    assert difference(tokens[:, 0] @ head["kernel"] + head["bias"], expected) < TOLERANCE
    assert result.spec.classes == expected.shape[1] == 5


def test_fd_projector_is_a_one_by_one_convolution(tmp_path):
    import torch

    result, trees = imported("fd_official_distilled_clip_vit_b", None, tmp_path)
    images = _images(result.spec.arch["image_size"])
    tokens = features(result.spec, result.params, images)
    weight, bias = (torch.from_numpy(trees["model"][f"decoder.0.{p}"]) for p in ("weight", "bias"))
    expected = torch.nn.functional.conv1d(
        torch.from_numpy(tokens.transpose(0, 2, 1).copy()), weight, bias
    )
    projector = result.params["projector"]
    ours = tokens @ projector["kernel"] + projector["bias"]
    assert difference(ours, expected.numpy().transpose(0, 2, 1)) < TOLERANCE


@pytest.mark.parametrize("name", TABLES)
def test_the_feature_comparison_fails_for_every_wrong_rule(name, tmp_path):
    """Negative control: every kind of parameter, put the wrong way round, fails the tolerance."""
    result, trees = imported(name, None, tmp_path)
    images = _images(result.spec.arch["image_size"])
    right = features(result.spec, result.params, images)
    seen = flat(result.params)
    for path in seen:
        again = "blocks/1/" in path and "extra_norm" not in path
        # A constant on all keys changes no softmax; the projector is not in the features.
        if again or path.endswith("k_bias") or path.startswith("projector"):
            continue
        wrong = _reversed_at(result.params, path)
        assert difference(features(result.spec, wrong, images), right) > 10 * TOLERANCE, path


def _reversed_at(params, path):
    first, _, rest = path.partition("/")
    changed = _reversed_at(params[first], rest) if rest else np.flip(params[first]).copy()
    return {**params, first: changed}


@pytest.mark.parametrize("name", (*VITS, "esvit_swin_base_w14", SWINS[-1]))
@pytest.mark.parametrize("fact", ["activation", "norm_eps"])
def test_the_feature_comparison_fails_for_a_wrong_activation_or_epsilon(name, fact, tmp_path):
    """Negative control: what no key tells must still be right."""
    given, trees = _trees(name)
    # Small embeddings: the first norms then depend on their epsilon.
    faint = {
        tree: {n: v * np.asarray(0.02, v.dtype) if _embeds(n) else v for n, v in tensors.items()}
        for tree, tensors in trees.items()
    }
    result = importing.read(name, synthetic.write(given, faint, tmp_path))
    arch = result.spec.arch
    images = _images(arch["image_size"])
    part = _small(name).default_part
    oracle, tensors = oracles.reference(name, part, faint)
    expected = oracle(tensors, arch, images, tmp_path / "torch")
    others = {
        "activation": [a for a in ("gelu_erf", "gelu_tanh", "quick_gelu") if a != arch[fact]],
        "norm_eps": [1e-5 if arch["norm_eps"] == 1e-6 else 1e-6],
    }
    assert difference(features(result.spec, result.params, images), expected) < TOLERANCE
    for value in others[fact]:
        spec = dataclasses.replace(result.spec, arch={**arch, fact: value})
        assert difference(features(spec, result.params, images), expected) > TOLERANCE


def _embeds(name):
    words = ("patch_embed", "conv1", "cls_token", "class_embedding", "pos", "embedding", "tokens")
    return any(word in name for word in words) and "index" not in name


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_round_trip_gives_every_tensor_back_bit_for_bit(name, part, tmp_path):
    given, trees = _trees(name)
    path = synthetic.write(given, trees, tmp_path)
    importing.import_file(name, path, tmp_path / "model", part=part)
    exporting.export("source", tmp_path / "model", tmp_path / "back.safetensors")
    written = safetensors_io.read(tmp_path / "back.safetensors").tensors
    source = _small(name)
    _, originals = source.match(open_container(path), part)
    taken = {n for step in source.match(open_container(path), part)[0].steps for n in step.names}
    names = {originals[name].name: name for name in taken}
    assert set(written) == set(names)
    for key, tensor in written.items():
        before = originals[names[key]]
        assert (tensor.shape, tensor.dtype) == (before.shape, before.dtype), key
        expected = before.load()
        if name in ("dinov3_vitb16", "dinov3_vits16") and key.endswith("qkv.bias"):
            expected = (
                expected * originals[f"{names[key]}_mask"].load()
            )  # what the source masks out
        np.testing.assert_array_equal(tensor.load(), expected, err_msg=key)


@pytest.mark.parametrize("name", [*VITS, *SWINS, "deit_base_patch16_224", "dinov2_vits14"])
def test_export_to_huggingface_opens_with_the_same_features(name, tmp_path):
    import transformers

    result, _ = imported(name, None, tmp_path)
    model_folder.save(tmp_path / "model", result.spec, result.params)
    exporting.export("huggingface", tmp_path / "model", tmp_path / "hf")
    model, info = transformers.AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    # AutoModel takes the bare network: its own pooler is new, a classifier's head is left over.
    allowed = {"pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert not {key for keys in info.values() for key in keys} - allowed, info
    model.eval()
    images = _images(result.spec.arch["image_size"])
    if "fc_norm" in result.params or result.spec.pooling == "mean":
        classifier = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf")
        expected = oracles.run(lambda x: classifier.eval()(x).logits, images)
    elif result.spec.arch.get("ln_pre"):
        norm = getattr(model, "vision_model", model).post_layernorm
        expected = oracles.run(lambda x: norm(model(x).last_hidden_state), images)
    else:
        expected = oracles.run(lambda x: model(x).last_hidden_state, images)
    assert difference(features(result.spec, result.params, images), expected) < TOLERANCE
    pixels = np.random.default_rng(3).integers(0, 256, images.shape, np.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    theirs = processor(list(pixels), return_tensors="np")["pixel_values"]
    ours = np.asarray(result.spec.normalize(pixels))
    np.testing.assert_allclose(np.moveaxis(theirs, 1, -1), ours, atol=1e-5)


@pytest.mark.parametrize("named", [True, False])
def test_folders_of_huggingface_hold_the_class_names_and_give_them_back(named, tmp_path):
    import transformers

    name = "swin_base_patch4_window7_224_hf"
    result, _ = imported(name, None, tmp_path)
    assert result.spec.class_names is None  # the file is alone
    names = [f"animal {i}" for i in range(result.spec.classes)]
    names[1] = ""  # an output that no class was trained on
    spec = dataclasses.replace(result.spec, class_names=names if named else None)
    model_folder.save(tmp_path / "model", spec, result.params)
    exporting.export("huggingface", tmp_path / "model", tmp_path / "hf")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    shown = [n or "LABEL_1" for n in names] if named else [f"LABEL_{i}" for i in range(len(names))]
    assert theirs.id2label == dict(enumerate(shown))
    assert theirs.label2id == {label: i for i, label in enumerate(shown)}
    assert importing.read(name, tmp_path / "hf").spec.class_names == spec.class_names


@pytest.mark.parametrize(
    "name", ["fd_official_distilled_clip_vit_b", "fd_official_distilled_esvit_swin_b"]
)
def test_official_export_has_exactly_the_original_keys(name, tmp_path):
    import torch

    result, trees = imported(name, None, tmp_path)
    model_folder.save(tmp_path / "model", result.spec, result.params)
    written = exporting.export("official", tmp_path / "model", tmp_path / "student.pth")
    assert written.left == ["projector/bias", "projector/kernel"]
    written = torch.load(tmp_path / "student.pth", weights_only=True)
    assert list(written) == ["model"]
    expected = {n: v for n, v in trees["model"].items() if n.startswith("encoder.")}
    assert set(written["model"]) == set(expected)
    for key, value in written["model"].items():
        assert value.numpy().dtype == expected[key].dtype
        close = 1e-6 if key.endswith("coords_table") else 0  # which torch computes in float32
        np.testing.assert_allclose(value.numpy(), expected[key], rtol=close, err_msg=key)


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("dino_vitb16", ""),
        ("deit_base_patch16_224", "model"),
        ("dinov2_vitb14", ""),
        ("timm_beit_base_patch16_224", ""),
        ("fd_official_distilled_dino_vit_b", "model"),
        ("timm_swin_base_patch4_window7_224", ""),
        ("timm_swinv2_base_window8_256", ""),
    ],
)
def test_export_to_timm_uses_its_names(name, tree, tmp_path):
    result, trees = imported(name, None, tmp_path)
    model_folder.save(tmp_path / "model", result.spec, result.params)
    exporting.export("timm", tmp_path / "model", tmp_path / "timm")
    written = open_container(tmp_path / "timm").tensors
    expected = {
        n.removeprefix("encoder."): v
        for n, v in trees[tree].items()
        if not n.startswith(("feature_model.", "decoder.", "mask_token"))
        and not n.endswith("relative_position_index")
    }
    assert set(written) == set(expected)
    for key, tensor in written.items():
        np.testing.assert_array_equal(tensor.load(), expected[key], err_msg=key)


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("esvit_swin_base_w14", "SwinModel.* asks for grids no smaller than the window"),
        ("swinv2_giant", "Swinv2Model.* asks for no norms on the main branch"),
    ],
)
def test_swins_that_transformers_computes_otherwise_are_refused(name, lacks, tmp_path):
    result, _ = imported(name, None, tmp_path)
    model_folder.save(tmp_path / "model", result.spec, result.params)
    with pytest.raises(ConversionError, match=lacks):
        exporting.export("huggingface", tmp_path / "model", tmp_path / "hf")


def test_swin_export_to_timm_and_back_keeps_every_value(tmp_path):
    """EsViT's file and timm's have merging norms in different stages."""
    result, _ = imported("swinv2_base_patch4_window8_256", None, tmp_path)
    model_folder.save(tmp_path / "model", result.spec, result.params)
    exporting.export("timm", tmp_path / "model", tmp_path / "timm")
    again = importing.read("auto", tmp_path / "timm")
    jax.tree.map(np.testing.assert_array_equal, again.params, result.params)


def test_swin_v1_bias_tables_are_resized_for_a_smaller_image(tmp_path):
    """At half the size the second grid fits its window, and the fourth is a single token."""
    given, trees = _trees("esvit_swin_base_w14")
    path = synthetic.write(given, trees, tmp_path)
    result = importing.read("esvit_swin_base_w14", path, image_size=32)
    tables = {
        path.split("/")[2]: (before[0], after[0])
        for path, (before, after) in result.resized.items()
    }
    assert tables == {"2": (7**2, 3**2), "3": (3**2, 1)}


def test_a_layout_that_cannot_hold_a_network_is_refused(tmp_path):
    result, _ = imported("dinov2_vitb14_reg4", None, tmp_path)
    spec = dataclasses.replace(result.spec, pixel_scale=1.0)
    model_folder.save(tmp_path / "model", spec, result.params)
    with pytest.raises(ConversionError, match="timm asks for pixels scaled by 1/255"):
        exporting.export("timm", tmp_path / "model", tmp_path / "timm")
    with pytest.raises(ConversionError, match="official asks for a shared relative position table"):
        exporting.export("official", tmp_path / "model", tmp_path / "student.pth")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.pth"]


def test_stablehlo_export_computes_the_same_from_uint8_images(tmp_path):
    result, _ = imported("fd_official_distilled_clip_vit_b", None, tmp_path)
    model_folder.save(tmp_path / "model", result.spec, result.params)
    exporting.export("stablehlo", tmp_path / "model", tmp_path / "model.stablehlo")
    exported = jax.export.deserialize((tmp_path / "model.stablehlo").read_bytes())
    pixels = np.random.default_rng(2).integers(0, 256, (3, 12, 12, 3), np.uint8)
    ours = features(result.spec, result.params, np.asarray(result.spec.normalize(pixels)))
    assert difference(np.asarray(exported.call(jnp.asarray(pixels))), ours) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("openai_clip_vit_b16", 5),
        ("deit_base_patch16_224", 2),
        ("dinov2_vitb14_hf", 3),
        ("dinov2_vitb14_reg4", 7),
    ],
)
def test_features_at_another_image_size_equal_those_of_torch(name, grid, tmp_path):
    """Positions resized at import equal transformers' own interpolation at that size."""
    given, trees = _trees(name)
    size = grid * synthetic.SMALL["patch_size"]
    path = synthetic.write(given, trees, tmp_path)
    result = importing.read(name, path, image_size=size)
    assert list(result.resized) == ["encoder/pos_embed"]
    small = _small(name)
    oracle, tensors = oracles.reference(name, small.default_part, trees)
    native = small.parts[small.default_part].spec.arch
    images = _images(size)
    expected = oracle(tensors, native, images, tmp_path / "torch", **_interpolate(oracle))
    assert difference(features(result.spec, result.params, images), expected) < TOLERANCE


def _interpolate(oracle):
    # The DINOv2 classes interpolate without being asked.
    return {} if "dinov2" in oracle.__name__ else {"interpolate_pos_encoding": True}


@pytest.mark.parametrize("name", ["dino_vitb16", "dinov2_vitb14"])
def test_scale_factor_sources_resize_as_their_own_code(name, tmp_path):
    import torch

    given, trees = _trees(name)
    arch = _small(name).parts["backbone"].spec.arch
    before, after = arch["image_size"] // 4, 7
    table = torch.from_numpy(trees[""]["pos_embed"])
    patches = table[:, 1:].reshape(1, before, before, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        patches, scale_factor=(after + 0.1) / before, mode="bicubic"
    )
    flat = resized.permute(0, 2, 3, 1).reshape(1, after * after, -1)
    expected = torch.cat([table[:, :1], flat], dim=1).numpy()
    path = synthetic.write(given, trees, tmp_path)
    result = importing.read(name, path, image_size=4 * after)
    assert difference(result.params["encoder"]["pos_embed"], expected) < TOLERANCE


def test_a_hugging_face_config_has_to_agree_with_the_source(tmp_path):
    name = "hf_clip_vit_base_patch16"
    given, trees = _trees(name)
    synthetic.write(given, trees, tmp_path)
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "image_size": 12,
        "patch_size": 4,
    }
    config = {"model_type": "clip", "vision_config": fields | {"hidden_act": "quick_gelu"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert importing.read(name, tmp_path).spec.arch["activation"] == "quick_gelu"
    config["vision_config"]["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConversionError, match="hidden_act is gelu_erf, but .* activation quick_gelu"
    ):
        importing.read(name, tmp_path)


def test_half_precision_storage_keeps_float16_sources_exact(tmp_path):
    name = "openai_clip_vit_b16"
    given, trees = _trees(name)
    path = synthetic.write(given, trees, tmp_path)
    result = importing.read(name, path, dtype="bfloat16")
    kernel = result.params["encoder"]["blocks"]["0"]["mlp"]["fc1"]["kernel"]
    assert kernel.dtype.name == "bfloat16"
    assert result.spec.source_dtypes["visual.conv1.weight"] == "float16"


def test_blocks_beyond_ten_stay_in_order(tmp_path, monkeypatch):
    """Sorted as text, 10 comes before 2: nothing on the way may go by that order."""
    monkeypatch.setitem(synthetic.SMALL, "depth", 12)
    name = "deit_base_patch16_224"
    monkeypatch.setitem(families.SOURCES, name, synthetic.small_source(name))
    given = synthetic.structure(name)
    trees = synthetic.values(given)
    path = synthetic.write(given, trees, tmp_path)
    importing.import_file(name, path, tmp_path / "model")
    model = inference.load_model(tmp_path / "model")
    images = _images(12)
    oracle, tensors = oracles.reference(name, "classifier", trees)
    expected = oracle(tensors, model.spec.arch, images, tmp_path / "torch")
    assert difference(np.asarray(model(images).tokens), expected) < TOLERANCE


def _as(tree_path, prefix=""):
    """Nests and prefixes the single tree of a structure, and puts it into a torch file."""

    def change(given, trees):
        tensors = {f"{prefix}{n}": v for n, v in trees[""].items()}
        return dataclasses.replace(given, container="torch"), {tree_path: tensors}

    return change


def _with_classifier(given, trees):
    tensors = {f"dinov2.{n}": v for n, v in trees[""].items()}
    tensors["classifier.weight"] = np.zeros((5, 64), np.float32)
    tensors["classifier.bias"] = np.zeros(5, np.float32)
    return given, {"": tensors}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("openai_clip_vit_b16", _as(""), id="state dict saved again"),
        pytest.param("open_clip_vit_b16_laion2b", _as("state_dict", "module."), id="own training"),
        pytest.param("hf_clip_vit_base_patch16", _as(""), id="pytorch_model.bin"),
        pytest.param("timm_beit_base_patch16_224", _as("module"), id="BEiT v2's nesting"),
        pytest.param("dinov2_vitb14_hf", _with_classifier, id="classification repository"),
    ],
)
def test_other_forms_of_the_same_file_are_read_alike(name, change, tmp_path):
    given, trees = _trees(name)
    expected = importing.read(name, synthetic.write(given, trees, tmp_path)).params
    given, trees = change(given, trees)
    other = tmp_path / "other"
    other.mkdir()
    found = importing.read(name, synthetic.write(given, trees, other)).params
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", ["hf_clip_vit_base_patch16", "open_clip_vit_b16_laion2b"])
def test_keys_that_only_old_files_have_are_dropped(name, tmp_path):
    given = synthetic.structure(name, optional=True)
    assert len(given.trees[""]) > len(synthetic.structure(name).trees[""])
    result = importing.read(name, synthetic.write(given, synthetic.values(given), tmp_path))
    kept = importing.read(name, synthetic.write(*_trees(name), tmp_path))
    assert sum(map(len, result.dropped.values())) > sum(map(len, kept.dropped.values()))


def test_an_uninitialised_bias_mask_is_refused(tmp_path):
    given, trees = _trees("dinov3_vitb16")
    nan = {n: v * np.nan if n.endswith("bias_mask") else v for n, v in trees[""].items()}
    path = synthetic.write(given, {"": nan}, tmp_path)
    with pytest.raises(ConversionError, match="bias_mask does not hold the values"):
        importing.read("dinov3_vitb16", path)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (
            "fd_official_distilled_dino_vit_b",
            "encoder.rel_pos_bias.relative_position_index",
        ),
        (
            "fd_official_distilled_esvit_swin_b",
            "encoder.layers.2.blocks.0.attn.relative_position_index",
        ),
        (
            "fd_official_distilled_esvit_swin_b",
            "encoder.layers.0.blocks.1.attn_mask",
        ),
        (
            "fd_official_distilled_esvit_swin_b",
            "encoder.layers.3.blocks.0.attn.relative_coords_table",
        ),
    ],
)
def test_wrong_values_of_what_the_architecture_gives_are_refused(name, key, tmp_path):
    given, trees = _trees(name)
    wrong = {"model": {**trees["model"], key: trees["model"][key][::-1].copy()}}
    if wrong["model"][key].shape[0] == 1:
        wrong["model"][key] = trees["model"][key][:, ::-1].copy()
    with pytest.raises(ConversionError, match=f"{key} does not hold"):
        importing.read(name, synthetic.write(given, wrong, tmp_path))
