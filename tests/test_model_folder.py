"""Model folders: exact round trips, atomic writes, and clear errors."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import time

from flax import nnx
import jax
import numpy as np
import pytest

import fd_jax
from fd_jax import model_folder
from fd_jax.data.transforms import EvalTransform
from fd_jax.errors import ConfigError, DataError, ModelFolderError
from fd_jax.evaluation import segmentation
from fd_jax.models.spec import split
from tests import tiny
from tests.evaluation import segments

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def parts():
    encoder = split(tiny.teacher_spec().build(rngs=nnx.Rngs(0)))[1]
    return {"encoder": tiny.randomize(encoder, 3)}


@pytest.fixture
def folder(tmp_path, parts):
    model_folder.save(tmp_path / "model", tiny.teacher_spec(), parts)
    return tmp_path / "model"


def test_round_trip_is_bit_for_bit_in_every_dtype(tmp_path, parts):
    parts["head"] = {
        "kernel": np.arange(48 * 3).reshape(48, 3).astype(np.float16),
        "bias": np.zeros(3, np.float32),
    }
    spec = tiny.teacher_spec()
    model_folder.save(tmp_path / "model", spec, parts)
    loaded_spec, loaded = model_folder.load(tmp_path / "model")
    assert loaded_spec == spec
    jax.tree.map(np.testing.assert_array_equal, loaded, parts)
    assert loaded["head"]["kernel"].dtype == np.float16


def test_sharded_arrays_are_written_whole(tmp_path, parts):
    mesh = jax.make_mesh((8,), ("x",))
    kernel = parts["encoder"]["blocks"]["0"]["mlp"]["fc1"]["kernel"]
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    placed = jax.tree.map(np.asarray, parts)
    placed["encoder"]["blocks"]["0"]["mlp"]["fc1"]["kernel"] = jax.device_put(kernel, sharding)
    model_folder.save(tmp_path / "model", tiny.teacher_spec(), placed)
    _, loaded = model_folder.load(tmp_path / "model")
    got = loaded["encoder"]["blocks"]["0"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_array_equal(got, kernel)


def test_loaded_model_gives_the_features_of_the_saved_module(folder, parts):
    model = fd_jax.load_model(folder)
    images = tiny.batch(2)["image"]
    definition, _ = tiny.teacher_spec().abstract()
    want = nnx.merge(definition, parts["encoder"])(model.preprocess(images)).tokens
    np.testing.assert_allclose(model(model.preprocess(images)).tokens, want, atol=1e-5)
    pixels = (images / 255.0 - np.array(model.spec.mean)) / np.array(model.spec.std)
    np.testing.assert_allclose(model.preprocess(images), pixels, atol=1e-5)


def test_pictures_of_any_sizes_become_the_images_of_evaluation(folder):
    model = fd_jax.load_model(folder)
    pictures = [tiny.batch(1, side=side)["image"][0] for side in (50, 40)]
    transform = EvalTransform(32)
    want = model.preprocess(np.stack([transform(picture) for picture in pictures]))
    got = model.preprocess(pictures, resize=True)
    one_level = 1 / 255 / min(model.spec.std)
    assert np.abs(np.asarray(got) - np.asarray(want)).max() < 1.01 * one_level
    with pytest.raises(DataError, match="16-bit"):
        model.preprocess([pictures[0].astype(np.uint16)], resize=True)


def test_a_model_prints_what_it_is(folder):
    shown = repr(fd_jax.load_model(folder))
    spec, parts = model_folder.load(folder)
    values = sum(leaf.size for leaf in jax.tree.leaves(parts["encoder"])) / 1e6
    assert f"{spec.source!r}: vit, {values:.3g} M parameters, 32 px, 4 x 4 patches" in shown
    assert "of width 48, class token; parts: encoder" in shown


def test_attention_maps_are_those_of_the_network(folder, parts):
    model = fd_jax.load_model(folder)
    images = model.preprocess(tiny.batch(2)["image"])
    network = nnx.merge(tiny.teacher_spec().abstract()[0], parts["encoder"])
    want = [np.asarray(m.weights()) for m in network.attention_maps(images, [0, 1])]
    got = [np.asarray(m.weights()) for m in model.attention_maps(images)]
    np.testing.assert_allclose(got, want, atol=1e-6)
    (last,) = model.attention_maps(images, blocks=[-1])
    np.testing.assert_allclose(last.weights(), want[1], atol=1e-6)
    assert np.abs(want[1] - want[0]).max() > 1e-3
    with pytest.raises(ConfigError, match="has 2 blocks, so there is no block 2"):
        model.attention_maps(images, blocks=[2])


def test_model_can_be_loaded_for_another_image_size(folder):
    model = fd_jax.load_model(folder, image_size=48)
    features = model(model.preprocess(tiny.batch(1, side=48)["image"]))
    assert features.grid == (6, 6)
    assert model.spec.arch["image_size"] == 48


def test_existing_folder_is_only_replaced_with_overwrite(folder, parts):
    other = tiny.randomize(parts, 9)
    with pytest.raises(ModelFolderError, match="exists and is not overwritten"):
        model_folder.save(folder, tiny.teacher_spec(), other)
    jax.tree.map(np.testing.assert_array_equal, model_folder.load(folder)[1], parts)
    model_folder.save(folder, tiny.teacher_spec(), other, overwrite=True)
    jax.tree.map(np.testing.assert_array_equal, model_folder.load(folder)[1], other)


SAVE = """
import sys
sys.path.insert(0, {root!r})
import os
os.environ["JAX_PLATFORMS"] = "cpu"
import numpy as np
from fd_jax import model_folder
from fd_jax.models.spec import split
from flax import nnx
from tests import tiny
spec = tiny.teacher_spec(width=768, depth=6, heads=12, mlp_width=3072)
params = split(spec.build(rngs=nnx.Rngs(0)))[1]
print("saving", flush=True)
model_folder.save({folder!r}, spec, {{"encoder": params}}, overwrite=True)
print("saved", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "delay",
    [
        pytest.param(0.0, marks=pytest.mark.slow),
        0.05,
        pytest.param(0.3, marks=pytest.mark.slow),
    ],
)
def test_a_kill_leaves_the_old_folder_or_the_new_one(folder, delay):
    before, _ = model_folder.load(folder)
    code = SAVE.format(root=str(ROOT), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "saving\n"
    time.sleep(delay)
    process.kill()
    finished = process.communicate()[0] == "saved\n"
    spec, _ = model_folder.load(folder)
    assert spec.arch["width"] == 768 if finished else spec.arch["width"] in (48, 768)
    assert before.arch["width"] == 48
    # Files that the killed process left do not prevent another save.
    model_folder.save(folder, tiny.teacher_spec(), model_parts(), overwrite=True)
    assert model_folder.load(folder)[0].arch["width"] == 48


def model_parts():
    return {"encoder": split(tiny.teacher_spec().build(rngs=nnx.Rngs(0)))[1]}


def test_missing_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(ModelFolderError, match="no model folder at .*convert_checkpoints.py"):
        model_folder.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFolderError, match="holds no model.json"):
        model_folder.load(tmp_path / "empty")


