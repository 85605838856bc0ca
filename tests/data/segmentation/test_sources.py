"""Folders and TFDS datasets of pictures with masks: the right ones, and every refusal."""

import shutil

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from fd_jax.data.datasets import BrokenImageError
from fd_jax.data.segmentation import Labels, open_scenes
from fd_jax.errors import DataError
from tests.data.segmentation import scenes as made
from tests.data.segmentation.scenes import ade20k, blocks, encode, palette_png, write

ADE20K = Labels(150, 255, True)


def opened(root, split="training", name="ade20k", **fields):
    patterns = {field: fields.get(field, made.FIELDS[field]) for field in ("images", "labels")}
    return open_scenes(name, split, root=str(root), data_dir=None, **patterns)


@pytest.fixture
def root(tmp_path):
    return ade20k(tmp_path)


# --- ADEChallengeData2016 --------------------------------------------------------------------


def test_every_picture_comes_with_its_own_mask(root):
    for split, (short, count) in made.SPLITS.items():
        scenes = opened(root, split)
        assert len(scenes) == count and scenes.stored == 151
        for index in range(count):
            name = f"ADE_{short}_{index + 1:08d}"
            assert scenes[index].name == name
            assert scenes.describe(index).endswith(f"images/{split}/{name}.jpg")
            pixels, mask = ADE20K.read(scenes[index])
            jpeg = Image.open(root / "images" / split / f"{name}.jpg").convert("RGB")
            assert np.abs(pixels.astype(int) - np.asarray(jpeg)).max() <= 1
            stored = np.asarray(Image.open(root / "annotations" / split / f"{name}.png"))
            np.testing.assert_array_equal(mask, stored - np.uint8(1))  # 0 becomes 255


def test_subsets_are_used_and_noted(root, capsys):
    opened(root)
    assert "holds 7 pictures of the 20,210 of ADE20K" in capsys.readouterr().out
    opened(root, "validation")
    assert "holds 3 pictures of the 2,000" in capsys.readouterr().out


def test_hidden_files_are_not_pictures(root):
    write(root / "images/training/._ADE_train_00000001.jpg", b"of another system")
    assert len(opened(root)) == 7


@pytest.mark.parametrize("name", ["ade20k", "folders"])
def test_a_missing_root_is_refused(name, tmp_path):
    with pytest.raises(DataError, match=f"data.name={name} needs data.root"):
        opened("", name=name)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        opened(tmp_path / "nowhere", name=name)


def test_the_parent_folder_is_refused_with_the_right_path(root):
    with pytest.raises(DataError, match=f"holds ADEChallengeData2016; set data.root={root}"):
        opened(root.parent)


def full_2021(folder):
    base = folder / "ADE20K_2021_17_01"
    seg = base / "images/ADE/training/urban/street/ADE_train_00016858_seg.png"
    write(seg, encode(np.zeros((8, 8, 3), np.uint8)))
    write(seg.with_name("ADE_train_00016858.jpg"), encode(np.zeros((8, 8, 3), np.uint8), "JPEG"))
    write(base / "index_ade20k.pkl", b"")
    return base


def full_2016(folder):
    base = folder / "ADE20K_2016_07_26"
    seg = base / "images/training/a/abbey/ADE_train_00000970_seg.png"
    write(seg, encode(np.zeros((8, 8, 3), np.uint8)))
    write(seg.with_name("ADE_train_00000970.jpg"), encode(np.zeros((8, 8, 3), np.uint8), "JPEG"))
    return base


@pytest.mark.parametrize(
    ("make", "release"),
    [(full_2021, "ADE20K_2021_17_01"), (full_2016, "the full ADE20K of 2016")],
)
def test_other_releases_of_ade20k_are_told_apart(make, release, tmp_path):
    with pytest.raises(DataError, match=f"is {release}, .* needs ADEChallengeData2016"):
        opened(make(tmp_path))


def test_a_renamed_release_is_still_recognised(tmp_path):
    renamed = full_2021(tmp_path).rename(tmp_path / "ade")
    with pytest.raises(DataError, match="is ADE20K_2021_17_01"):
        opened(renamed)
    (renamed / "index_ade20k.pkl").unlink()
    with pytest.raises(DataError, match="is ADE20K_2021_17_01"):
        opened(renamed)


def test_missing_folders_are_named(root):
    shutil.move(root / "annotations", root / "annotations_instance")
    with pytest.raises(DataError, match="has no folder annotations. Semantic segmentation with"):
        opened(root)


def test_an_unknown_split_is_refused_with_the_known_ones(root):
    with pytest.raises(DataError, match=r"images/train; .* are \['training', 'validation'\]"):
        opened(root, "train")


@pytest.mark.parametrize(
    ("folder", "suffix", "message"),
    [
        ("annotations", "png", r"2 pictures \(of 7\) without a mask: \w+1, \w+2\."),
        ("images", "jpg", r"2 masks \(of 7\) without a picture: \w+1, \w+2\."),
    ],
)
def test_pictures_and_masks_without_a_partner_are_named(root, folder, suffix, message):
    for number in (1, 2):
        (root / folder / "training" / f"ADE_train_{number:08d}.{suffix}").unlink()
    with pytest.raises(DataError, match=message):
        opened(root)


def test_only_the_first_files_without_a_partner_are_named(root):
    for number in range(1, 7):
        (root / f"annotations/training/ADE_train_{number:08d}.png").unlink()
    with pytest.raises(DataError, match=r"6 pictures .* \w+1, \w+2, \w+3, \.\.\.\. Add"):
        opened(root)


