"""Descriptions of networks from strangers: refused in one message before anything is built."""

import dataclasses
import json

import pytest

from fd_jax.errors import ModelFolderError
from fd_jax.models import architectures, description
from fd_jax.models.spec import ModelSpec
from tests import tiny
from tests.models import convnexts, evas, resnets


def fields(**changes):
    found = json.loads(tiny.teacher_spec().to_json())
    rows = architectures.ARCHITECTURES["vit"]
    arch = {name: changes.pop(name) for name in list(changes) if name in rows}
    return {**found, "arch": {**found["arch"], **arch}, **changes}


def read(found):
    return ModelSpec.from_json(json.dumps(found), where="a/model.json")


SEGMENTER = {"blocks": [0, 1], "classes": 5, "neck": "none", "decoder": "linear"}


def test_every_field_has_a_rule():
    names = {field.name for field in dataclasses.fields(ModelSpec)}
    assert description.FIELDS.keys() | set(description.SECTIONS) == names


@pytest.mark.parametrize(
    "spec",
    [
        tiny.teacher_spec(),
        tiny.swin_spec(1),
        tiny.swin_spec(2),
        convnexts.spec("v1"),
        resnets.spec(),
        dataclasses.replace(tiny.teacher_spec(), segmenter=SEGMENTER),
        dataclasses.replace(tiny.teacher_spec(position="rope", image_size=1024), pixel_scale=1.0),
        *(evas.spec(name) for name in evas.ARCHITECTURES),
        dataclasses.replace(tiny.teacher_spec(), pool={"kind": "projection", "width": 8}),
        dataclasses.replace(tiny.teacher_spec(), origins={"heads": "config.json"}),
    ],
    ids=[
        *("vit", "swin", "swin_v2", "convnext", "resnet", "segmenter", "large picture"),
        *evas.ARCHITECTURES,
        *("pool", "origins"),
    ],
)
def test_what_this_library_writes_is_read_again(spec):
    again = ModelSpec.from_json(spec.to_json(), where="")
    assert again.to_json() == spec.to_json()