def edit(folder, **fields):
    """Changes the description, as in a folder that somebody wrote by hand."""
    (folder / model_folder.DIGESTS).unlink()
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"format_version": 99}, "format version 99"),
        ({"colour": "red"}, "'colour': there is no such field"),
        ({"family": "resnet"}, "family='resnet' is unknown"),
        ({"arch": {**tiny.TEACHER, "depth": 3}}, "missing encoder/blocks/2/"),
        ({"arch": {**tiny.TEACHER, "depth": 1}}, "unexpected encoder/blocks/1/"),
        ({"arch": {**tiny.TEACHER, "mlp_width": 64}}, r"has shape \(48, 96\), expected \(48, 64\)"),
    ],
)
def test_description_that_does_not_match_the_weights_is_refused(folder, fields, message):
    edit(folder, **fields)
    with pytest.raises(ModelFolderError, match=message):
        model_folder.load(folder)


SEGMENTER = {
    "classes": 3,
    "neck": "none",
    "decoder": "linear",
    "channels": 8,
    "auxiliary_channels": 0,
    "dropout": 0.1,
    "blocks": [1],
}


@pytest.fixture
def segmenter_folder(tmp_path, parts):
    spec = dataclasses.replace(tiny.teacher_spec(), segmenter=SEGMENTER)
    module = spec.build_segmenter(rngs=nnx.Rngs(0))
    parts["segmenter"] = tiny.randomize(split(module)[1], 4)
    parts["segmenter_statistics"] = tiny.randomize(module.fresh_statistics(), 5)
    model_folder.save(tmp_path / "segmenter", spec, parts)
    return tmp_path / "segmenter"


def test_a_segmenter_comes_back_with_its_statistics(segmenter_folder, parts):
    spec, loaded = model_folder.load(segmenter_folder)
    jax.tree.map(np.testing.assert_array_equal, loaded, parts)
    definition, shapes, statistics = spec.abstract_segmenter()
    for part, expected in (("segmenter", shapes), ("segmenter_statistics", statistics)):
        assert jax.tree.map(np.shape, loaded[part]) == jax.tree.map(np.shape, expected)
    encoder = nnx.merge(spec.abstract()[0], loaded["encoder"])
    images = spec.normalize(tiny.batch(2)["image"])
    maps = encoder.intermediates(images, spec.segmenter["blocks"])
    segment = nnx.merge(definition, loaded["segmenter"])
    assert segment(maps, loaded["segmenter_statistics"]).logits.shape == (2, 4, 4, 3)


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"classes": 4}, r"classifier/bias has shape \(3,\), expected \(4,\)"),
        (
            {"auxiliary_channels": 8, "blocks": [0, 1, 1]},
            "missing segmenter/auxiliary/class",
        ),
        ({"blocks": [2]}, r"blocks \[2\] are named, but the encoder has 2"),
        ({"colour": "red"}, "colour"),
        ({"neck": "giraffe"}, "giraffe"),
    ],
    ids=["classes", "auxiliary", "blocks", "unknown", "neck"],
)
def test_segmenter_that_does_not_match_the_weights_is_refused(segmenter_folder, changed, message):
    edit(segmenter_folder, segmenter={**SEGMENTER, **changed})
    with pytest.raises(ModelFolderError, match=message):
        model_folder.load(segmenter_folder)


