"""Files that say two things, or too little: refused or asked about, never taken for one of them.

The folders are those of timm, open_clip and transformers, with one thing changed.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fd_jax.convert import importing
from fd_jax.errors import ConversionError
from tests.convert import test_outputs, test_styles


def folder_of(name, folder):
    """The folder of a network of timm or open_clip."""
    folder.mkdir()
    return test_outputs.write(test_outputs.saved(name), folder)


def of_transformers(name, folder):
    return test_styles.saved(name, folder)


def with_tensors(folder, change):
    """The same folder with other tensors."""
    (path,) = folder.glob("*.safetensors")
    save_file(change(load_file(path)), path, {"format": "pt"})
    return folder


def without(*names):
    """A change of tensors that drops some."""
    return lambda tensors: {name: v for name, v in tensors.items() if name not in names}


def with_config(folder, name, change):
    """The same folder with another value in the file of this name."""
    path = folder / name
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    return folder


# --- several files beside the weights


def test_a_config_counts_for_the_names_of_its_library(tmp_path):
    """Repositories hold one network in the names of transformers and of open_clip."""
    folder = of_transformers("CLIPVisionModel", tmp_path / "hf")
    other = folder_of("clip_quick_gelu", tmp_path / "open_clip") / "open_clip_config.json"
    expected = importing.read("auto", folder).spec
    (folder / other.name).write_bytes(other.read_bytes())
    assert importing.read("auto", folder).spec == expected
    assert expected.arch["activation"] == "gelu_erf" and expected.position_resize == "size"


def test_statistics_in_two_files_have_to_agree(tmp_path):
    folder = folder_of("vit", tmp_path / "timm")
    fields = {"image_mean": [0.1] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(ConversionError, match="mean is .0.5, 0.5, 0.5. .config.json: pretrained"):
        importing.read("auto", folder)


@pytest.mark.parametrize("names", ["vit", "ViTModel"])
def test_a_config_of_another_library_is_refused(names, tmp_path):
    timms = folder_of("vit", tmp_path / "timm")
    theirs = of_transformers("ViTModel", tmp_path / "hf")
    here, there = (timms, theirs) if names == "vit" else (theirs, timms)
    (here / "config.json").write_bytes((there / "config.json").read_bytes())
    with pytest.raises(ConversionError, match="config.json is of .*, but the tensors have the nam"):
        importing.read("auto", here)


def test_the_second_place_of_the_vision_config_wins_as_in_transformers(tmp_path):
    folder = of_transformers("CLIPVisionModel", tmp_path / "hf")

    def nest(fields):
        inner = dict(fields)
        fields.clear()
        old = {**inner, "hidden_act": "quick_gelu"}
        fields |= {"model_type": "clip", "vision_config": old, "vision_config_dict": inner}

    with_config(folder, "config.json", nest)
    assert importing.read("auto", folder).spec.arch["activation"] == "gelu_erf"


# --- what the user states against a config


def test_a_gate_that_only_a_model_card_tells_can_be_stated(tmp_path):
    """As Virchow2's: made with other layers, in code, than the architecture in its config has."""
    folder = folder_of("vit_gated", tmp_path / "timm")
    expected = importing.read("auto", folder).spec.arch
    with_config(
        folder, "config.json", lambda fields: fields.update(architecture="vit_small_patch14_dinov2")
    )
    with pytest.raises(ConversionError, match="gated_mlp is True .the tensors., but False .timm 1"):
        importing.read("auto", folder)
    with pytest.raises(ConversionError, match="tells activation"):  # that of the plain MLP is none
        importing.read("auto", folder, facts=["gated_mlp=yes", "heads=24"])
    stated = ["gated_mlp=yes", "activation=silu", "heads=24"]
    spec = importing.read("auto", folder, facts=stated).spec
    assert spec.arch == expected
    assert spec.origins["gated_mlp"] == "stated by the user, against False (timm 1.0.31)"
    with pytest.raises(ConversionError, match="gated_mlp is False .--fact., but True .the tensors"):
        importing.read("auto", folder, facts=["gated_mlp=no"])


# --- several networks


def test_a_network_inside_another_one_is_not_taken_without_asking(tmp_path):
    folder = folder_of("vit", tmp_path / "timm")

    def twice(tensors):
        return tensors | {f"teacher.{name}": 2 * value for name, value in tensors.items()}

    with_tensors(folder, twice)
    with pytest.raises(ConversionError, match="holds 2 networks, below '', 'teacher.'"):
        importing.read("auto", folder)
    found = importing.read("auto", folder, part="teacher")
    table = load_file(folder / "model.safetensors")["teacher.pos_embed"]
    np.testing.assert_array_equal(found.params["encoder"]["pos_embed"], table)


