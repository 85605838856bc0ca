"""`SegmentationFeed`: batches through the real loader, held-out pictures, and what it refuses."""

import logging
import os

import numpy as np
from PIL import Image
import pytest

from fd_jax.data import randomness
from fd_jax.data.base import SegmentationData
from fd_jax.data.segmentation import Labels, Scene, transforms
from fd_jax.errors import ConfigError, DataError
from tests.data.segmentation import scenes as made
from tests.data.segmentation.scenes import ade20k, encode, feed


@pytest.fixture
def root(tmp_path):
    return ade20k(tmp_path)


def batches(data, count, *, start_step=0, rows=(0, 1, 2), seed=0):
    loader = data.train(batch_size=3, seed=seed, rows=np.array(rows), start_step=start_step)
    try:
        return [{name: np.array(v) for name, v in next(loader).items()} for _ in range(count)]
    finally:
        loader.close()


def assert_equal(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)


# --- training --------------------------------------------------------------------------------


def test_batches_have_the_declared_elements(root):
    data = feed(root=str(root))
    (batch,) = batches(data, 1)
    assert batch.keys() == data.elements.keys() == {"image", "mask", "weight", "index"}
    for name, element in data.elements.items():
        assert (batch[name].shape, batch[name].dtype) == ((3, *element.shape), element.dtype)
    assert data.steps_per_epoch(3) == 2 and data.examples("train") == 7
    assert data.name == f"{root}/training"
    assert ((batch["mask"] < 150) | (batch["mask"] == 255)).all()


def test_a_row_is_the_transform_of_its_picture(root):
    """The generator of an example depends on seed, epoch and index, as for all other data."""
    data = feed(root=str(root))
    (batch,) = batches(data, 1, seed=5)
    for row, index in enumerate(batch["index"].tolist()):
        rng = randomness.generator(randomness.AUGMENT, 5, 0, index)
        wanted = data.train_transform(data.train_dataset[index], rng)
        np.testing.assert_array_equal(batch["image"][row], wanted["image"])
        np.testing.assert_array_equal(batch["mask"][row], wanted["mask"])


