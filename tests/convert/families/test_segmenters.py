"""Published segmenters: a folder of transformers' whole model gives its logits."""

import collections
import json
import re

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from fd_jax import inference, model_folder
from fd_jax.convert import exporting, importing
from fd_jax.convert.cli import main
from fd_jax.errors import ConversionError
from fd_jax.models import spec as specs

CLASSES = 5
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]

pytestmark = pytest.mark.slow  # together they take most of a minute


@pytest.fixture(autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


def beit(**changes):
    fields = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 12,
        "intermediate_size": 64,
        "image_size": 64,
        "use_relative_position_bias": True,
        "num_labels": CLASSES,
        "auxiliary_channels": 12,
        "out_indices": [3, 5, 7, 11],
    }
    return transformers.BeitForSemanticSegmentation(transformers.BeitConfig(**fields | changes))


def upernet(backbone=None, **changes):
    swin = {
        "embed_dim": 16,
        "depths": [1, 2, 1, 1],
        "num_heads": [1, 2, 2, 2],
        "window_size": 4,
        "image_size": 64,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    fields = {
        "hidden_size": 32,
        "num_labels": CLASSES,
        "auxiliary_channels": 12,
        "auxiliary_in_channels": 64,
    }
    config = transformers.SwinConfig(**swin | (backbone or {}))
    config = transformers.UperNetConfig(backbone_config=config, **fields | changes)
    return transformers.UperNetForSemanticSegmentation(config)


def saved(model, folder, *, statistics=True):
    """No parameter and no running statistic at its neutral start; a folder as on the hub."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif tensor.ndim > 1 and "table" not in name and "token" not in name:
            tensor.normal_(0, 1.4 * tensor[0].numel() ** -0.5)
        elif tensor.is_floating_point():
            tensor.add_(0.3 * torch.randn_like(tensor))
    model.eval().save_pretrained(folder)
    if statistics:
        fields = {"image_mean": MEAN, "image_std": STD}
        (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return model


def pictures(side):
    return np.random.default_rng(1).integers(0, 256, (2, side, side, 3)).astype(np.uint8)


def theirs(model, images, mean=MEAN, std=STD):
    pixels = (images / 255 - np.array(mean)) / np.array(std)
    with torch.no_grad():
        out = model(torch.from_numpy(np.moveaxis(pixels, -1, 1).astype(np.float32))).logits
    return out.numpy()


def ours(folder, images, side):
    """Our logits, [B, K, h, w]; enlarged to the picture, as UperNetForSemanticSegmentation does."""
    logits = inference.load_model(folder).segment(images, logits=True)
    logits = torch.from_numpy(np.moveaxis(logits, -1, 1).copy())
    if logits.shape[-1] != side:
        logits = torch.nn.functional.interpolate(
            logits, size=(side, side), mode="bilinear", align_corners=False
        )
    return logits.numpy()


def difference(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("changes", [{}, {"use_auxiliary_head": False}], ids=["whole", "no side"])
def test_beit_gives_the_logits_of_transformers(tmp_path, changes):
    model = saved(beit(**changes), tmp_path / "hub")
    arguments = ["--source=auto", f"--input={tmp_path / 'hub'}", f"--output={tmp_path / 'model'}"]
    assert main(["import", *arguments]) == 0
    spec = model_folder.load_spec(tmp_path / "model")
    assert spec.segmenter["blocks"] == [1, 3, 5, 9] and spec.segmenter["classes"] == CLASSES
    assert spec.mean == tuple(MEAN) and spec.source == "beit_segmentation_hf"
    images = pictures(64)
    want = theirs(model, images)
    got = ours(tmp_path / "model", images, want.shape[-1])
    assert got.shape == want.shape and difference(got, want) < 1e-4
    # What the config seems to say, and mmsegmentation means: outputs of blocks 3, 5, 7 and 11.
    path = tmp_path / "model" / "model.json"
    (path.parent / model_folder.DIGESTS).unlink()  # as if written by hand
    fields = json.loads(path.read_text())
    fields["segmenter"]["blocks"] = [3, 5, 7, 11]
    path.write_text(json.dumps(fields))
    assert difference(ours(tmp_path / "model", images, want.shape[-1]), want) > 1e-2


@pytest.mark.parametrize("shared", [False, True], ids=["per block", "shared"])
def test_beit_without_preprocessor_has_the_statistics_of_its_class(tmp_path, shared):
    kind = {"use_relative_position_bias": not shared, "use_shared_relative_position_bias": shared}
    model = saved(beit(**kind), tmp_path / "hub", statistics=False)
    importing.import_file("beit_segmentation_hf", tmp_path / "hub", tmp_path / "model")
    images = pictures(64)
    want = theirs(model, images, [0.5] * 3, [0.5] * 3)
    assert difference(ours(tmp_path / "model", images, want.shape[-1]), want) < 1e-4


def test_upernet_gives_the_logits_of_transformers(tmp_path):
    model = saved(upernet(), tmp_path / "hub")
    arguments = [f"--input={tmp_path / 'hub'}", f"--output={tmp_path / 'model'}"]
    assert main(["import", "--source=auto", "--image-size=128", *arguments]) == 0
    spec = model_folder.load_spec(tmp_path / "model")
    assert spec.source == "upernet_swin_hf" and spec.segmenter["blocks"] == [0, 2, 3, 4]
    images = pictures(128)
    want = theirs(model, images)
    got = ours(tmp_path / "model", images, 128)
    assert difference(got, want) < 1e-4
    assert difference(got, want[:, :, ::-1]) > 1e-2


def test_a_size_is_chosen_that_windows_divide(tmp_path):
    saved(upernet(), tmp_path / "windows of 4")
    assert importing.read("auto", tmp_path / "windows of 4").spec.arch["image_size"] == 512
    saved(upernet({"window_size": 7}), tmp_path / "hub")
    assert importing.read("auto", tmp_path / "hub").spec.arch["image_size"] == 448
    result = importing.read("auto", tmp_path / "hub", image_size=224)
    assert result.spec.arch["image_size"] == 224 and "segmenter_statistics" in result.params


@pytest.mark.parametrize(
    "make,fields,message",
    [
        (beit, {"pool_scales": [1, 2]}, "pool_scales is .1, 2., expected .1, 2, 3, 6."),
        (beit, {"auxiliary_num_convs": 2}, "auxiliary_num_convs is 2, expected 1"),
        (beit, {"hidden_act": "swish"}, "activation 'swish' is unknown"),
        (beit, {"layer_norm_eps": [1]}, r"layer_norm_eps is \[1\], expected a number between"),
        (beit, {"num_hidden_layers": 10**9}, "describes no BeitForSemanticSegmentation"),
        (beit, {"num_hidden_layers": "12"}, "describes no BeitForSemanticSegmentation"),
        (beit, {"hidden_size": 48, "num_attention_heads": 4}, r"has shape \[.*32.*\], expected"),
        (upernet, {"backbone_config": {"model_type": "convnext", "depths": []}}, "'convnext'"),
        (upernet, {"backbone_config": None}, "describes no UperNetForSemanticSegmentation"),
    ],
)
def test_configs_that_no_network_here_has_are_refused(tmp_path, make, fields, message):
    saved(make(), tmp_path / "hub")
    path = tmp_path / "hub" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ConversionError, match=message):
        importing.read("auto", tmp_path / "hub")


def test_inspect_names_the_source(tmp_path, capsys):
    saved(beit(), tmp_path / "hub")
    assert main(["inspect", f"--input={tmp_path / 'hub'}"]) == 0
    assert "beit_segmentation_hf: fits completely" in capsys.readouterr().out


def test_own_export_brings_the_segmenter_back(tmp_path):
    saved(upernet(), tmp_path / "hub")
    importing.import_file("auto", tmp_path / "hub", tmp_path / "model", image_size=128)
    exporting.export("safetensors", tmp_path / "model", tmp_path / "file.safetensors")
    importing.import_file("auto", tmp_path / "file.safetensors", tmp_path / "back")
    spec, parts = model_folder.load(tmp_path / "model")
    other_spec, other = model_folder.load(tmp_path / "back")
    assert spec == other_spec and "segmenter_statistics" in parts
    jax.tree.map(np.testing.assert_array_equal, parts, other)


def test_a_folder_without_config_is_told_what_is_expected(tmp_path):
    saved(beit(), tmp_path / "hub")
    (tmp_path / "hub" / "config.json").unlink()
    with pytest.raises(ConversionError, match="config.json is missing or does not name"):
        importing.read("beit_segmentation_hf", tmp_path / "hub" / "model.safetensors")


RENAMES = {
    "beit.embeddings.patch_embeddings.projection": "backbone.patch_embed.proj",
    "beit.embeddings.cls_token": "backbone.cls_token",
    "backbone.embeddings.patch_embeddings.projection": "backbone.patch_embed.proj",
    "backbone.embeddings.norm": "backbone.patch_embed.norm",
    "beit.encoder.relative_position_bias.": "backbone.rel_pos_bias.",
    "beit.encoder.layer": "backbone.blocks",
    "backbone.encoder.layers": "backbone.layers",
    "lambda_": "gamma_",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "attention.output.dense": "attn.proj",
    "output.dense": "mlp.fc2",
    "attention.attention.relative_position_bias.": "attn.",
    "attention.self.relative": "attn.relative",
    "attention.attention.query.bias": "attn.q_bias",
    "attention.attention.value.bias": "attn.v_bias",
    "fpn1.": "backbone.fpn1.",
    "fpn2.": "backbone.fpn2.",
    "batch_norm": "bn",
    "classifier": "conv_seg",
}


def mmseg_file(hub, path):
    """The tensors of a folder of transformers in a checkpoint with mmsegmentation's names."""
    tensors = safetensors.torch.load_file(hub / "model.safetensors")
    state = collections.OrderedDict()
    for name, tensor in tensors.items():
        if found := re.match(r"backbone.hidden_states_norms.stage(\d)(.*)", name):
            state[f"backbone.norm{int(found[1]) - 1}{found[2]}"] = tensor
            continue
        if "query.weight" in name or ("query.bias" in name and ".self." in name):
            parts = [tensors[name.replace("query", part)] for part in ("query", "key", "value")]
            name, tensor = (
                re.sub("attention.(self|attention).query", "attn.qkv", name),
                torch.cat(parts),
            )
        elif re.search("(key|value).weight|self.(key|value)", name) or "swin.layernorm" in name:
            continue
        for theirs_, ours_ in RENAMES.items():
            name = name.replace(theirs_, ours_)
        state[name] = tensor
    meta = {"CLASSES": ("wall", "sky"), "PALETTE": [[1, 2, 3]], "iter": 160000, "config": "text"}
    torch.save({"meta": meta, "state_dict": state, "optimizer": {"state": {}}}, path)
    return state


@pytest.mark.parametrize("shared", [False, True], ids=["per block", "shared"])
def test_beit_of_mmsegmentation_reads_the_blocks_of_its_config(tmp_path, shared):
    kind = {"use_relative_position_bias": not shared, "use_shared_relative_position_bias": shared}
    model = saved(beit(**kind, layer_norm_eps=1e-6), tmp_path / "hub")
    state = mmseg_file(tmp_path / "hub", tmp_path / "upernet_beit_base.pth")
    assert ("backbone.blocks.3.attn.relative_position_bias_table" in state) != shared
    arguments = [f"--input={tmp_path / 'upernet_beit_base.pth'}", f"--output={tmp_path / 'model'}"]
    assert main(["import", "--source=auto", *arguments]) == 0
    spec = model_folder.load_spec(tmp_path / "model")
    assert spec.source == "mmseg" and spec.segmenter["blocks"] == [3, 5, 7, 11]
    images = pictures(64)
    pixels = torch.from_numpy(np.moveaxis(np.asarray(spec.normalize(images)), -1, 1).copy())
    with torch.no_grad():
        states = model.beit(pixels, output_hidden_states=True).hidden_states
        maps = [states[i + 1][:, 1:].mT.reshape(2, -1, 4, 4) for i in (3, 5, 7, 11)]
        want = model.decode_head(model.fpn(maps)).numpy()
    assert difference(ours(tmp_path / "model", images, want.shape[-1]), want) < 1e-4


def test_swin_of_mmsegmentation_gives_the_logits_of_transformers(tmp_path):
    model = saved(upernet(), tmp_path / "hub")
    mmseg_file(tmp_path / "hub", tmp_path / "upernet_swin.pth")
    result = importing.import_file(
        "mmseg", tmp_path / "upernet_swin.pth", tmp_path / "model", image_size=128
    )
    assert result.spec.arch["depths"] == [1, 2, 1, 1] and result.spec.arch["window"] == 4
    images = pictures(128)
    want = theirs(model, images, specs.IMAGENET_MEAN, specs.IMAGENET_STD)
    assert difference(ours(tmp_path / "model", images, 128), want) < 1e-4


# How mmsegmentation's own backbones call what the authors' code calls otherwise.
OWN = {
    r"^backbone\.fpn1\.": "neck.upsample_4x.",
    r"^backbone\.fpn2\.": "neck.upsample_2x.",
    r"patch_embed\.proj\b": "patch_embed.projection",
    r"mlp\.fc1": "ffn.layers.0.0",
    r"mlp\.fc2": "ffn.layers.1",
}
OWN_BEIT = {**OWN, r"^backbone\.blocks": "backbone.layers", r"\.norm([12])\.": r".ln\1."}
OWN_SWIN = {
    **OWN,
    r"^backbone\.layers": "backbone.stages",
    r"blocks\.(\d+)\.attn": r"blocks.\1.attn.w_msa",
}


def own_file(state, words, path):
    for old, new in words.items():
        state = {re.sub(old, new, name): tensor for name, tensor in state.items()}
    torch.save({"state_dict": state}, path)
    return state


def unfolded(tensor):
    """The last axis of a merging's tensor in the order in which torch's Unfold gives channels."""
    channels = tensor.shape[-1] // 4
    numbers = torch.arange(4.0 * channels).reshape(2, 2, channels)  # [column, row, channel]
    picture = numbers.permute(2, 1, 0)[None]
    order = torch.nn.functional.unfold(picture, kernel_size=2, stride=2)[0, :, 0].long()
    assert order.tolist() != list(range(4 * channels))
    return tensor[..., order]


def test_beit_of_mmsegmentation_itself_is_that_of_unilm(tmp_path):
    saved(beit(layer_norm_eps=1e-6), tmp_path / "hub")
    state = mmseg_file(tmp_path / "hub", tmp_path / "unilm.pth")
    own = own_file(state, OWN_BEIT, tmp_path / "own.pth")
    assert {"backbone.layers.0.ln1.weight", "neck.upsample_4x.3.bias"} <= set(own)
    for name in ("unilm", "own"):
        importing.import_file("auto", tmp_path / f"{name}.pth", tmp_path / name)
    spec, parts = model_folder.load(tmp_path / "unilm")
    own_spec, own_parts = model_folder.load(tmp_path / "own")
    assert own_spec.segmenter == spec.segmenter and own_spec.arch == spec.arch
    jax.tree.map(np.testing.assert_array_equal, own_parts, parts)


@pytest.mark.parametrize("in_order", [True, False])
def test_swin_of_mmsegmentation_itself_reads_channels_in_the_order_of_unfold(tmp_path, in_order):
    model = saved(upernet(), tmp_path / "hub")
    state = mmseg_file(tmp_path / "hub", tmp_path / "upernet.pth")
    if in_order:
        state = {n: unfolded(t) if "downsample" in n else t for n, t in state.items()}
    rows = 7 * torch.arange(4)[:, None] + torch.arange(4)  # windows of 4 have 7 x 7 offsets
    index = (rows.reshape(1, -1) + rows.reshape(-1, 1)).flip(1)
    state["backbone.layers.0.blocks.0.attn.relative_position_index"] = index
    own = own_file(state, OWN_SWIN, tmp_path / "upernet.pth")
    assert "backbone.stages.1.blocks.0.attn.w_msa.relative_position_bias_table" in own
    arguments = ["--source=auto", f"--input={tmp_path / 'upernet.pth'}", "--image-size=128"]
    assert main(["import", *arguments, f"--output={tmp_path / 'model'}"]) == 0
    images = pictures(128)
    want = theirs(model, images, specs.IMAGENET_MEAN, specs.IMAGENET_STD)
    found = difference(ours(tmp_path / "model", images, 128), want)
    assert found < 1e-4 if in_order else found > 1e-2


def test_other_backbones_of_mmsegmentation_are_refused_by_name(tmp_path):
    saved(beit(), tmp_path / "hub")
    state = mmseg_file(tmp_path / "hub", tmp_path / "upernet.pth")
    own_file(state | {"backbone.pos_embed": torch.zeros(1, 17, 32)}, OWN_BEIT, tmp_path / "mae.pth")
    with pytest.raises(ConversionError, match="absolute positions.*as the MAE of mmsegmentation"):
        importing.read("auto", tmp_path / "mae.pth")
    words = {**OWN_BEIT, "^neck.upsample_4x": "neck.convs.0"}
    own_file(state, words, tmp_path / "vit.pth")
    with pytest.raises(ConversionError, match="another backbone.*Microsoft's Swin V1"):
        importing.read("auto", tmp_path / "vit.pth")


@pytest.mark.parametrize("fields", [{"image_mean": [0.5]}, {"image_std": [1, 0, 1]}, {}])
def test_statistics_that_are_none_are_refused(tmp_path, fields):
    saved(beit(), tmp_path / "hub")
    fields = {"image_mean": MEAN, "image_std": STD, **fields} if fields else fields
    (tmp_path / "hub" / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(ConversionError, match="image_mean"):
        importing.read("auto", tmp_path / "hub")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"backbone.fpn1.0.weight": None}, "it has another backbone; those that can be read"),
        ({"decode_head.conv_seg.weight": None}, "no decode_head.conv_seg.weight; expected"),
        ({"backbone.cls_token": None}, "missing backbone.cls_token"),
        ({"backbone.fpn3.0.weight": torch.zeros(3)}, "unexpected backbone.fpn3.0.weight"),
        (
            {"backbone.blocks.0.attn.relative_position_bias_table": torch.zeros(50, 2)},
            "a table of 47 offsets belongs to no square",
        ),
    ],
)
def test_checkpoints_of_other_networks_are_refused(tmp_path, change, message):
    saved(beit(), tmp_path / "hub")
    path = tmp_path / "upernet.pth"
    state = {**mmseg_file(tmp_path / "hub", path), **change}
    torch.save({"state_dict": {n: t for n, t in state.items() if t is not None}}, path)
    with pytest.raises(ConversionError, match=message):
        importing.read("mmseg", path)