# --- tensors that change features


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("vit_map", "attn_pool.q_norm.weight", 48),
        ("eva_rope", "rope.freqs", 48),
        ("vit", "blocks.0.attn.q_norm.weight", 12),
    ],
)
def test_a_tensor_that_changes_features_is_not_dropped(name, tensor, shape, tmp_path):
    folder = folder_of(name, tmp_path / "timm")
    with_tensors(folder, lambda tensors: tensors | {tensor: np.ones(shape, np.float32)})
    with pytest.raises(ConversionError, match=f"unexpected {tensor}"):
        importing.read("auto", folder)


def test_a_file_that_lost_its_class_token_is_not_one_of_a_network_without(tmp_path):
    """Rotary positions have no row for it that would be missed."""
    folder = with_tensors(folder_of("eva_dinov3", tmp_path / "timm"), without("cls_token"))
    with pytest.raises(ConversionError, match="cls_token is False .the tensors., but True .timm 1"):
        importing.read("auto", folder)
    (folder / "config.json").unlink()
    stated = ["heads=6", "activation=gelu_erf", "norm_eps=1e-5", "mean=0,0,0", "std=1,1,1"]
    stated += ["rope_theta=100", "rope_pairs=halves", "rope_reference=none", "rope_offset=0"]
    stated += ["rope_axes=yx", "image_size=32"]
    with pytest.raises(ConversionError, match="tells cls_token.(.|\n)*a file that has lost it"):
        importing.read("auto", folder, facts=stated)
    with pytest.raises(ConversionError, match="cls_token is True .--fact., but False .the tensors"):
        importing.read("auto", folder, facts=[*stated, "cls_token=yes"])
    spec = importing.read("auto", folder, facts=[*stated, "cls_token=no"]).spec
    assert not spec.arch["cls_token"] and spec.origins["cls_token"] == "--fact"


@pytest.mark.parametrize(
    ("name", "lost", "fact"),
    [
        ("vit_deit3", ("cls_token",), "cls_token"),
        ("vit_registers", ("reg_token",), "registers"),
        ("vit_clip", ("norm_pre.weight", "norm_pre.bias"), "ln_pre"),
        ("vit", ("patch_embed.proj.bias",), "patch_bias"),
    ],
)
def test_a_lost_tensor_contradicts_the_published_architecture(name, lost, fact, tmp_path):
    folder = with_tensors(folder_of(name, tmp_path / "timm"), without(*lost))
    with pytest.raises(ConversionError, match=f"{fact} is .* .the tensors., but .* .timm 1.0.31."):
        importing.read("auto", folder)


def test_metadata_of_safetensors_states_nothing(tmp_path):
    """Libraries write no facts there; what a stranger wrote is no claim."""
    folder = folder_of("vit", tmp_path / "timm")
    expected = importing.read("auto", folder).spec
    path = folder / "model.safetensors"
    strange = {"format": "np", "heads": "3", "model_type": "swin", "model": "{", "\u2603": "\x00"}
    save_file(load_file(path), path, strange)
    found = importing.read("auto", folder).spec
    assert found.arch == expected.arch and found.origins == expected.origins


def test_a_gate_that_the_config_does_not_know_is_refused(tmp_path):
    import transformers

    config = transformers.Dinov2Config(**test_styles.DINOV2, use_swiglu_ffn=True)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "hf")
    folder = tmp_path / "hf"
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    assert importing.read("auto", folder).spec.arch["activation"] == "silu"
    with_config(folder, "config.json", lambda fields: fields.update(use_swiglu_ffn=False))
    with pytest.raises(ConversionError, match="gated_mlp is True .the tensors., but False"):
        importing.read("auto", folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("pool_type", "avg"), ("final_ln_after_pool", True), ("qk_norm", True), ("block_type", "x")],
)
def test_a_tower_of_open_clip_that_computes_otherwise_is_refused(field, value, tmp_path):
    folder = folder_of("clip_gelu", tmp_path / "open_clip")

    def change(fields):
        fields["model_cfg"]["vision_cfg"][field] = value

    with_config(folder, "open_clip_config.json", change)
    with pytest.raises(ConversionError, match=f"open_clip_config.json has {field} "):
        importing.read("auto", folder)


