"""What the registry promises about every family, and to a family that is added."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fd_jax.convert import exporting, families, identifying, importing, inspecting, networks
from fd_jax.convert.containers import safetensors_io
from fd_jax.convert.containers.opening import open_container
from fd_jax.convert.families import timm_vit
from fd_jax.convert.family import Family
from fd_jax.convert.huggingface import HuggingFace
from fd_jax.convert.rules.matching import invert
from fd_jax.convert.rules.tables import prefixed
from fd_jax.convert.source import Part, Source
from fd_jax.convert.timm import Timm
from fd_jax.convert.trees import flat
from tests.convert import synthetic


def test_every_module_of_the_folder_is_in_the_registry_under_its_name():
    modules = {path.stem for path in Path(families.__file__).parent.glob("*.py")} - {"__init__"}
    assert modules == {family.name for family in families.FAMILIES}


def test_no_two_families_have_a_source_or_a_format_of_the_same_name():
    described = [f.described.name for f in families.FAMILIES if f.described is not None]
    names = [source.name for family in families.FAMILIES for source in family.sources]
    names += [*described, importing.AUTO]
    assert len(names) == len(set(names))
    written = [name for family in families.FAMILIES for name in family.formats]
    assert len(written) == len(set(written))


@pytest.mark.parametrize("kind", [Timm, HuggingFace])
def test_no_published_network_has_two_layouts_in_one_library(kind):
    """Two that leave the same parameters behind would be chosen between by their order."""
    for name in synthetic.names():
        for part in synthetic.small_source(name).parts.values():
            paths = {p for p in networks.shapes(part.spec) if p.startswith("encoder/")}
            asked = [one for one in families.layouts(kind) if one.network == part.spec.family]
            fits = [one.class_name for one in asked if not one.fit(part.spec, paths).problems]
            assert len(fits) <= 1, (name, fits)


@pytest.fixture
def added(monkeypatch):
    """A family that no other code knows: DeiT's network under names that begin with "toy."."""
    table = prefixed(timm_vit.TABLE, "toy.")
    arch = {**timm_vit.ARCH, **synthetic.SMALL, "image_size": 12}
    spec = dataclasses.replace(timm_vit.DEIT, arch=arch)
    parts = {"backbone": Part(table, spec)}
    source = Source("toy_vit", "toy.safetensors", parts, "itself", certain=True)
    family = Family("toy", (source,))
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, family))
    monkeypatch.setitem(families.SOURCES, "toy_vit", source)
    return source


def toy_file(source, folder):
    (part,) = source.parts.values()
    rng = np.random.default_rng(0)
    shapes = networks.shapes(part.spec)
    params = {
        path: rng.standard_normal(shape).astype(np.float32)
        for path, shape in shapes.items()
        if path.startswith("encoder/")
    }
    tensors = dict(invert(part.table, params, part.spec.arch, derived=False))
    safetensors_io.write(folder / "toy.safetensors", tensors, {})
    return folder / "toy.safetensors", params


def test_an_added_family_is_identified_imported_and_exported_without_other_changes(added, tmp_path):
    path, params = toy_file(added, tmp_path)
    assert "toy_vit: fits completely" in inspecting.inspect(path)
    result = importing.import_file("auto", path, tmp_path / "model")
    assert result.source == "toy_vit"
    assert flat(result.params).keys() == params.keys()
    exporting.export("source", tmp_path / "model", tmp_path / "back.safetensors")
    back = safetensors_io.read(tmp_path / "back.safetensors").tensors
    for name, tensor in safetensors_io.read(path).tensors.items():
        np.testing.assert_array_equal(back[name].load(), tensor.load())
    exporting.export("timm", tmp_path / "model", tmp_path / "timm")
    assert "cls_token" in open_container(tmp_path / "timm").tensors


def test_a_file_that_fits_nothing_is_told_what_comes_nearest(added, tmp_path):
    path, _ = toy_file(added, tmp_path)
    tensors = {n: t.load().copy() for n, t in safetensors_io.read(path).tensors.items()}
    del tensors["toy.norm.bias"]
    safetensors_io.write(path, tensors, {})
    expected = len(tensors) + 1
    message = f"the nearest is toy_vit .{expected - 1} of {expected} tensors fit, 1 problem."
    with pytest.raises(identifying.ConversionError, match=message):
        importing.read("auto", path)
    safetensors_io.write(path, {"a": np.zeros(3, np.float32)}, {})
    with pytest.raises(identifying.ConversionError, match="it fits no source; none comes near"):
        importing.read("auto", path)
