"""The command: results of several models side by side, resumption, and refusals."""

import json
import re
import shutil

import numpy as np
from PIL import Image
import pytest

from fd_jax import model_folder
from fd_jax.data import datasets
from fd_jax.diagnose import catalogue, cli, record
from tests import tiny
from tests.models import convnexts

COUNT = 21
ATTENTION = "distance,similarity,maps,shares,entropy,divergence"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "teacher": tiny.save_teacher(root / "teacher", classes=10),
        "student": tiny.save_student(root / "student"),
        "small": tiny.save_teacher(root / "small", image_size=24),
        "swin": tiny.save_swin(root / "swin"),
        "convnext": convnexts.save(root / "convnext", "v2", classes=10, image_size=64),
    }


@pytest.fixture
def run(folders, embedded_data, tmp_path, capsys):
    """Runs the command on some of the folders; returns its exit status and what it printed."""

    def call(*names, data=f"digits:test[:{COUNT}]", output="out", **flags):
        argv = [f"--model={folders[name]}" for name in names]
        argv += [f"--data={data}", f"--data_dir={embedded_data}", f"--output={tmp_path / output}"]
        for name, value in flags.items():
            argv.append(f"--{name}" if value is True else f"--{name}={value}")
        status = cli.main([*argv, "--threads=2"])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def figures(tmp_path, output="out"):
    return json.loads((tmp_path / output / "figures.json").read_text())


@pytest.mark.slow
def test_two_models_side_by_side_give_every_figure(run, tmp_path):
    wanted = [name for name in catalogue.FIGURES if name != "landscape"]
    status, out, err = run("teacher", "student", figures=",".join(wanted), batch_size=8)
    assert status == 0, err
    result = figures(tmp_path)
    assert result["images"] == COUNT and result["image_size"] == 32
    assert list(result["models"]) == ["teacher", "student"]
    for model in result["models"].values():
        assert np.shape(model["distance"]) == (2, 4)
        assert np.shape(model["maps"]) == (2, 16, 16)
        assert len(model["similarity"]) == len(model["rank"]) == 2
        assert np.shape(model["rollout"]) == (4, 4)
    assert result["pairs"][0]["models"] == ["teacher", "student"]
    assert len(result["pairs"][0]["cka"]) == 2
    written = {path.name for path in (tmp_path / "out").iterdir()}
    for name in wanted:
        if name != "cosine":  # the widths of the two models differ
            assert {f"{name}.png", f"{name}.svg"} <= written
    assert "report.html" in written and "partial.npz" not in written
    assert "report.html" in out


def test_another_batch_size_gives_the_same_numbers(run, tmp_path):
    run("teacher", figures=ATTENTION, batch_size=8, output="a")
    run("teacher", figures=ATTENTION, batch_size=24, output="b")
    first, second = (figures(tmp_path, name)["models"]["teacher"] for name in "ab")
    for name in ("distance", "dropped", "similarity", "maps", "entropy", "divergence"):
        np.testing.assert_allclose(first[name], second[name], rtol=1e-5, atol=1e-6)


def test_the_same_command_again_only_draws(run, tmp_path):
    run("teacher", figures="distance")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "distance.png").unlink()
    status, out, _ = run("teacher", figures="distance")
    assert status == 0 and "drawing them again" in out
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_folder_with_other_results_is_refused_and_replaced_on_request(run, tmp_path):
    run("teacher", figures="distance")
    status, _, err = run("teacher", figures="similarity")
    assert status == 2 and "figures: 'distance' -> 'similarity'" in err and "--overwrite" in err
    assert "distance" in figures(tmp_path)["models"]["teacher"], "nothing was lost"
    status, _, err = run("teacher", figures="similarity", overwrite=True)
    assert status == 0, err
    assert not (tmp_path / "out" / "distance.png").exists()
    assert "distance" not in figures(tmp_path)["models"]["teacher"]