def test_a_tower_whose_norm_follows_the_pooling_says_so_in_its_config(tmp_path):
    folder = folder_of("clip_coca", tmp_path / "open_clip")

    def change(value):
        def changed(fields):
            fields["model_cfg"]["vision_cfg"]["attentional_pool"] = value

        return changed

    name = "open_clip_config.json"
    with_config(folder, name, change(False))
    with pytest.raises(ConversionError, match="final_norm is False .the tensors., but True .open_"):
        importing.read("auto", folder)
    with_config(folder, name, change("parallel"))
    with pytest.raises(ConversionError, match="has attentional_pool 'parallel', which networks"):
        importing.read("auto", folder)
    with_config(folder, name, change(True))
    found = importing.read("auto", folder)
    assert not found.spec.arch["final_norm"] and found.spec.pool is None
    dropped = found.dropped["the attention pooling head"]
    assert {"attn_pool.query", "ln_post.weight"} <= set(dropped)


# --- facts that names alone leave open


def test_rotary_positions_are_asked_for_where_names_leave_them_open(tmp_path):
    folder = folder_of("eva_pe_core", tmp_path / "timm")
    path = tmp_path / "alone.safetensors"
    (folder / "model.safetensors").rename(path)
    stated = ["heads=12", "activation=gelu_erf", "norm_eps=1e-5", "position_resize=antialias"]
    stated += ["mean=0.5,0.5,0.5", "std=0.5,0.5,0.5", "pooling=cls"]
    with pytest.raises(ConversionError, match="tells rope_theta"):
        importing.read("auto", path, facts=stated)
    more = [*stated, "rope_theta=10000"]
    with pytest.raises(ConversionError, match="tells rope_pairs, rope_reference, rope_offset, rop"):
        importing.read("auto", path, facts=more)
    rest = ["rope_pairs=neighbours", "rope_reference=4", "rope_offset=1", "rope_axes=xy"]
    arch = importing.read("timm_eva", path, facts=[*more, *rest]).spec.arch
    assert arch["position"] == "ape_rope" and arch["rope_axes"] == "xy"
    plain = importing.read("timm_eva", path, facts=[*stated, "rope_theta=none"]).spec.arch
    assert plain["position"] == "ape" and "rope_theta" not in plain


def test_a_head_has_to_fit_what_it_reads(tmp_path):
    folder = folder_of("vit", tmp_path / "timm")

    def head(tensors):
        norm = {
            "fc_norm.weight": tensors.pop("norm.weight"),
            "fc_norm.bias": tensors.pop("norm.bias"),
        }
        head = {"head.weight": np.ones((5, 48), np.float32), "head.bias": np.ones(5, np.float32)}
        return tensors | norm | head

    with_tensors(folder, head)
    with pytest.raises(
        ConversionError, match="pooling is cls .*, but its head has a norm of its own"
    ):
        importing.read("auto", folder)

    def mean(fields):
        fields["global_pool"] = fields["model_args"]["global_pool"] = "avg"

    with_config(folder, "config.json", mean)
    assert importing.read("auto", folder).spec.pooling == "mean_norm"


# --- values of strangers


@pytest.mark.parametrize("value", [None, [], {}, "x", -1, 0, 10**400, [[1]], float("nan"), True])
@pytest.mark.parametrize(
    ("name", "file", "path"),
    [
        ("vit", "config.json", ("model_args",)),
        ("vit", "config.json", ("model_args", "num_heads")),
        ("vit", "config.json", ("pretrained_cfg", "input_size")),
        ("vit", "config.json", ("pretrained_cfg", "std")),
        ("clip_gelu", "open_clip_config.json", ("model_cfg", "vision_cfg", "timm_model_name")),
        ("clip_gelu", "open_clip_config.json", ("model_cfg", "vision_cfg", "head_width")),
        ("clip_gelu", "open_clip_config.json", ("preprocess_cfg", "mean")),
    ],
)
def test_any_value_beside_the_weights_is_read_or_refused(name, file, path, value, tmp_path):
    folder = folder_of(name, tmp_path / "folder")

    def change(fields):
        for key in path[:-1]:
            fields = fields[key]
        fields[path[-1]] = value

    with_config(folder, file, change)
    try:
        spec = importing.read("auto", folder).spec
    except ConversionError:
        return
    assert spec.arch["heads"] >= 1 and min(spec.std) > 0


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("vit", "blocks.5000.norm1.weight", (48,)),
        ("vit", f"blocks.{'9' * 5000}.norm1.weight", (48,)),
        ("vit", "pos_embed", (816,)),
        ("vit_registers", "reg_token", (192,)),
        ("vit_map", "attn_pool.latent", None),
    ],
)
def test_tensors_that_make_no_network_are_one_message(name, tensor, shape, tmp_path):
    folder = folder_of(name, tmp_path / "folder")

    def change(tensors):
        tensors.pop(tensor, None)
        return tensors if shape is None else tensors | {tensor: np.ones(shape, np.float32)}

    with_tensors(folder, change)
    with pytest.raises(ConversionError):
        importing.read("auto", folder)
