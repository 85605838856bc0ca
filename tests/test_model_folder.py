"""Model folders: exact round trips, atomic writes, and clear errors."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import time

from flax import nnx
import jax
import numpy as np
import pytest

from fd_jax import model_folder
from fd_jax.errors import ModelFolderError
from fd_jax.models.spec import split
from tests import tiny

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
        ({"family": "hiera"}, "family='hiera' is unknown"),
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