def test_a_plain_network_is_described_as_by_earlier_versions():
    """Field by field: later ones are not mentioned where they say nothing."""
    arch = ",\n".join(f'    "{name}": {json.dumps(value)}' for name, value in tiny.TEACHER.items())
    numbers = {
        name: json.dumps(getattr(ModelSpec, name), indent=2).replace("\n", "\n  ")
        for name in ("mean", "std", "pixel_scale")
    }
    rest = {"position_resize": "size", "classes": 0, "pooling": "cls", "source": "tiny"}
    rest |= {"source_sha256": None, "source_dtypes": {}, "notes": "", "format_version": 1}
    fields = {"family": '"vit"', "arch": f"{{\n{arch}\n  }}", **numbers}
    fields |= {name: json.dumps(value) for name, value in rest.items()}
    lines = ",\n".join(f'  "{name}": {value}' for name, value in fields.items())
    assert tiny.teacher_spec().to_json() == f"{{\n{lines}\n}}\n"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": -32}, r"arch.width=-32: expected a whole number from 1 to 65536"),
        ({"width": 2**60}, r"arch.width=\d+: expected a whole number from 1 to 65536"),
        ({"width": "48"}, r"arch.width='48': expected"),
        ({"width": True}, r"arch.width=True: expected"),
        ({"heads": 0}, r"arch.heads=0: expected a whole number from 1 to 1024"),
        ({"depth": 10_000}, r"arch.depth=10000: expected a whole number from 1 to 256"),
        ({"image_size": 10**6}, r"arch.image_size=1000000: expected"),
        ({"image_size": [32]}, r"arch.image_size=\[32\]: expected 2 values"),
        ({"image_size": 30}, r"image_size 30 is not divisible by patch_size 8"),
        ({"image_size": 8192, "patch_size": 1}, r"67108864 patches; expected at most 65536"),
        ({"position": "left"}, r"arch.position='left' is unknown; expected one of"),
        ({"activation": []}, r"arch.activation=\[\] is unknown"),
        ({"norm_eps": float("nan")}, r"arch.norm_eps=nan: expected"),
        ({"arch": [1, 2]}, r"arch=\[1, 2\]: expected the fields image_size, patch_size"),
        ({"arch": {"width": 3}}, r"arch.image_size is missing"),
        ({"wings": 2}, r"'wings': there is no such field"),
        ({"family": "cnn"}, r"family='cnn' is unknown; expected one of 'vit', 'swin', 'swin_v2'"),
        ({"family": None}, r"family=None is unknown"),
        ({"mean": [float("nan"), 0.5, 0.5]}, r"mean=\[nan, 0.5, 0.5\]: expected a finite number"),
        ({"mean": [0.5] * 4}, r"mean=\[0.5, 0.5, 0.5, 0.5\]: expected 3 values"),
        ({"mean": 0.5}, r"mean=0.5: expected 3 values"),
        ({"std": [0, 0.5, 0.5]}, r"std=\[0, 0.5, 0.5\]: expected a finite number above 0"),
        ({"pixel_scale": -1}, r"pixel_scale=-1: expected"),
        ({"classes": 2**40}, r"classes=\d+: expected a whole number from 0 to 1048576"),
        ({"source_dtypes": {"a": 3}}, r"source_dtypes=.*: expected a dtype per tensor name"),
        ({"origins": {"heads": 12}}, r"origins=.*: expected where each fact comes from"),
        ({"pool": "mean"}, r"pool.kind=None is unknown; expected one of 'attention'"),
        ({"gated_mlp": 1}, r"arch.gated_mlp=1: expected True or False"),
        ({"rope_pairs": "thirds"}, r"arch.rope_pairs='thirds' is unknown; expected one of"),
        ({"rope_reference": -1}, r"arch.rope_reference=-1: expected a whole number from 0 to"),
        ({"rope_offset": 1e9}, r"arch.rope_offset=1000000000.0: expected"),
        ({"partial_patches": "pad"}, r"arch.partial_patches='pad' is unknown; expected one of"),
        ({"segmenter": 5}, r"segmenter=5: expected the fields blocks, classes"),
        ({"segmenter": {**SEGMENTER, "channels": 10**9}}, r"segmenter.channels=1000000000: expec"),
        ({"segmenter": {"classes": 5}}, r"segmenter.blocks is missing"),
        ({"format_version": 99}, r"format version 99"),
        ({"source": "x" * 10**6, "wings": 1}, r"there is no such field"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_named(changes, message):
    with pytest.raises(ModelFolderError, match=f"a/model.json .*{message}") as caught:
        read(fields(**changes))
    assert len(str(caught.value)) < 500


def test_several_sizes_within_their_bounds_may_be_too_much_together():
    swin = json.loads(tiny.swin_spec().to_json())
    swin["arch"].update(depths=[200, 200, 2], heads=[2, 2, 4])
    with pytest.raises(ModelFolderError, match="expected at most 256 blocks in all"):
        read(swin)
    with pytest.raises(ModelFolderError, match="too large rotary tables"):
        read(fields(position="rope", image_size=4096, patch_size=16, width=4096, heads=2))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '"a"', "{}", "[" * 100_000, '{"format_version": ' + "9" * 5000],
    ids=lambda text: repr(text[:20]),
)
def test_a_text_that_is_no_description_is_one_message(text):
    with pytest.raises(ModelFolderError, match="^a/model.json (is not a model|has format)"):
        ModelSpec.from_json(text, where="a/model.json")


@pytest.mark.slow
def test_the_largest_network_within_the_bounds_is_defined_without_computing_anything():
    """Negative control of the bounds: what they allow costs little."""
    spec = read(fields(depth=description.MOST_BLOCKS, width=2**16, heads=1024, mlp_width=2**18))
    assert len(spec.abstract()[1]["blocks"]) == description.MOST_BLOCKS