def test_a_folder_with_other_files_is_never_written_to(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        flags = {"overwrite": True} if overwrite else {}
        status, _, err = run("teacher", **flags)
        assert status == 2 and "did not write" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_other_weights_under_the_same_name_are_another_command(run, folders, tmp_path):
    run("teacher", figures="distance")
    spec, parts = model_folder.load(folders["teacher"])
    changed = tmp_path / "teacher"
    model_folder.save(changed, spec, tiny.randomize(parts, 3))
    folders = {**folders, "teacher": str(changed)}
    argv = [f"--model={changed}", f"--output={tmp_path / 'out'}", "--figures=distance"]
    argv += [f"--data={datasets.FOLDER_PREFIX}{_pictures(tmp_path)}"]
    assert cli.main(argv) == 2


def test_another_picture_of_the_same_name_is_another_command(run, tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / name).mkdir()
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / "x.png")
    status, _, err = run("teacher", figures="heads", picture=tmp_path / "a" / "x.png")
    assert status == 0, err
    status, _, err = run("teacher", figures="heads", picture=tmp_path / "b" / "x.png")
    assert status == 2 and "picture:" in err


def test_another_description_of_the_same_weights_is_another_command(run, folders, tmp_path):
    folders["copy"] = str(tmp_path / "teacher")
    shutil.copytree(folders["teacher"], folders["copy"])
    try:
        status, _, err = run("copy", figures="distance")
        assert status == 0, err
        path = tmp_path / "teacher" / "model.json"
        (path.parent / model_folder.DIGESTS).unlink()  # as if written by hand
        description = json.loads(path.read_text())
        path.write_text(json.dumps({**description, "mean": [0.1, 0.2, 0.3]}))
        status, _, err = run("copy", figures="distance")
        assert status == 2 and "model teacher" in err
    finally:
        del folders["copy"]


def test_a_pair_without_a_cosine_is_named(run):
    status, out, err = run("teacher", "student", figures="cka,cosine")
    assert status == 0, err
    assert "teacher and student have no cosine" in out


@pytest.mark.parametrize("name", ["figures.json", "command.json"])
def test_damaged_results_are_one_error_that_says_what_to_delete(run, tmp_path, name):
    run("teacher", figures="distance")
    path = tmp_path / "out" / name
    path.write_text(path.read_text()[:40])
    status, _, err = run("teacher", figures="distance")
    assert status == 2 and "delete" in err and str(path) in err


def test_a_broken_first_picture_is_passed_over(run, tmp_path):
    folder = _pictures(tmp_path)
    (folder / "a" / "0.png").write_bytes(b"not a picture")
    status, _, err = run("teacher", data=folder, figures="heads,distance", max_broken=1)
    assert status == 0, err
    assert figures(tmp_path)["picture"]["name"] == "a/1.png"


def test_a_landscape_has_a_curve_for_each_direction(run, tmp_path):
    status, _, err = run("teacher", figures="landscape", points=5, directions=2, seed=3)
    assert status == 0, err
    result = figures(tmp_path)
    landscape = result["models"]["teacher"]["landscape"]
    assert np.shape(landscape["loss"]) == np.shape(landscape["accuracy"]) == (2, 5)
    assert result["settings"]["points"] == 5 and result["settings"]["tables"] == "zeroed"


def _pictures(tmp_path):
    rng = np.random.default_rng(0)
    for label in "ab":
        for index in range(4):
            path = tmp_path / "pictures" / label / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


def test_fewer_images_are_spread_over_a_folder(run, tmp_path):
    folder = _pictures(tmp_path)
    status, _, err = run("teacher", data=folder, num_images=2, figures="distance", output="two")
    assert status == 0, err
    assert figures(tmp_path, "two")["images"] == 2
    # The two are the first of either class: they alone give the same numbers.
    chosen = tmp_path / "chosen"
    for label in "ab":
        (chosen / label).mkdir(parents=True)
        (folder / label / "0.png").rename(chosen / label / "0.png")
    run("teacher", data=chosen, figures="distance", output="chosen_out")
    first, second = (figures(tmp_path, name)["models"] for name in ("two", "chosen_out"))
    np.testing.assert_allclose(
        first["teacher"]["distance"], second["teacher"]["distance"], rtol=1e-6
    )


