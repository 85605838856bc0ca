"""A model folder and its export to `transformers`, by the lines in docs/your_own_data.md."""

import dataclasses
import pathlib
import re

import jax
import numpy as np
from PIL import Image
import pytest

import fd_jax
from fd_jax import model_folder
from fd_jax.convert import exporting
from tests import tiny

FOLDER = "runs/own/finetuned/model"
PAGE = pathlib.Path(__file__).parent.parent.parent / "docs" / "your_own_data.md"


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """The lines of the page, in a folder that has what they read."""
    monkeypatch.chdir(tmp_path)
    spec, parts = model_folder.load(tiny.save_student(tmp_path / "student"))
    del parts["encoder"]["norm"]  # as fine-tuning does, whose head normalises the mean
    rng, width = np.random.default_rng(1), spec.arch["width"]
    parts |= {
        "head": {"kernel": rng.normal(size=(width, 3)), "bias": rng.normal(size=3)},
        "fc_norm": {"scale": rng.normal(size=width), "bias": rng.normal(size=width)},
    }
    parts = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), parts)
    spec = dataclasses.replace(
        spec,
        arch={**spec.arch, "final_norm": False},
        classes=3,
        pooling="mean_norm",
        class_names=["brick", "grass", "gravel"],
    )
    model_folder.save(tmp_path / FOLDER, spec, parts)
    exporting.export("huggingface", tmp_path / FOLDER, tmp_path / "runs/own/huggingface")
    (tmp_path / "pictures/brick").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    Image.fromarray(pixels).save("pictures/brick/04.png")
    (shown,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
        if "AutoModelFor" in block
    )
    return shown


def test_the_lines_of_the_page_hold(lines):
    exec(lines, {})


def test_they_do_not_hold_for_another_network(lines):
    """A negative control: one weight of the model folder differs by a hundredth."""
    spec, parts = model_folder.load(FOLDER)
    parts["head"]["bias"] = parts["head"]["bias"] + 0.01
    model_folder.save(FOLDER, spec, parts, overwrite=True)
    assert fd_jax.load_model(FOLDER)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        exec(lines, {})
