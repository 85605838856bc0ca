"""SIGKILL at random moments: what stands at the output is whole, the old or the new."""

from pathlib import Path
import random
import signal
import subprocess
import sys
import time

import pytest

from fd_jax import model_folder
from fd_jax.convert import families, importing
from fd_jax.convert.containers.opening import open_container
from fd_jax.errors import ModelFolderError
from tests.convert import synthetic

ROOT = Path(__file__).parents[2]
NAME = "fd_official_distilled_dino_vit_b"

# Writes the same outputs for ever, in two sizes.
LOOP = """
import itertools
from fd_jax.convert import exporting, families, importing
from tests.convert import synthetic
families.SOURCES[{name!r}] = synthetic.small_source({name!r})
print("ready", flush=True)
for size in itertools.cycle((12, 16)):
    importing.import_file({name!r}, {weights!r}, {model!r}, image_size=size, overwrite=True)
    for layout in ("huggingface", "timm"):
        exporting.export(layout, {model!r}, {folder!r} + layout, overwrite=True)
"""


@pytest.mark.slow
def test_kills_at_random_moments_leave_whole_outputs(tmp_path, monkeypatch):
    monkeypatch.setitem(families.SOURCES, NAME, synthetic.small_source(NAME))
    given = synthetic.structure(NAME)
    weights = synthetic.write(given, synthetic.values(given), tmp_path)
    model = tmp_path / "model"
    importing.import_file(NAME, weights, model)
    script = LOOP.format(
        name=NAME, weights=str(weights), model=str(model), folder=f"{tmp_path}/to_"
    )
    rng = random.Random(0)
    for _ in range(15):
        process = subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 2.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert_whole(model)
        for layout in ("huggingface", "timm"):
            output = tmp_path / f"to_{layout}"
            if output.exists():
                tensors = open_container(output).tensors
                assert tensors and all(tensor.load() is not None for tensor in tensors.values())


def assert_whole(model):
    """The folder loads; in the moment between two renames the old one stands beside it."""
    try:
        spec, _ = model_folder.load(model)
    except ModelFolderError as error:
        assert "killed between two renames" in str(error)
        spec, _ = model_folder.load(model.parent / f".{model.name}.replaced")
    assert spec.arch["image_size"] in (12, 16)


def test_a_model_set_aside_is_named_and_survives_the_next_command(tmp_path, monkeypatch):
    monkeypatch.setitem(families.SOURCES, NAME, synthetic.small_source(NAME))
    given = synthetic.structure(NAME)
    weights = synthetic.write(given, synthetic.values(given), tmp_path)
    model, aside = tmp_path / "model", tmp_path / ".model.replaced"
    importing.import_file(NAME, weights, model)
    model.rename(aside)
    with pytest.raises(ModelFolderError, match=f"The old one is {aside}: rename it"):
        model_folder.load(model)
    rename = type(model_folder.epath.Path(model)).rename

    def refuse(path, target):
        assert aside.exists(), "the old model is gone before the new one is there"
        return rename(path, target)

    monkeypatch.setattr(type(model_folder.epath.Path(model)), "rename", refuse)
    importing.import_file(NAME, weights, model)
    model_folder.load(model)
    assert not aside.exists()