REFUSALS = {
    "unknown figure": (("teacher",), {"figures": "distances"}, "unknown distances; expected"),
    "no split": (("teacher",), {"data": "digits"}, "--data=digits:test"),
    "no such split": (("teacher",), {"data": "digits:validation"}, "has no split 'validation'"),
    "no such data": (("teacher",), {"data": "nothing:test"}, "TFDS has no dataset"),
    "too few images": (("teacher",), {"num_images": 500}, "500, but digits/test[:21] has 21"),
    "no images": (("teacher",), {"num_images": 0}, "expected a number from 1"),
    "same name": (("teacher", "teacher"), {}, "--model=student="),
    "sizes": (("teacher", "small"), {}, "teacher has 32x32, small has 24x24"),
    "no head": (("student",), {"figures": "landscape"}, "has no classifier head"),
    "even points": (("teacher",), {"figures": "landscape", "points": 4}, "points=4"),
    "rollout of a Swin": (("swin",), {"figures": "rollout"}, "not defined for swin"),
    "attention of a ConvNeXt": (("convnext",), {}, "ask for landscape, rank, cka, cosine, pca"),
    "rollout of a ConvNeXt": (("convnext",), {"figures": "rank,rollout"}, "have no attention"),
    "one model": (("teacher",), {"figures": "cka"}, "compares two models"),
    "batch": (("teacher",), {"batch_size": 3}, "not divisible by 8 batch shards"),
    "picture": (("teacher",), {"figures": "pca", "picture": "none.png"}, "cannot be read"),
    "directions": (("teacher",), {"figures": "landscape", "directions": 0}, "--directions=0"),
    "radius": (("teacher",), {"figures": "landscape", "radius": "nan"}, "radius=nan"),
    "max_broken": (("teacher",), {"max_broken": -1}, "--max_broken=-1"),
    "size": (("teacher",), {"image_size": 30}, "30"),
}


@pytest.mark.parametrize("names, flags, message", REFUSALS.values(), ids=REFUSALS)
def test_bad_input_is_one_error_before_anything_is_written(run, tmp_path, names, flags, message):
    status, _, err = run(*names, **flags)
    assert status == 2
    assert message in err and err.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_different_sizes_can_be_resized(run, tmp_path):
    status, _, err = run("teacher", "small", figures="distance", image_size=24)
    assert status == 0, err
    assert figures(tmp_path)["image_size"] == 24


@pytest.mark.slow
def test_a_swin_has_the_figures_of_its_windows(run, tmp_path):
    status, _, err = run("swin", figures=ATTENTION)
    assert status == 0, err
    model = figures(tmp_path)["models"]["swin"]
    assert [len(layer) for layer in model["distance"]] == [2, 2, 2, 4]
    assert model["about"]["patch"] == [4, 4, 8, 16]


@pytest.mark.slow
def test_a_convnext_has_the_figures_of_its_features(run, tmp_path):
    status, _, err = run("convnext", figures="rank,pca,landscape", directions=1, points=3)
    assert status == 0, err
    model = figures(tmp_path)["models"]["convnext"]
    assert len(model["rank"]) == 8 and np.shape(model["pca"]) == (2, 2, 3)
    assert model["about"]["patch"] == [4, 8, 8, 16, 16, 16, 16, 32]
    assert model["about"]["heads"] == [0] * 8 and model["about"]["prefix"] == 0


def test_numbers_survive_figures_json(tmp_path):
    made = record.make(
        command=["x"], data="d", images=1, image_size=8, settings={}, models={"m": {"a": [1 / 3]}}
    )
    record.write(made, tmp_path)
    assert record.read(tmp_path)["models"]["m"]["a"][0] == pytest.approx(1 / 3, rel=1e-8)


def test_help_names_every_figure(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert all(name in text for name in catalogue.FIGURES)
