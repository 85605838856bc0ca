"""Labels of two places are compared by name: missing, unknown, unnamed and ambiguous classes."""

import unicodedata

import numpy as np
from PIL import Image
import pytest

from configs import base
from fd_jax.data import datasets
from fd_jax.data.class_names import Classes, numbering
from fd_jax.data.feed import Feed
from fd_jax.errors import DataError


def number(found, wanted, **options):
    """The numbering between lists of names, or counts where there are none."""

    def classes(where, given):
        names = None if isinstance(given, int) else given
        return Classes(where, given if names is None else len(names), names)

    return numbering(classes("data", found), classes("head", wanted), **options)


def test_classes_are_numbered_by_name():
    assert number(["bee", "cow"], ["ant", "bee", "cow"]) == (1, 2)
    assert number(["cow", "ant"], ["ant", "bee", "cow"]) == (2, 0)
    assert number(["class10", "class2"], ["class2", "class10"]) == (1, 0)  # natural against text


def test_unknown_classes_are_refused_by_name():
    with pytest.raises(DataError, match="data has 'doe', which head has not: .* 'ant', 'bee'"):
        number(["bee", "doe"], ["ant", "bee"])
    with pytest.raises(DataError, match="data has 'dog', 'elk'"):
        number(["dog", "elk"], ["ant", "bee"])  # as many, but others


def test_outputs_that_no_class_was_trained_on_have_no_name():
    assert number(["bee", "ant"], ["ant", "bee", "", ""]) == (1, 0)
    with pytest.raises(DataError, match="data has ''"):
        number([""], ["ant", ""])
    assert number(["", "ant"], ["", "ant"]) == (0, 1)  # what a file leaves without a name


def test_accents_are_compared_in_one_form():
    composed, decomposed = (unicodedata.normalize(form, "ébène") for form in ("NFC", "NFD"))
    assert composed != decomposed
    assert number([composed], ["bee", decomposed]) == (1,)


def test_a_name_of_several_classes_is_refused():
    crane = ["crane", "ant", "crane"]
    assert number(["ant"], crane) == (1,)
    with pytest.raises(DataError, match=r"head calls the classes \[0, 2\] 'crane'"):
        number(["crane"], crane)
    assert number(crane, crane) == (0, 1, 2)  # the same dataset, as in its own training
    with pytest.raises(DataError, match="calls the classes"):
        number(["ant", "crane", "crane"], crane)


@pytest.mark.parametrize(("found", "wanted"), [(["ant", "bee"], 2), (2, ["ant", "bee"])])
def test_without_names_on_one_side_numbers_are_compared_and_a_note_says_so(found, wanted, capsys):
    assert number(found, wanted) == (0, 1)
    note = capsys.readouterr().out
    assert "has no names of its 2 classes, so class 0 counts as 'ant'" in note
    assert number(["ant", "bee"], ["ant", "bee"]) == (0, 1)
    assert number(2, 2) == (0, 1)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(("found", "wanted"), [(["ant", "bee"], 3), (2, ["a", "b", "c"]), (2, 3)])
def test_other_numbers_without_names_are_refused(found, wanted):
    with pytest.raises(DataError, match="data has 2 classes, but head has 3"):
        number(found, wanted)
    assert number(found, wanted, match="number") == (0, 1)


def test_names_that_are_numbers_are_the_classes_of_these_numbers(capsys):
    """Folders sort them as text: 0, 1, 10, 11, 2, ..."""
    as_text = sorted(map(str, range(12)))
    assert number(as_text, 12) == tuple(map(int, as_text))
    assert number(["3", "7"], 12) == (3, 7)
    assert number(12, as_text) == tuple(as_text.index(str(k)) for k in range(12))
    assert not capsys.readouterr().out


def test_names_in_other_words_are_matched_by_number_on_request():
    synsets, words = ["n01", "n02"], ["tench", "goldfish"]
    with pytest.raises(DataError, match="set match_classes to 'number'"):
        number(synsets, words)
    assert number(synsets, words, match="number") == (0, 1)
    with pytest.raises(DataError, match="data has 3 classes, but head has 2"):
        number(["a", "b", "c"], words, match="number")


# --- folders ---------------------------------------------------------------------------------

SHADES = {"ant": 30, "bee": 60, "cow": 90, "doe": 120}


@pytest.fixture
def split_folders(tmp_path):
    """A function that makes folders in which the grey level of a picture is that of its class."""

    def make(**splits):
        for split, names in splits.items():
            for name in names:
                folder = tmp_path / split / name
                folder.mkdir(parents=True)
                Image.new("RGB", (8, 8), (SHADES[name],) * 3).save(folder / "one.png")
        config = base.common().data
        config.update(name=f"folder:{tmp_path}/{{split}}", image_size=8, eval_split="val")
        return config

    return make


def shades_by_label(feed, split):
    (batch,) = feed.sequential(split, batch_size=len(SHADES))
    rows = batch["weight"] > 0
    return dict(
        zip(batch["label"][rows].tolist(), batch["image"][rows, 0, 0, 0].tolist(), strict=True)
    )


def test_a_held_out_folder_that_lacks_a_class_keeps_the_numbers_of_training(split_folders):
    config = split_folders(train=["ant", "bee", "cow"], val=["bee", "cow"])
    feed = Feed(**config)
    assert shades_by_label(feed, "eval") == {0: 60, 1: 90}  # negative control: positions
    feed.number_labels()
    assert shades_by_label(feed, "train") == {0: 30, 1: 60, 2: 90}
    assert shades_by_label(feed, "eval") == {1: 60, 2: 90}
    assert (feed.classes, feed.class_names) == (3, ("ant", "bee", "cow"))


def test_a_class_that_training_has_not_is_refused_by_name(split_folders):
    config = split_folders(train=["ant", "bee", "cow"], val=["bee", "cow", "doe"])
    with pytest.raises(DataError, match="val has 'doe', which folder:.*train has not"):
        Feed(**config).number_labels()
    feed = Feed(**{**config, "match_classes": "number"})  # what used to happen without a word
    feed.number_labels()
    assert shades_by_label(feed, "eval") == {0: 60, 1: 90, 2: 120}


def test_both_splits_take_the_numbers_of_a_head(split_folders):
    config = split_folders(train=["cow", "bee"], val=["cow"])
    feed = Feed(**config)
    feed.number_labels(Classes("the head", 4, ["doe", "cow", "ant", "bee"]))
    assert shades_by_label(feed, "train") == {1: 90, 3: 60}
    assert shades_by_label(feed, "eval") == {1: 90}
    assert feed.classes == 4
    originals = map(datasets.original, (feed.train_dataset, feed.eval_dataset))
    assert [original.class_names for original in originals] == [("bee", "cow"), ("cow",)]
    np.testing.assert_array_equal(feed.label("eval", 0), 1)
