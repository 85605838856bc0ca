"""Class names travel with a head: from data to model folders, evaluation and other libraries."""

import json

import jax
import ml_collections
import numpy as np
from PIL import Image
import pytest

from fd_jax import features, load_model, model_folder
from fd_jax.cli import measure
from fd_jax.data import transforms
from fd_jax.data.feed import Feed
from fd_jax.diagnose.landscape import Landscape
from fd_jax.errors import ConfigError, DataError, ModelFolderError
from fd_jax.models.spec import ModelSpec
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.training import account
from tests import tiny

COLOURS = {"ant": (250, 20, 20), "bee": (20, 250, 20), "cow": (20, 20, 250), "doe": (200, 200, 20)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Class folders with pictures of one colour, in several selections of classes."""
    root = tmp_path_factory.mktemp("animals")
    splits = {"abc": "ant bee cow", "bc": "bee cow", "cb": "bee cow", "bcd": "bee cow doe"}
    for split, names in splits.items():
        for name in names.split():
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), COLOURS[name]).save(root / split / name / "one.png")
    return f"folder:{root}/{{split}}"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A function that writes a model folder whose head tells the colours of its classes apart.

    The head is the nearest class mean of the features, so nothing has to be trained.
    """
    root = tmp_path_factory.mktemp("classifiers")
    bare = model_folder.load(tiny.save_teacher(root / "bare"))
    model = load_model(root / "bare")

    def make(order, names):
        folder = root / "-".join([*order, "named" if names else "nameless"])
        if not folder.exists():
            pictures = np.stack([np.full((32, 32, 3), COLOURS[name], np.uint8) for name in order])
            means = np.asarray(model(model.preprocess(pictures)).cls_token)
            head = {"kernel": means.T, "bias": -0.5 * np.sum(means**2, axis=1)}
            spec = ModelSpec(
                "vit", bare[0].arch, classes=len(order), class_names=names, source="tiny"
            )
            model_folder.save(folder, spec, {**bare[1], "head": head})
        return str(folder)

    return make


def config_of(folder, data, split, **fields):
    fields = {"data.name": data, "data.split": split, "data.eval_split": split, **fields}
    config = tiny.fine_tuning(folder, **fields)
    config.update(batch_size=8)
    config.eval.batches = 0
    return config


def accuracy(folder, data, split, workdir, **fields):
    return measure.measure(config_of(folder, data, split, **fields), workdir)["top1"]


# --- evaluation of a head --------------------------------------------------------------------


@pytest.mark.slow
def test_a_missing_class_keeps_the_numbers_of_the_head(classifier, data, tmp_path):
    folder = classifier(("cow", "ant", "bee"), ["cow", "ant", "bee"])
    config = config_of(folder, data, "bc")
    assert measure.measure(config, tmp_path, per_class=True)["top1"] == 1.0
    table = (tmp_path / "per_class.md").read_text()
    assert "| cow | 1 | 1.0000 |  |" in table and "| ant | 0 |  |  |" in table
    # Negative control: by their positions, none of the pictures has its class.
    assert accuracy(folder, data, "bc", tmp_path, **{"data.match_classes": "number"}) == 0.0


def test_a_class_that_the_head_does_not_know_is_refused_by_name(classifier, data, tmp_path):
    folder = classifier(("ant", "bee", "cow"), ["ant", "bee", "cow"])
    with pytest.raises(DataError, match=f"bcd has 'doe', which the head in {folder} has not"):
        accuracy(folder, data, "bcd", tmp_path)


def test_a_head_without_names_is_compared_by_numbers_and_a_note_says_so(
    classifier, data, tmp_path, capsys
):
    folder = classifier(("ant", "bee", "cow"), None)
    assert accuracy(folder, data, "abc", tmp_path) == 1.0
    assert "has no names of its 3 classes, so class 0 counts as 'ant'" in capsys.readouterr().out
    with pytest.raises(DataError, match="bc has 2 classes, but the head in .* has 3"):
        accuracy(folder, data, "bc", tmp_path)


@pytest.mark.slow
def test_landscapes_number_the_classes_as_the_head_does(classifier, data):
    folder = classifier(("cow", "ant", "bee"), ["cow", "ant", "bee"])
    landscape = Landscape("tiny", folder, directions=1, points=3)
    feed = Feed(**config_of(folder, data, "bc").data)
    (batch,) = feed.sequential("train", batch_size=8)
    by_position = jax.jit(landscape.sums)(landscape.params, batch)
    landscape.check_dataset(feed.train_dataset)
    by_name = jax.jit(lambda *given: landscape.sums(*given))(landscape.params, batch)
    assert (by_position["correct"][0, 1], by_name["correct"][0, 1]) == (0, 2)  # in the middle
    assert not by_name["unlabelled"]
    unknown = Feed(**config_of(folder, data, "bcd").data).train_dataset
    with pytest.raises(DataError, match="'doe', which the head of tiny has not"):
        landscape.check_dataset(unknown)


# --- training --------------------------------------------------------------------------------


def exported(config):
    task = ClassifyTask(config)
    task.check_data(Feed(**config.data))
    return task.export({"encoder": {}}, {})[0]


def test_a_fresh_head_takes_the_names_of_the_training_split(classifier, data):
    folder = classifier(("cow", "ant", "bee"), ["cow", "ant", "bee"])
    fields = {"data.eval_split": "bc", "model.classes": 3}
    assert exported(config_of(folder, data, "abc", **fields)).class_names == ["ant", "bee", "cow"]
    fields["model.classes"] = 5  # outputs that no class trains
    spec = exported(config_of(folder, data, "abc", **fields))
    assert spec.class_names == ["ant", "bee", "cow", "", ""]
    assert ModelSpec.from_json(spec.to_json(), where="here") == spec
    with pytest.raises(DataError, match="bcd has 'doe'"):
        exported(config_of(folder, data, "abc", **{**fields, "data.eval_split": "bcd"}))


@pytest.mark.parametrize("names", [["cow", "ant", "bee"], None], ids=["named", "nameless"])
def test_a_head_that_is_kept_keeps_its_order(classifier, data, names):
    folder = classifier(("cow", "ant", "bee"), names)
    fields = {"model.classes": 3, "model.head": "keep", "model.pooling": "cls"}
    fields |= {"model.final_norm": True, "model.untie_positions": False}
    spec = exported(config_of(folder, data, "abc", **fields))
    assert spec.class_names == (names or ["ant", "bee", "cow"])
    if names is not None:
        config = config_of(folder, data, "bcd", **fields)
        with pytest.raises(DataError, match="'doe', which the head in"):
            exported(config)


def test_data_without_names_leaves_a_head_without_names(classifier, embedded_data):
    fields = {"data.data_dir": embedded_data, "model.classes": 10}
    folder = classifier(("cow", "ant", "bee"), ["cow", "ant", "bee"])
    spec = exported(config_of(folder, "digits", "test", **fields))
    assert spec.class_names is None and "class_names" not in json.loads(spec.to_json())


# --- model folders and features ----------------------------------------------------------------


def test_a_loaded_model_has_the_names(classifier):
    names = ["cow", "ant", "bee"]
    assert load_model(classifier(tuple(names), names)).class_names == names
    assert load_model(classifier(tuple(names), None)).class_names is None


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", 3], "abc", ["a"] * 4], ids=str)
def test_names_that_do_not_fit_the_head_are_refused(names):
    with pytest.raises(ModelFolderError, match="expected a list of 3 names"):
        ModelSpec("vit", tiny.TEACHER, classes=3, class_names=names)


def test_a_run_says_what_its_folders_hold(data):
    config = config_of("", data, "abc", **{"data.eval_split": "bc"})
    root = data.removeprefix("folder:")
    assert account.found(Feed(**config.data)) == (
        f"{root.replace('{split}', 'abc')}: 3 pictures; 3 classes; "
        f"held out: {root.replace('{split}', 'bc')}: 2 pictures; 2 classes"
        " (one is 50 points)"
    )


def test_features_come_with_labels_and_names(classifier, data, tmp_path):
    folder = data.removeprefix("folder:").replace("{split}", "bc")
    model = classifier(("ant", "bee", "cow"), None)
    output = tmp_path / "features.npz"
    assert features.main([f"--model={model}", f"--input={folder}", f"--output={output}"]) == 0
    with np.load(output) as file:
        assert list(file["class_names"]) == ["bee", "cow"] and list(file["labels"]) == [0, 1]


def test_pictures_are_turned_on_request_only(classifier, tmp_path):
    """Left half black, right half white, stored a quarter turn away from how it is shown."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, 16:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png", exif=exif)
    model = load_model(classifier(("ant", "bee", "cow"), None))
    for flags, turned in (([], False), (["--exif"], True)):
        output = tmp_path / f"{turned}.npz"
        command = [f"--model={classifier(('ant', 'bee', 'cow'), None)}", *flags]
        command += [f"--input={tmp_path / 'in'}", f"--output={output}"]
        assert features.main(command) == 0
        shown = np.rot90(pixels, -1) if turned else pixels
        resized = transforms.EvalTransform(32)(np.ascontiguousarray(shown))
        expected = np.asarray(model(model.preprocess(resized[None])).cls_token)
        with np.load(output) as file:
            np.testing.assert_allclose(file["cls"], expected, atol=2e-5)


def test_more_neighbours_than_pictures_are_refused_before_anything_is_computed(
    classifier, data, tmp_path
):
    config = ml_collections.ConfigDict(
        config_of(classifier(("ant", "bee", "cow"), None), data, "abc")
    )
    config.eval.knn = 4
    with pytest.raises(ConfigError, match="eval.knn=4, but folder:.* has only 3 images"):
        measure.measure(config, tmp_path)