def test_a_run_resumes_at_any_step_and_epochs_differ(root):
    data = feed(root=str(root))
    whole = batches(data, 6)
    assert_equal(batches(data, 3, start_step=3), whole[3:])
    assert_equal(batches(data, 6), whole)
    again = batches(data, 1, seed=1)[0]
    assert not np.array_equal(again["image"], whole[0]["image"])
    seen = {}
    for step, batch in enumerate(whole):
        for index, mask in zip(batch["index"].tolist(), batch["mask"], strict=True):
            seen.setdefault(index, {})[step // 2] = mask
    epochs = next(list(masks.values()) for masks in seen.values() if len(masks) > 1)
    assert not np.array_equal(epochs[0], epochs[1])


def test_hosts_share_a_batch(root):
    data = feed(root=str(root))
    whole = batches(data, 2)
    for rows in ((0, 1), (2,)):
        part = [{name: v[list(rows)] for name, v in batch.items()} for batch in whole]
        assert_equal(batches(data, 2, rows=rows), part)


@pytest.mark.slow
def test_worker_processes_make_the_same_batches(root):
    alone = batches(feed(root=str(root)), 6)
    assert_equal(batches(feed(root=str(root), workers=2), 5, start_step=1), alone[1:])


def test_a_broken_picture_is_replaced(root):
    (root / "images/training/ADE_train_00000004.jpg").write_bytes(b"cut off")
    (root / "annotations/training/ADE_train_00000006.png").write_bytes(b"cut off")
    data = feed(root=str(root), max_broken=2)
    loader = data.train(batch_size=3, seed=0, rows=np.arange(3), start_step=0)
    used = {int(i) for _ in range(8) for i in next(loader)["index"]}
    loader.close()
    assert used == {0, 1, 2, 4, 6} and set(loader.replaced) == {3, 5}
    with pytest.raises(DataError, match="broken images in .*training, more than max_broken=1"):
        batches(feed(root=str(root), max_broken=1), 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_label_that_is_no_class_stops_the_run(root, workers):
    bad = root / "annotations/training/ADE_train_00000004.png"
    bad.write_bytes(encode(np.full((76, 78), 200, np.uint8)))
    with pytest.raises(DataError, match="ADE_train_00000004.png: the mask holds 200, which is no"):
        batches(feed(root=str(root), workers=workers), 6)


def test_a_mask_of_another_size_stops_the_run(root):
    bad = root / "annotations/training/ADE_train_00000004.png"
    bad.write_bytes(encode(np.full((10, 12), 2, np.uint8)))
    with pytest.raises(DataError, match="00000004.png: the mask has 10 x 12 .* has 76 x 78"):
        batches(feed(root=str(root)), 6)


# --- held-out pictures -----------------------------------------------------------------------


def test_held_out_pictures_keep_their_size_and_order(root):
    data: SegmentationData = feed(root=str(root))
    pictures = list(data.pictures("eval"))
    assert [p.index for p in pictures] == [0, 1, 2] and data.examples("eval") == 3
    for picture in pictures:
        name = f"ADE_val_{picture.index + 1:08d}"
        assert picture.name == name
        jpeg = Image.open(root / f"images/validation/{name}.jpg").convert("RGB")
        assert np.abs(picture.image.astype(int) - np.asarray(jpeg)).max() <= 1
        stored = np.asarray(Image.open(root / f"annotations/validation/{name}.png")).astype(int)
        np.testing.assert_array_equal(picture.mask, np.where(stored == 0, 255, stored - 1))
        assert picture.image.dtype == picture.mask.dtype == np.uint8


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_any_pictures_can_be_asked_for_in_any_order(root, threads):
    data = feed(root=str(root), threads=threads)
    for indices in ([], [2], [6, 0, 3, 3], np.array([5, 1]), range(7)):
        found = list(data.pictures("train", indices))
        assert [p.index for p in found] == list(indices)
        assert [p.name[-1] for p in found] == [str(i + 1) for i in indices]


def test_pictures_are_decoded_only_a_few_ahead(root):
    data, read = feed(root=str(root), threads=2), []
    original = data.train_dataset

    class Counted:
        name = original.name

        def __len__(self):
            return len(original)

        def __getitem__(self, index):
            read.append(index)
            return original[index]

    data.train_dataset = Counted()
    pictures = data.pictures("train")
    assert not read
    next(pictures)
    pictures.close()  # as an evaluation does that needs no more
    assert len(read) <= 3


def test_a_broken_held_out_picture_is_left_out(root, caplog):
    (root / "images/validation/ADE_val_00000002.jpg").write_bytes(b"cut off")
    data = feed(root=str(root), max_broken=1)
    with caplog.at_level(logging.WARNING):
        assert [p.index for p in data.pictures("eval")] == [0, 2]
    assert "ADE_val_00000002.jpg: cannot decode" in caplog.text
    with pytest.raises(DataError, match="1 broken pictures in .*max_broken=0(.|\n)*ADE_val_00000"):
        list(feed(root=str(root), max_broken=0).pictures("eval"))


def test_a_test_resizes_within_the_scale():
    image = made.picture(0, 100, 150)

    def rescaled(scale):
        return transforms.resize_image(image, *transforms.test_size(100, 150, scale))

    resized = rescaled((2048, 512))
    np.testing.assert_array_equal(resized, transforms.resize_image(image, 512, 768))
    assert rescaled((90, 2048)).shape == (90, 135, 3)


# --- what is refused -------------------------------------------------------------------------


def test_the_first_mask_of_each_split_is_checked_at_the_start(root):
    (root / "images/validation/ADE_val_00000001.jpg").write_bytes(b"cut off")  # not the first then
    bad = root / "annotations/validation/ADE_val_00000002.png"
    bad.write_bytes(encode(np.full((68, 84), 151, np.uint8)))
    with pytest.raises(DataError, match="ADE_val_00000002.png: the mask holds 151"):
        feed(root=str(root))
    feed(root=str(root), eval_split="")


def test_classes_have_the_names_of_the_data(root, tmp_path):
    names = feed(root=str(root)).class_names
    assert names is not None and len(names) == 150
    assert names[0] == "name 1" and names[-1] == "name 150"
    whole = feed(root=str(root), reduce_zero_label=False, classes=151).class_names
    assert whole is not None and whole[:2] == ("other", "name 1")
    folders = {"root": str(root), "name": "folders"}
    assert feed(**folders).class_names is None
    listed = root / "names.txt"
    listed.write_text("\n".join(f"class {k}" for k in range(151)))
    named = feed(**folders, class_names="names.txt").class_names
    assert named is not None and named[0] == "class 1" and len(named) == 150
    with pytest.raises(DataError, match="names for 151 classes .*=False, but segment.classes=150"):
        feed(**folders, class_names="names.txt", reduce_zero_label=False)
    with pytest.raises(DataError, match="data.class_names: no file .*missing.txt"):
        feed(**folders, class_names="missing.txt")
    listed.write_text("\n" + "\n".join(f"class {k}" for k in range(1, 151)) + "\n")
    assert feed(**folders, class_names="names.txt").class_names == named  # 0 has no name
    listed.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="names.txt is not UTF-8 at byte 0; expected a text file"):
        feed(**folders, class_names="names.txt")
    listed.unlink()
    os.mkfifo(listed)  # which would block whoever reads it
    with pytest.raises(DataError, match="names.txt is a pipe"):
        feed(**folders, class_names="names.txt")


@pytest.mark.parametrize("damage", [lambda text: text[:-30], lambda text: text.replace("\t", " ")])
def test_a_damaged_list_of_names_is_refused(root, damage):
    path = root / "objectInfo150.txt"
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match="objectInfo150.txt: expected a line of titles"):
        feed(root=str(root))
    path.unlink()
    assert feed(root=str(root)).class_names is None


