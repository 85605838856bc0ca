"""What a folder holds: links, hidden files, empty classes, and files that are not read."""

import os

from PIL import Image
import pytest

from fd_jax.data import datasets, folders
from fd_jax.errors import DataError


def fill(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / path)


def read(root):
    """The paths below `root` by class name."""
    contents = folders.index(root)
    names = contents.class_names or ()
    found = [
        (os.path.relpath(path, root), names[label] if label >= 0 else None)
        for path, label in contents.files
    ]
    assert all(path.startswith(f"{name}/") for path, name in found if name)
    return [path for path, _ in found]


@pytest.fixture
def pictures(tmp_path):
    """The folder of a public report: a link, two formats, and what other programs leave behind."""
    fill(tmp_path, "data/cat/a.jpg", "data/dog/b.jpg", "store/c.jpg", "data/cow/e.gif")
    fill(tmp_path, "data/dog/d.tif", "data/cat/.ipynb_checkpoints/a-checkpoint.jpg")
    os.symlink(tmp_path / "store", tmp_path / "data/cat/more")
    (tmp_path / "data/dog/._b.jpg").write_bytes(bytes.fromhex("00051607") + bytes(60))
    return tmp_path / "data"


EXPECTED = ["cat/a.jpg", "cat/more/c.jpg", "cow/e.gif", "dog/b.jpg", "dog/d.tif"]


def test_links_are_followed_and_hidden_files_are_nowhere(pictures):
    fill(pictures, "__MACOSX/cat/a.jpg", "cat/__MACOSX/a.jpg", ".cache/deep/x.jpg")
    assert read(pictures) == EXPECTED
    dataset = datasets.open_dataset(f"folder:{pictures}", "")
    assert dataset.class_names == ("cat", "cow", "dog") and dataset.num_classes == 3


def test_a_folder_is_read_through_a_link_to_it_and_its_class_folders_can_be_links(pictures):
    os.rename(pictures / "dog", pictures.parent / "hounds")
    os.symlink("../hounds", pictures / "dog")
    os.symlink(pictures, pictures.parent / "link")
    assert read(pictures.parent / "link") == EXPECTED


@pytest.mark.parametrize("target", [".", "..", "../..", "/", "../cat"])
def test_loops_of_links_end_and_bring_no_picture_twice(pictures, target):
    os.symlink(target, pictures / "cat" / "loop")
    assert read(pictures) == EXPECTED


def test_loops_outside_of_the_folder_end(pictures):
    """Two folders that lead to each other, and a chain in which every folder has two ways on."""
    store = pictures.parent / "store"
    fill(store, "deep/f.jpg")
    os.symlink(store, store / "deep" / "back")
    for number in range(30):
        (store / f"chain{number}").mkdir()
        for way in "lr":
            os.symlink(store / f"chain{number + 1}", store / f"chain{number}" / way)
    assert read(pictures) == [*EXPECTED[:2], "cat/more/deep/f.jpg", *EXPECTED[2:]]


def test_a_folder_that_is_there_anyway_keeps_its_path(pictures):
    fill(pictures, "cat/real/g.jpg")
    os.symlink("real", pictures / "cat" / "alias")
    assert "cat/real/g.jpg" in read(pictures)
    assert "cat/alias/g.jpg" not in read(pictures)


def test_one_line_names_what_is_not_read(pictures):
    (pictures / "emu").mkdir()
    (pictures / "emu" / "photo.HEIC").write_bytes(b"?")
    (pictures / "cat" / "icon.svg").write_bytes(b"?")
    (pictures / "cat" / "notes.txt").write_bytes(b"no picture by its name")
    os.symlink("nowhere.jpg", pictures / "cat" / "lost.jpg")
    os.symlink("itself.jpg", pictures / "cat" / "itself.jpg")
    os.mkfifo(pictures / "cat" / "pipe.png")
    contents = folders.index(pictures)
    assert contents.empty == ("emu",)
    assert contents.unread == {".heic": 1, ".svg": 1, "broken link": 2, "special file": 1}
    assert str(contents) == (
        f"{pictures}: 5 pictures; 3 classes; not read: .heic (1), .svg (1), broken link (2), "
        "special file (1); without a picture: emu"
    )
    assert read(pictures) == EXPECTED


def test_folders_without_pictures_make_no_classes(tmp_path):
    fill(tmp_path, "a.jpg", "b.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "a.json").write_text("{}")
    contents = folders.index(tmp_path)
    assert contents.class_names is None and len(contents.files) == 2
    assert str(contents).endswith(": 2 pictures; no classes; without a picture: annotations")


def test_the_refusal_of_a_folder_without_pictures_says_what_it_holds(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"?")
    with pytest.raises(DataError, match=r"no images \(.jpeg, .*: 0 pictures; .*: .heic \(1\)"):
        folders.index(tmp_path)


def test_names_that_are_no_text_are_read_and_printed(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    fill(tmp_path, f"{name}/a.jpg", "bee/b.jpg")
    (tmp_path / os.fsdecode(b"empty\xe9")).mkdir()
    contents = folders.index(tmp_path)
    assert contents.class_names == ("bee", name)
    assert str(contents).encode("utf-8").endswith(rb"without a picture: empty\udce9")


def test_classes_that_look_like_splits_are_doubted(tmp_path):
    fill(tmp_path, "train/cat/a.jpg", "val/cat/b.jpg")
    contents = folders.index(tmp_path)
    assert contents.class_names == ("train", "val")
    assert "note: these classes look like splits (train, val)" in str(contents)
    assert datasets.doubt_about(datasets.spread(datasets.FolderDataset(tmp_path), 1))
    assert not datasets.doubt_about(datasets.FolderDataset(tmp_path / "val"))
    fill(tmp_path, "bee/c.jpg")
    assert not folders.index(tmp_path).doubt