def test_folder_without_its_segmenter_is_refused(folder):
    edit(folder, segmenter=SEGMENTER)
    with pytest.raises(ModelFolderError, match="missing segmenter/decoder/classifier/kernel"):
        model_folder.load(folder)


def test_description_without_a_segmenter_is_that_of_earlier_versions(folder):
    text = (folder / "model.json").read_text()
    assert "segmenter" not in text
    assert model_folder.load_spec(folder).to_json() == text


def test_description_that_is_not_json_is_refused(folder):
    (folder / model_folder.DIGESTS).unlink()
    (folder / "model.json").write_text("{")
    with pytest.raises(ModelFolderError, match="is not a model description"):
        model_folder.load(folder)


def test_damaged_weights_are_named(folder):
    for file in (folder / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 2000:
            file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelFolderError, match=f"weights in {folder} cannot be read"):
        model_folder.load(folder)


def test_unknown_part_is_refused(tmp_path, parts):
    with pytest.raises(ModelFolderError, match="no part \\['decoder'\\]"):
        model_folder.save(tmp_path / "model", tiny.teacher_spec(), {**parts, "decoder": {}})


@pytest.mark.parametrize(
    "images, remedy",
    [
        (np.zeros((1, 32, 32, 3), np.float32), "np.round(255 * images)"),
        (np.zeros((1, 32, 32, 3), np.uint16), "images >> 8"),
        (np.zeros((1, 32, 32, 3), np.int64), "int64 [1, 32, 32, 3]"),
        (np.zeros((32, 32, 3), np.uint8), "image[None]"),
        (np.zeros((1, 3, 32, 32), np.uint8), "np.moveaxis"),
        ([[0, 1]], "list"),
    ],
    ids=["float", "16 bit", "int", "single image", "channels first", "list"],
)
def test_preprocess_refuses_what_would_give_other_features(teacher, images, remedy):
    model = fd_jax.load_model(teacher)
    with pytest.raises(DataError, match=re.escape(remedy)):
        model.preprocess(images)


@pytest.fixture
def segmenting(tmp_path):
    made = segments.spec()
    model_folder.save(tmp_path / "segmenting", made, segments.parts(made))
    return model_folder.load_model(tmp_path / "segmenting")


def test_labels_equal_those_of_an_evaluation(segmenting):
    pictures = [segments.picture(i, size).image for i, size in enumerate(segments.SIZES)]
    labels = segmenting.segment(pictures)
    assert [label.shape for label in labels] == list(segments.SIZES)
    assert all(label.dtype == np.int32 for label in labels)
    assert len(np.unique(np.concatenate([label.ravel() for label in labels]))) > 2
    made = segments.spec()
    run = segments.compiled(made, jax.devices()[:1])
    items = [
        segments.Picture(i, str(i), picture, label.astype(np.uint8))
        for i, (picture, label) in enumerate(zip(pictures, labels, strict=True))
    ]
    for stride, same in ((21, True), (32, False)):
        evaluator = segmentation.Segmented(8, 5, 32, scale=(128, 32), stride=stride)
        result = evaluator(run, segments.weights(made, run.mesh), segments.Pictures(items))
        assert (result["aacc"] > 0.9998) == same
    assert segmenting._logits._cache_size() == 1
    array = np.stack([pictures[0], pictures[0][::-1]])
    np.testing.assert_array_equal(segmenting.segment(array)[0], labels[0])


def test_logits_are_those_of_the_network(segmenting):
    images = np.stack([segments.picture(i, (32, 32)).image for i in range(3)])
    got = segmenting.segment(images, logits=True)
    made = segments.spec()
    run = segments.compiled(made, jax.devices()[:1])
    weights = segments.weights(made, run.mesh)
    want = run.predict(weights.params, weights.extra, {}, {"image": images})
    assert got.shape == (3, 16, 16, 5) and got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_segmenting_refuses_what_it_cannot_do(segmenting, folder, tmp_path):
    with pytest.raises(ModelFolderError, match="'tiny' has no segmenter.*finetune.py"):
        model_folder.load_model(folder).segment([np.zeros((32, 32, 3), np.uint8)])
    with pytest.raises(DataError, match=r"float32 \[1, 40, 50, 3\]; expected uint8"):
        segmenting.segment([np.zeros((40, 50, 3), np.float32)])
    with pytest.raises(DataError, match="Use image\\[None\\]"):
        segmenting.segment(np.zeros((40, 50, 3), np.uint8))
    with pytest.raises(DataError, match="40 x 32 pixels, and the network reads 32 x 32"):
        segmenting.segment(np.zeros((2, 40, 32, 3), np.uint8), logits=True)
    wide = model_folder.load_model(tmp_path / "segmenting", image_size=(32, 48))
    with pytest.raises(ModelFolderError, match="reads 32 x 48 pixels; load it with image_size=N"):
        wide.segment([np.zeros((40, 50, 3), np.uint8)])
