"""Folders for timm: what its `create_model` makes of them, and what the import makes of them.

`opened/` holds what timm made of the folder of every network in `exported`: the config with which
it was opened, the names and shapes of the model's own state_dict, and outputs for one picture.
`python -m benchmarks.coverage --opened` wrote it, and checked that the call that the export prints
opens the same network. The tests write the folders again, without timm.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from fd_jax import inference, model_folder
from fd_jax.convert import cli, exporting, importing
from fd_jax.convert.containers.opening import open_container
from fd_jax.convert.formats import FORMATS
from fd_jax.convert.trees import flat, nested
from fd_jax.errors import ConversionError
from fd_jax.models import sizes
from tests.convert import exported, seeded, test_outputs

OPENED = Path(__file__).parent / "opened"
ABOUT = json.loads((OPENED / "timm.json").read_text())
NAMES = list(exported.CASES)
TOLERANCE = 1e-5
# Those of which outputs are compared by default; that the folder is the one timm opened is a test
# of every network.
QUICK = ("student", "registers", "EVA-02")


def written(name, folder, **changes):
    """The folder of a case, with fields of its spec changed."""
    made = dataclasses.replace(exported.spec(name), **changes)
    return FORMATS["timm"].write(made, exported.params(made), folder)


def outputs(made, params, side):
    """Tokens, logits where there is a head, and the vector of a pool, run eagerly."""
    model = inference.Model(made, nested(params.items()))
    images = made.normalize(seeded.images(*side))
    with jax.disable_jit(), jax.default_matmul_precision("highest"):
        features = model(images)
        found = {"tokens": np.asarray(features.tokens)}
        if made.pool is not None:
            found["pooled"] = np.asarray(model.pooled(images))
    if made.classes:
        patches = np.asarray(features.patches)
        vector = np.asarray(features.cls_token) if made.pooling == "cls" else patches.mean(axis=1)
        if made.pooling == "mean_norm":
            centred = vector - vector.mean(-1, keepdims=True)
            scale = np.sqrt(vector.var(-1, keepdims=True) + made.head_norm_eps)
            vector = centred / scale * params["fc_norm/scale"] + params["fc_norm/bias"]
        found["logits"] = vector @ params["head/kernel"] + params["head/bias"]
    return found


def test_there_is_an_answer_of_timm_for_every_case():
    assert list(ABOUT["networks"]) == NAMES
    assert ABOUT["library"].startswith("timm 1.")
    assert sum(path.stat().st_size for path in OPENED.iterdir()) < 1 << 19
    classes = {about["class"] for about in ABOUT["networks"].values()}
    assert len(classes) == 7


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_is_the_one_that_timm_opened(name, tmp_path):
    about = ABOUT["networks"][name]
    written(name, tmp_path / "timm")
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert config == about["config"]
    tensors = open_container(tmp_path / "timm").tensors
    assert {key: list(tensor.shape) for key, tensor in tensors.items()} == about["state"]
    assert None not in config["model_args"].values()  # which create_model would not see


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES]
)
def test_outputs_are_those_of_timm(name):
    made = exported.spec(name)
    found = outputs(made, exported.params(made), sizes.sides(made.arch["image_size"]))
    with np.load(OPENED / "timm.npz") as arrays:
        expected = {key: arrays[f"{name}/{key}"] for key in found if f"{name}/{key}" in arrays}
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert np.abs(found[key] - value).max() < TOLERANCE * np.abs(value).max(), key


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_imported_as_the_network_it_was_made_of(name, tmp_path):
    made = exported.spec(name)
    left = written(name, tmp_path / "timm").left
    found = importing.read("auto", tmp_path / "timm")
    assert found.spec.arch == made.arch
    fields = ("mean", "std", "classes", "class_names", "pool")
    assert all(getattr(found.spec, field) == getattr(made, field) for field in fields)
    assert found.spec.pooling == made.pooling or not made.classes
    before = {p: value for p, value in exported.params(made).items() if p not in left}
    after = flat(found.params)
    if name == "ConvNeXt, features":  # whose class has a norm that this network lacks
        np.testing.assert_array_equal(after.pop("fc_norm/scale"), 1)
        np.testing.assert_array_equal(after.pop("fc_norm/bias"), 0)
    assert before.keys() == after.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("plain", {"norm_eps": 1e-12}, "VisionTransformer of timm asks for norm epsilon 1e-6 or"),
        ("gated", {"norm_eps": 1e-5}, "norm epsilon 1e-6 beside a gated MLP"),
        ("plain", {"patch_bias": False}, "a bias of the patch embedding or a norm before the"),
        ("student", {"norm_eps": 1e-5}, "Beit of timm asks for norm epsilon 1e-6"),
        ("student", {"activation": "quick_gelu"}, "Beit of timm asks for the exact GELU"),
        ("student", {"patch_bias": False}, "Beit of timm asks for a bias of the patch embedding"),
        ("student", {"cls_token": False}, "Beit of timm asks for a class token"),
        ("DINOv3", {"norm_eps": 1e-3}, "Eva of timm asks for norm epsilon 1e-6 or 1e-5"),
        ("DINOv3", {"activation": "gelu_tanh"}, "the exact GELU, or SiLU in a gated MLP"),
        ("RoPE-ViT", {"layer_scale": None}, "a layer scale beside rotary positions without"),
        ("Swin", {"activation": "gelu_tanh"}, "SwinTransformer of timm asks for the exact GELU"),
        ("Swin V2", {"norm_eps": 1e-6}, "SwinTransformerV2 of timm asks for norm epsilon 1e-5"),
        ("Swin V2", {"extra_norm_every": 1}, "no norms on the main branch"),
        ("ConvNeXt", {"final_norm_eps": 1e-12}, "a head whose norm has the epsilon of all others"),
        ("ConvNeXt, DINOv3", {"final_norm_eps": 1e-5}, "in a norm of all tokens as in all others"),
    ],
    ids=str,
)
def test_what_timm_cannot_hold_is_refused_by_its_name(name, changes, reason, tmp_path):
    arch = {**exported.spec(name).arch, **changes}
    with pytest.raises(ConversionError, match=reason):
        written(name, tmp_path / "timm", arch=arch)
    assert not (tmp_path / "timm").exists()


@pytest.mark.parametrize(
    ("name", "changes", "left"),
    [
        ("student", {"classes": 3, "pooling": "norm_mean"}, ["head/bias", "head/kernel"]),
        ("SigLIP", {"arch": {**exported.SIGLIP, "norm_eps": 1e-5}}, 13),
        ("CLIP", {"pool": {"kind": "projection", "width": 8}}, ["pool/projection/kernel"]),
    ],
)
def test_parts_that_timm_makes_otherwise_are_left_and_named(name, changes, left, tmp_path):
    found = written(name, tmp_path / "timm", **changes).left
    assert found == left or len(found) == left
    assert not any(path.startswith("encoder/") for path in found)


@pytest.mark.parametrize("name", ["vit_distilled", "vit_deit3", "eva_dinov3_gated", "swin_v2"])
def test_a_folder_of_timm_goes_back_to_timm(name, tmp_path):
    """Bit for bit, but for a distillation token: its position is added to it, as timm does."""
    saved = test_outputs.saved(name)
    (tmp_path / "theirs").mkdir()
    folder = test_outputs.write(saved, tmp_path / "theirs")
    importing.import_file("auto", folder, tmp_path / "model")
    result = exporting.export("timm", tmp_path / "model", tmp_path / "back")
    before, after = open_container(folder).tensors, open_container(tmp_path / "back").tensors
    again, first = (importing.read("auto", path) for path in (tmp_path / "back", folder))
    assert again.spec.arch == first.spec.arch and again.spec.mean == first.spec.mean
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
    changed = {"pos_embed"} if name == "vit_distilled" else set()
    if changed:
        assert after.keys() - before.keys() == {"reg_token"}
        table = after["pos_embed"].load()
        assert not table[:, 1].any() and any("their positions" in line for line in result.remarks)
        total = before["dist_token"].load() + before["pos_embed"].load()[:, 1:2]
        np.testing.assert_array_equal(after["reg_token"].load(), total)
    else:
        assert after.keys() == before.keys()
    for key in (before.keys() & after.keys()) - changed:
        np.testing.assert_array_equal(after[key].load(), before[key].load(), err_msg=key)


def test_a_published_network_keeps_the_name_of_its_architecture(tmp_path):
    spec = exported.spec("plain")
    sizes_of = {"image_size": 224, "patch_size": 16, "width": 768, "depth": 12, "heads": 12}
    arch = {**spec.arch, **sizes_of, "mlp_width": 3072}
    layout = {
        "vit_base_patch16_224": arch,
        "vit_base_patch16_clip_224": {**exported.CLIP, **arch, **_of(exported.CLIP)},
        "vit_base_patch14_dinov2": {**arch, "patch_size": 14, "layer_scale": 1.0},
        "vit_base_patch16_dinov3": {**exported.DINOV3, **sizes_of, "mlp_width": 3072}
        | {"registers": 4, "image_size": 256},
    }
    for name, given in layout.items():
        made = dataclasses.replace(spec, arch=given, classes=0)
        assert _architecture(made) == name


def _of(arch):
    names = ("ln_pre", "patch_bias", "norm_eps", "activation")
    return {name: arch[name] for name in names} | {"activation": "gelu_erf"}


def _architecture(made):
    from fd_jax.convert import families
    from fd_jax.convert.timm import Timm

    paths = {f"encoder/{path}" for path in flat(made.abstract()[1])}
    layout, _ = families.layout(Timm, made, paths, format="timm")
    return layout.config(made, paths)["architecture"]


@pytest.mark.parametrize("change", ["rope_type", "num_heads", "act_layer", "norm_eps", "mean"])
def test_the_import_believes_the_config_and_not_the_names(change, tmp_path):
    """Negative control: another value in the config is another network, or refused."""
    name = {"rope_type": "EVA-02", "norm_eps": "ConvNeXt V2"}.get(change, "plain")
    written(name, tmp_path / "timm")
    path = tmp_path / "timm" / "config.json"
    config = json.loads(path.read_text())
    others = {"rope_type": "mixed", "num_heads": 8, "act_layer": "silu", "norm_eps": 1e-3}
    if change == "mean":
        config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    else:
        config["model_args"][change] = others[change]
    path.write_text(json.dumps(config))
    if change == "rope_type":
        with pytest.raises(ConversionError, match="model_args.rope_type is 'mixed'"):
            importing.read("auto", tmp_path / "timm")
        return
    found, made = importing.read("auto", tmp_path / "timm").spec, exported.spec(name)
    assert found.arch != made.arch or found.mean == (0.1, 0.2, 0.3)


def test_the_command_says_how_timm_opens_the_folder(tmp_path, capsys):
    made = exported.spec("student")
    params = exported.params(made) | {"projector/kernel": np.ones((32, 8), np.float32)}
    params["projector/bias"] = np.ones(8, np.float32)
    model_folder.save(tmp_path / "model", made, nested(params.items()))
    arguments = ["export", "--format=timm", f"--input={tmp_path}/model"]
    assert cli.main([*arguments, f"--output={tmp_path}/for_timm"]) == 0
    out = capsys.readouterr().out
    assert "the format has no place for projector/bias" in out
    assert f"timm.create_model('local-dir:{tmp_path}/for_timm', pretrained=True)" in out
    assert f"checkpoint_path='{tmp_path}/for_timm/model.safetensors'" in out
    assert "'mean': [0.5, 0.4, 0.6]" in out and "use_shared_rel_pos_bias=True" in out
