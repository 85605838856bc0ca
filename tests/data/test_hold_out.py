"""A folder of pictures is divided by links, class by class."""

import os

from PIL import Image
import pytest

from fd_jax.data import datasets, hold_out


def fill(root, **counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (8, 8)).save(root / name / f"{k:02d}.png")


def held(root, split):
    """The pictures of a split by class, as the data layer reads them."""
    dataset = datasets.open_dataset(f"folder:{root}/{{split}}", split)
    found = {name: set() for name in dataset.class_names or ()}
    for k in range(len(dataset)):
        path = dataset.describe(k)
        found[os.path.basename(os.path.dirname(path))].add(os.path.basename(path))
    return found


def test_each_fifth_picture_of_a_class_is_held_out(tmp_path, capsys):
    fill(tmp_path / "all", ant=11, bee=2, cow=1)
    output = tmp_path / "split"
    assert hold_out.main([f"--input={tmp_path / 'all'}", f"--output={output}"]) == 0
    assert "11 in" in capsys.readouterr().out
    assert held(output, "val") == {"ant": {"04.png", "09.png"}, "bee": {"01.png"}}
    train = held(output, "train")
    assert {name: len(files) for name, files in train.items()} == {"ant": 9, "bee": 1, "cow": 1}
    assert not train["ant"] & {"04.png", "09.png"}
    assert os.listdir(tmp_path / "all" / "ant") and os.path.islink(output / "val/bee/01.png")


def test_pictures_without_classes_are_divided_too(tmp_path):
    fill(tmp_path, all=7)
    assert hold_out.hold_out(tmp_path / "all", tmp_path / "split", every=3) == {
        "train": 5,
        "val": 2,
    }
    assert sorted(os.listdir(tmp_path / "split" / "val")) == ["02.png", "05.png"]


@pytest.mark.parametrize(
    "output,every,counts,message",
    [
        ("all/split", 5, {"all/ant": 5}, "is inside of"),
        ("there", 5, {"all/ant": 5, "there": 1}, "exists and is not overwritten"),
        ("split", 1, {"all/ant": 5}, "--every=1: expected 2 or more"),
        ("split", 5, {"all/ant": 1, "all/bee": 1}, "no class has two pictures"),
        ("split", 5, {"nothing": 1}, "no folder of images at"),
    ],
)
def test_what_cannot_be_divided_is_one_message_and_leaves_nothing(
    tmp_path, capsys, output, every, counts, message
):
    fill(tmp_path, **counts)
    before = sorted(tmp_path.rglob("*"))
    arguments = [f"--input={tmp_path / 'all'}", f"--output={tmp_path / output}"]
    assert hold_out.main([*arguments, f"--every={every}"]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