def test_another_number_of_classes_is_refused(root):
    with pytest.raises(DataError, match="training has 150 classes .*=True, but segment.classes=19"):
        feed(root=str(root), classes=19)
    with pytest.raises(DataError, match="has 151 classes with data.reduce_zero_label=False"):
        feed(root=str(root), reduce_zero_label=False)
    whole = feed(root=str(root), reduce_zero_label=False, classes=151)
    assert whole.classes == 151 and feed(root=str(root)).classes == 150
    assert feed(root=str(root), name="folders").classes is None
    with pytest.raises(ConfigError, match="segment.classes=300"):
        feed(root=str(root), name="folders", classes=300)


def test_one_folder_cannot_be_training_and_held_out_at_once(root):
    fields = {"images": "images/training", "labels": "annotations/training"}
    with pytest.raises(DataError, match="data.images='images/training' is the same for every spl"):
        feed(root=str(root), name="folders", **fields)
    only = feed(root=str(root), name="folders", eval_split="", **fields)
    with pytest.raises(DataError, match="no held-out split; set data.eval_split"):
        only.examples("eval")


def test_ignored_values_are_255_in_batches_whatever_they_are_on_disk(root):
    """The fields that say so reach the transform: 3 is ignored, 0 and 255 are not."""
    labels = Labels(255, 3, False)
    stored = np.array([[0, 3, 254, 3]], np.uint8)
    scene = Scene(np.zeros((1, 4, 3), np.uint8), stored, "one", "one.png")
    assert labels.read(scene)[1].tolist() == [[0, 255, 254, 255]]
    data = feed(root=str(root), name="folders", classes=151, ignore=5, reduce_zero_label=False)
    for picture in data.pictures("train"):
        path = root / f"annotations/training/{picture.name}.png"
        np.testing.assert_array_equal(picture.mask == 255, np.asarray(Image.open(path)) == 5)