def test_empty_folders_and_lossy_masks_are_refused(root):
    for path in (root / "annotations/training").iterdir():
        path.rename(path.with_suffix(".jpg"))
    with pytest.raises(DataError, match=r"data.labels: no files \(.png\) under"):
        opened(root)


def test_a_file_that_disappears_is_a_broken_picture(root):
    scenes = opened(root)
    (root / "annotations/training/ADE_train_00000003.png").unlink()
    with pytest.raises(BrokenImageError, match="ADE_train_00000003.png"):
        scenes[2]


# --- pairs of folders ------------------------------------------------------------------------


def test_cityscapes_by_its_patterns(tmp_path):
    masks = {}
    for city in ("aachen", "bochum"):
        for number in range(2):
            name = f"{city}/{city}_{number:06d}_000019"
            masks[name] = blocks(len(masks), 32, 64, (*range(19), 255), side=4)
            pixels = made.picture(len(masks), 32, 64)
            write(tmp_path / f"leftImg8bit/train/{name}_leftImg8bit.png", encode(pixels))
            stem = tmp_path / f"gtFine/train/{name}_gtFine"
            write(stem.with_name(f"{stem.name}_labelTrainIds.png"), encode(masks[name]))
            for other in ("labelIds", "instanceIds", "color"):  # these lie beside it
                write(stem.with_name(f"{stem.name}_{other}.png"), b"not read")
            write(stem.with_name(f"{stem.name}_polygons.json"), b"{}")
    scenes = opened(
        tmp_path,
        "train",
        name="folders",
        images="leftImg8bit/{split}/{name}_leftImg8bit.png",
        labels="gtFine/{split}/{name}_gtFine_labelTrainIds.png",
    )
    assert [scenes[i].name for i in range(4)] == sorted(masks)
    for index in range(4):
        _, mask = Labels(19, 255, False).read(scenes[index])
        np.testing.assert_array_equal(mask, masks[scenes[index].name])
    wrong = {"images": "leftImg8bit/{split}", "labels": "gtFine/{split}"}
    with pytest.raises(DataError, match="4 pictures .* 16 masks"):
        opened(tmp_path, "train", name="folders", **wrong)


def test_pascal_voc_with_palettes(tmp_path):
    masks = {f"2007_{n:06d}": blocks(n, 30, 40, (*range(21), 255)) for n in range(3)}
    for name, mask in masks.items():
        write(tmp_path / f"images/train/{name}.jpg", encode(made.picture(0, 30, 40), "JPEG"))
        write(tmp_path / f"annotations/train/{name}.png", palette_png(mask))
    scenes = opened(tmp_path, "train", name="folders")
    for index, (name, mask) in enumerate(masks.items()):
        assert scenes[index].name == name
        np.testing.assert_array_equal(Labels(21, 255, False).read(scenes[index])[1], mask)


def test_two_pictures_of_one_name_are_refused(root):
    write(root / "images/training/ADE_train_00000001.png", b"a second one")
    with pytest.raises(DataError, match="ADE_train_00000001.* have the same name; keep one"):
        opened(root)


def test_a_pattern_that_nothing_matches_is_refused(root):
    with pytest.raises(DataError, match="no files that match images/training/{name}_left.png"):
        opened(root, name="folders", images="images/{split}/{name}_left.png")


# --- TFDS ------------------------------------------------------------------------------------


class PlainMasks(tfds.core.GeneratorBasedBuilder):
    """Masks as an ordinary image feature, which does not say how many classes there are."""

    VERSION = tfds.core.Version("1.0.0")
    channels = 1

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "mask": tfds.features.Image(shape=(None, None, self.channels)),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index in range(4):
            mask = blocks(index, 20, 30 + index, (0, 1, 2))
            if self.channels == 3:
                mask = np.repeat(mask[..., None], 3, axis=-1)
            image = made.picture(index, 20, 30 + index)
            yield index, {"image": encode(image), "mask": encode(mask)}


class ColourMasks(PlainMasks):
    """Masks in colour, which are not labels."""

    channels = 3


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("masks"))
    for name in ("plain_masks", "colour_masks"):
        tfds.builder(name, data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def of_tfds(name, data_dir):
    return open_scenes(name, "train", root="", images="", labels="", data_dir=data_dir)


def test_a_tfds_dataset_is_read_at_random(data_dir):
    scenes = of_tfds("plain_masks", data_dir)
    assert len(scenes) == 4 and scenes.stored is None and scenes.class_names is None
    for position in (3, 0, 2):
        pixels, mask = Labels(3, 255, False).read(scenes[position])
        index = mask.shape[1] - 30  # TFDS stores them in another order
        np.testing.assert_array_equal(pixels, made.picture(index, 20, 30 + index))
        np.testing.assert_array_equal(mask, blocks(index, 20, 30 + index, (0, 1, 2)))
        assert scenes[position].origin == f"plain_masks/train[{position}]"


def test_a_tfds_dataset_without_usable_masks_is_refused(data_dir, embedded_data):
    with pytest.raises(DataError, match=r"photos has no feature 'mask'; its features are \['file"):
        of_tfds("photos", embedded_data)
    with pytest.raises(DataError, match="colour_masks: its feature 'mask' is .* 8-bit channel"):
        of_tfds("colour_masks", data_dir)


@pytest.mark.parametrize("name", ["scene_parse150", "scene_parse150:1.0.0"])
def test_the_instance_masks_of_tfds_are_refused(name):
    with pytest.raises(DataError, match="instances of 100 classes.*Use data.name=ade20k"):
        of_tfds(name, None)


def test_a_dataset_that_is_not_prepared_is_refused(tmp_path):
    with pytest.raises(DataError, match="not prepared .*\n.*--name=digit_scenes"):
        of_tfds("digit_scenes", str(tmp_path))
