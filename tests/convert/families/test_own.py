"""What we export is read back: our own safetensors, and the official layout."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from fd_jax import model_folder
from fd_jax.convert import exporting, families, importing, inspecting
from fd_jax.convert.containers import safetensors_io
from fd_jax.convert.trees import flat
from fd_jax.errors import ConversionError
from tests.convert import synthetic

NAME = "fd_official_distilled_clip_vit_b"


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A small model folder."""
    for name in synthetic.names():
        monkeypatch.setitem(families.SOURCES, name, synthetic.small_source(name))
    given = synthetic.structure(NAME)
    importing.import_file(
        NAME, synthetic.write(given, synthetic.values(given), tmp_path), tmp_path / "model"
    )
    return tmp_path / "model"


@pytest.mark.parametrize("source", ["fd_jax", "auto"])
def test_our_safetensors_give_the_same_model_folder(model, tmp_path, source):
    exporting.export("safetensors", model, tmp_path / "student.safetensors")
    result = importing.import_file(source, tmp_path / "student.safetensors", tmp_path / "again")
    assert result.source == "fd_jax"
    spec, params = model_folder.load(model)
    back, params_back = model_folder.load(tmp_path / "again")
    assert back == spec
    jax.tree.map(np.testing.assert_array_equal, params_back, params)
    # The name of the first file is still known, so its layout can be written.
    exporting.export("source", tmp_path / "again", tmp_path / "source.safetensors")


def test_the_official_export_is_a_file_of_its_source(model, tmp_path):
    exporting.export("official", model, tmp_path / "student.pth")
    back = importing.read(NAME, tmp_path / "student.pth").params
    _, params = model_folder.load(model)
    jax.tree.map(np.testing.assert_array_equal, back["encoder"], params["encoder"])
    assert set(back) == {"encoder"}


def test_export_to_source_of_a_trained_model_is_refused(model, tmp_path):
    spec, params = model_folder.load(model)
    trained = dataclasses.replace(spec, source="distillation from dino_vitb16")
    model_folder.save(tmp_path / "trained", trained, params)
    with pytest.raises(ConversionError, match="not imported .its source is 'distillation from"):
        exporting.export("source", tmp_path / "trained", tmp_path / "x.safetensors")


BAD = {
    "no description": (None, "no model.json in the metadata"),
    "no json": ("{", "is not a model description"),
    "another version": ({"format_version": 99}, "format version 99"),
    "unknown family": ({"family": "hiera"}, "family='hiera' is unknown"),
    "unknown keyword": ({"arch": {"colour": 1}}, "describes no network"),
    "no arch": ({"arch": None}, "describes no network"),
    "too deep": ({"arch": {"depth": 10**6}}, "describes no network: arch.depth=1000000"),
    "too many patches": ({"arch": {"image_size": 10**6}}, "no network: arch.image_size=1000000"),
    "negative": ({"arch": {"depth": -1}}, "describes no network: arch.depth=-1"),
    "nothing": ({"arch": {"patch_size": 0}}, "describes no network"),
    "wider": ({"arch": {"width": 64}}, "is not a fd_jax file"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_description_that_fits_no_network_is_one_error(case, model, tmp_path):
    changes, message = BAD[case]
    path = tmp_path / "bad.safetensors"
    spec, params = model_folder.load(model)
    fields = json.loads(spec.to_json())
    if isinstance(changes, dict):
        changed = changes.get("arch", {})
        fields |= changes
        if changed is not None:
            fields["arch"] = {**spec.arch, **changed}
    text = changes if isinstance(changes, str) else json.dumps(fields)
    metadata = {} if changes is None else {"model.json": text}
    safetensors_io.write(path, flat(params), metadata)
    with pytest.raises(ConversionError, match=message) as caught:
        importing.read("fd_jax", path)
    assert str(path) in str(caught.value)
    inspecting.inspect(path)
