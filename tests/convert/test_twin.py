"""A model folder and its export to `transformers`, by the lines in docs/your_own_data.md."""

import pathlib
import re

import numpy as np
from PIL import Image
import pytest

import fd_jax
from fd_jax import model_folder
from fd_jax.convert import exporting
from tests import tiny

PAGE = pathlib.Path(__file__).parent.parent.parent / "docs" / "your_own_data.md"


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """The lines of the page, in a folder that has what they read."""
    monkeypatch.chdir(tmp_path)
    student = tiny.save_student(tmp_path / "runs/own/student/model")
    exporting.export("huggingface", student, tmp_path / "runs/own/huggingface")
    (tmp_path / "pictures/brick").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    Image.fromarray(pixels).save("pictures/brick/00.png")
    (shown,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
        if "AutoModel" in block
    )
    return shown


def test_the_lines_of_the_page_hold(lines):
    exec(lines, {})


def test_they_do_not_hold_for_another_network(lines):
    """A negative control: one weight of the model folder differs by a hundredth."""
    folder = "runs/own/student/model"
    spec, parts = model_folder.load(folder)
    parts["encoder"]["norm"]["bias"] = parts["encoder"]["norm"]["bias"] + 0.01
    model_folder.save(folder, spec, parts, overwrite=True)
    assert fd_jax.load_model(folder)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        exec(lines, {})
