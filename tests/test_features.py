"""Extracted features of digits and of a folder, against direct calls of the network."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

from fd_jax import features, load_model
from fd_jax.data import datasets, transforms
from fd_jax.errors import ConfigError, DataError
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent
COUNT = 37  # a prime, so that the last batch is padded and devices get different parts of it


@pytest.fixture(scope="module")
def digits(embedded_data):
    return datasets.open_dataset("digits", f"test[:{COUNT}]", data_dir=embedded_data)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two class folders of images of various sizes, in three formats."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, size in (("b/1.png", (50, 40)), ("a/2.jpg", (33, 61)), ("a/1.bmp", (40, 40))):
        path = root / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return root


def by_hand(folder, dataset, **load):
    """Calls the network on one image at a time. -> (tokens [N, T, D], the last FeatureMap)."""
    model = load_model(folder, **load)
    transform = transforms.EvalTransform(model.spec.arch["image_size"])
    tokens = []
    for index in range(len(dataset)):
        layout = model(model.preprocess(transform(dataset[index].image)[None]))
        tokens.append(np.asarray(layout.full[0]))
    return np.stack(tokens), layout


def run(*flags):
    return features.main([*flags])


def test_features_of_another_shape_equal_the_model_called_by_hand(
    teacher, digits, embedded_data, tmp_path
):
    output = tmp_path / "wide.npz"
    flags = (f"--model={teacher}", "--input=digits", f"--split=test[:{COUNT}]")
    flags += (f"--data_dir={embedded_data}", f"--output={output}", "--tokens=full")
    assert run(*flags, "--image_size=24x40") == 0
    with np.load(output) as file:
        extracted = dict(file)
    assert tuple(extracted["grid"]) == (3, 5)
    tokens, _ = by_hand(teacher, digits, image_size=(24, 40))
    np.testing.assert_allclose(extracted["full"], tokens, atol=2e-5)
    # Negative control: the same area the other way round gives other features.
    turned, _ = by_hand(teacher, digits, image_size=(40, 24))
    assert np.abs(extracted["full"] - turned).max() > 0.1


def test_digits_equal_the_model_called_by_hand(teacher, digits, embedded_data, tmp_path, capsys):
    output = tmp_path / "made" / "digits.npz"
    flags = (f"--model={teacher}", "--input=digits", f"--split=test[:{COUNT}]")
    flags += (f"--data_dir={embedded_data}", f"--output={output}", "--tokens=cls,mean,full")
    assert run(*flags, "--batch_size=16") == 0
    assert "cls [37, 48]" in capsys.readouterr().out
    assert list(output.parent.iterdir()) == [output]
    with np.load(output) as file:  # without pickles
        extracted = dict(file)
    assert set(extracted) == {"cls", "mean", "full", "labels", "names", "grid"}
    tokens, layout = by_hand(teacher, digits)
    np.testing.assert_allclose(extracted["full"], tokens, atol=2e-5)
    np.testing.assert_allclose(extracted["cls"], tokens[:, 0], atol=2e-5)
    np.testing.assert_allclose(extracted["mean"], tokens[:, 1:].mean(axis=1), atol=2e-5)
    assert extracted["cls"].dtype == extracted["mean"].dtype == np.float32
    # Negative control: rows shifted by one differ.
    assert np.abs(extracted["cls"] - np.roll(tokens[:, 0], 1, axis=0)).max() > 0.1
    np.testing.assert_array_equal(extracted["labels"], [digits[i].label for i in range(COUNT)])
    assert extracted["labels"].dtype == np.int32
    assert list(extracted["names"]) == [digits.describe(i) for i in range(COUNT)]
    assert tuple(extracted["grid"]) == layout.grid


def test_batches_are_split_over_all_devices(teacher, digits, monkeypatch):
    shard_sizes = []
    forward = features.Model.__call__

    def watched(self, images):
        if not isinstance(images, jax.core.Tracer):  # shape inference uses no device
            shard_sizes.append(sorted(shard.data.shape[0] for shard in images.addressable_shards))
        return forward(self, images)

    model = load_model(teacher)
    monkeypatch.setattr(features.Model, "__call__", watched)
    features.extract(model, digits, batch_size=16)
    assert shard_sizes == [[2] * jax.device_count()] * 3


def test_features_of_a_folder_at_another_input_size(teacher, pictures, tmp_path):
    output = tmp_path / "mine.npz"
    flags = (f"--model={teacher}", f"--input={pictures}", f"--output={output}")
    assert run(*flags, "--image_size=48") == 0
    dataset = datasets.open_dataset(f"folder:{pictures}", "train")
    tokens, layout = by_hand(teacher, dataset, image_size=48)
    assert layout.grid == (6, 6)
    extracted = np.load(output)
    assert set(extracted.files) == {"cls", "mean", "labels", "names", "class_names"}
    assert list(extracted["class_names"]) == ["a", "b"]
    np.testing.assert_allclose(extracted["cls"], tokens[:, 0], atol=2e-5)
    np.testing.assert_allclose(extracted["mean"], tokens[:, 1:].mean(axis=1), atol=2e-5)
    assert list(extracted["labels"]) == [0, 0, 1]
    assert [os.path.relpath(name, pictures) for name in extracted["names"]] == [
        "a/1.bmp", "a/2.jpg", "b/1.png",
    ]  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "folder:"])
def test_a_folder_without_classes_has_no_labels(teacher, pictures, tmp_path, prefix):
    output = tmp_path / "flat.npz"
    assert run(f"--model={teacher}", f"--input={prefix}{pictures}/a", f"--output={output}") == 0
    with np.load(output) as file:
        assert list(file["labels"]) == [-1, -1] and "class_names" not in file


def test_a_network_without_class_token_gives_only_the_mean(digits, tmp_path):
    folder = tiny.save_teacher(tmp_path / "no_cls", cls_token=False, registers=2)
    model = load_model(folder)
    extracted = features.extract(model, digits, batch_size=8)
    assert set(extracted) == {"mean", "labels", "names"}
    tokens, _ = by_hand(folder, digits)  # `full` leaves the registers out
    np.testing.assert_allclose(extracted["mean"], tokens.mean(axis=1), atol=2e-5)
    with pytest.raises(ConfigError, match="no class token; use 'mean'"):
        features.extract(model, digits, tokens=["cls"])


def test_broken_images_are_refused_or_left_out(teacher, pictures, tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    for number, name in enumerate(("a/1.bmp", "a/2.jpg", "b/1.png")):
        (folder / f"{number}.png").write_bytes((pictures / name).read_bytes())
    (folder / "1.png").write_bytes(b"not a picture")
    dataset, model = datasets.open_dataset(f"folder:{folder}", ""), load_model(teacher)
    with pytest.raises(DataError, match="1.png"):
        features.extract(model, dataset)
    extracted = features.extract(model, dataset, max_broken=1)
    assert [pathlib.Path(name).name for name in extracted["names"]] == ["0.png", "2.png"]
    assert extracted["cls"].shape == (2, 48)
    tokens, _ = by_hand(teacher, [dataset[0], dataset[2]])
    np.testing.assert_allclose(extracted["cls"], tokens[:, 0], atol=2e-5)


@pytest.mark.parametrize(
    "flags,message",
    [
        ({"model": "missing"}, "no model folder at missing"),
        ({"input": "digitz"}, "TFDS has no dataset 'digitz'"),
        ({"input": "./missing"}, "no folder of images at missing"),
        ({"input": "folder:missing"}, "no folder of images at missing"),
        ({"split": "tset"}, "no split 'tset'"),
        ({"tokens": "patches"}, "tokens .'patches'. are unknown"),
        ({"image_size": "33"}, "33 is not divisible by patch_size 8"),
        ({"batch_size": "12"}, "batch_size 12 is not divisible by 8"),
        ({"batch_size": "0"}, "batch_size 0; expected 1"),
        ({"output": "file/inside.npz"}, "cannot write file/inside.npz"),
        ({"output": "features"}, "ends in .npz"),
        ({"output": "there.npz"}, "there.npz exists"),
        ({"output": "folder.npz", "overwrite": None}, "folder.npz exists"),
    ],
)
def test_wrong_flags_are_refused_before_any_work(
    teacher, embedded_data, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("file").write_text("")
    pathlib.Path("there.npz").write_text("kept")
    pathlib.Path("folder.npz").mkdir()
    monkeypatch.setattr(
        transforms.EvalTransform, "__call__", None
    )  # reading an image would raise a TypeError
    fields = {"model": teacher, "input": "digits", "data_dir": embedded_data, "output": "new.npz"}
    given = {**fields, **flags}
    assert run(*(f"--{k}={v}" if v is not None else f"--{k}" for k, v in given.items())) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error)
    left = {path.name for path in pathlib.Path().iterdir()}
    assert left == {"file", "there.npz", "folder.npz"}
    assert pathlib.Path("there.npz").read_text() == "kept"


def test_a_failure_midway_leaves_the_old_file(teacher, pictures, tmp_path, monkeypatch):
    output = tmp_path / "old.npz"
    output.write_text("kept")
    flags = (f"--model={teacher}", f"--input={pictures}", f"--output={output}", "--overwrite")

    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", full_disk)
        assert run(*flags) == 2
    assert output.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [output]
    assert run(*flags) == 0
    assert np.load(output)["mean"].shape == (3, 48)


@pytest.mark.slow
def test_the_module_runs_as_a_command(teacher, pictures, tmp_path):
    command = [sys.executable, "-m", "fd_jax.features", f"--model={teacher}"]
    command += [f"--input={pictures}", f"--output={tmp_path / 'mine.npz'}", "--tokens=mean"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mean [3, 48]" in done.stdout
