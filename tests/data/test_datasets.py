"""Datasets as users name them: TFDS datasets, folders, and errors in both."""

import collections
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from fd_jax.data import datasets, prepare, transforms
from fd_jax.data.datasets import BrokenImageError, SkippedError
from fd_jax.errors import DataError
from tests.data.conftest import SKIPPED, SYNSETS, jpeg


def file_names(dataset):
    """The file name of each example, taken from `describe`."""
    return [dataset.describe(i).split("(")[1].rstrip(")") for i in range(len(dataset))]


# --- TFDS ------------------------------------------------------------------------------------


def test_imagenet_by_name_gives_the_bytes_of_the_tar_files(imagenet, imagenet_tars):
    dataset = datasets.open_dataset("imagenet2012", "train", data_dir=imagenet)
    assert len(dataset) == 12 and dataset.num_classes == 1000
    _, pictures = imagenet_tars
    names = file_names(dataset)
    assert sorted(names) == sorted(pictures)
    for index, name in enumerate(names):
        image, label = dataset[index]
        assert image == pictures[name]
        assert label == {SYNSETS[0]: 0, SYNSETS[1]: 373}[name.split("_")[0]]


def test_splits_use_the_slice_syntax_of_tfds(imagenet):
    def names(split):
        return file_names(datasets.open_dataset("imagenet2012", split, data_dir=imagenet))

    whole = names("train")
    assert names("train[:50%]") + names("train[50%:]") == whole
    assert names("train[2:5]") == whole[2:5]
    assert len(names("validation")) == 5


def test_files_that_the_original_skips_raise_when_they_are_read(imagenet):
    dataset = datasets.open_dataset(
        "imagenet2012", "train", data_dir=imagenet, skip=datasets.OFFICIAL_SKIPPED
    )
    skipped = []
    for index in range(len(dataset)):
        try:
            dataset[index]
        except SkippedError as error:
            skipped.append(str(error))
    assert len(set(datasets.OFFICIAL_SKIPPED)) == 27 and skipped == [SKIPPED]


def test_reading_imagenet_does_not_import_tensorflow(imagenet):
    script = (
        "import sys; from fd_jax.data import datasets, pipeline, transforms\n"
        f"dataset = datasets.open_dataset('imagenet2012', 'train', data_dir={imagenet!r})\n"
        "transform = transforms.LabelledImage(transforms.TrainTransform(32, min_area=0.5,"
        " interpolation='bilinear', flip=True))\n"
        "loader = pipeline.TrainLoader(dataset, transform, batch_size=4, seed=0, threads=1)\n"
        "print(next(loader)['image'].shape, 'tensorflow' in sys.modules); loader.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "(4, 32, 32, 3) False", done.stderr


def test_a_damaged_record_raises_broken_image_error(imagenet, tmp_path):
    shutil.copytree(imagenet, tmp_path, dirs_exist_ok=True)
    (file,) = tmp_path.glob("imagenet2012/*/*-train.array_record*")
    data = bytearray(file.read_bytes())
    middle = data.index(b"\xff\xd8\xff") + 400  # inside one JPEG
    data[middle : middle + 20] = bytes(20)
    file.write_bytes(data)
    dataset = datasets.open_dataset("imagenet2012", "train", data_dir=str(tmp_path))
    outcome = collections.Counter()
    for index in range(len(dataset)):
        try:
            dataset[index]
            outcome["read"] += 1
        except BrokenImageError:
            outcome["broken"] += 1
            assert f"[{index}]" in dataset.describe(index)
    assert outcome == {"read": 11, "broken": 1}


def test_the_error_for_an_unprepared_dataset_contains_the_command_that_prepares_it(tmp_path):
    with pytest.raises(DataError) as error:
        datasets.open_dataset("photos", "train", data_dir=str(tmp_path))
    command = f"python -m fd_jax.data.prepare --name=photos --data_dir={tmp_path}"
    assert command in str(error.value) and "not prepared" in str(error.value)
    prepare.main(command.split()[3:])
    assert len(datasets.open_dataset("photos", "train", data_dir=str(tmp_path))) >= 1000


def test_the_error_for_unprepared_imagenet_names_its_tar_files(tmp_path):
    with pytest.raises(DataError) as error:
        datasets.open_dataset("imagenet2012", "train", data_dir=str(tmp_path))
    for word in ("ILSVRC2012_img_train.tar", "--manual_dir=", "file_format='array_record'"):
        assert word in str(error.value)


def test_a_dataset_prepared_as_tfrecord_is_refused(imagenet_tars, tmp_path):
    builder = tfds.builder("imagenet2012", data_dir=str(tmp_path))
    config = tfds.download.DownloadConfig(manual_dir=str(imagenet_tars[0]))
    builder.download_and_prepare(download_config=config)
    assert builder.info.file_format == tfds.core.FileFormat.TFRECORD
    with pytest.raises(
        DataError, match="(?s)prepared as tfrecord, .*no random access.*fd_jax.data.prepare"
    ):
        datasets.open_dataset("imagenet2012", "train", data_dir=str(tmp_path))


def test_unknown_names_and_splits_are_refused(imagenet):
    with pytest.raises(DataError, match="TFDS has no dataset 'nonesuch'"):
        datasets.open_dataset("nonesuch", "train")
    with pytest.raises(
        DataError, match=r"no split 'dev'; its splits are \['train', 'validation'\]"
    ):
        datasets.open_dataset("imagenet2012", "dev", data_dir=imagenet)


def test_splits_without_examples_are_refused(imagenet):
    with pytest.raises(DataError, match=r"no examples in 'train\[:0\]'.*'train': 12"):
        datasets.open_dataset("imagenet2012", "train[:0]", data_dir=imagenet)


def test_preparing_twice_changes_nothing(imagenet, capsys):
    arguments = ["--name=imagenet2012", f"--data_dir={imagenet}"]
    assert prepare.main(arguments) == 0  # although the tar files are not named again
    assert "12 train" in capsys.readouterr().out


def test_preparing_imagenet_without_its_tar_files_is_refused(tmp_path, capsys):
    arguments = ["--name=imagenet2012", f"--data_dir={tmp_path}", f"--manual_dir={tmp_path}"]
    assert prepare.main(arguments) == 2
    files = "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar"
    assert f"{tmp_path} does not hold {files}" in capsys.readouterr().err
    assert prepare.main(arguments[:2]) == 2
    assert f"--manual_dir must name a folder with {files}" in capsys.readouterr().err


# --- folders ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two classes, one with a nested image, and files that are not images."""
    for index, name in enumerate(("cat/b.JPEG", "cat/a.jpg", "dog/deep/c.jpeg", "dog/d.jpg")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(index))
    (tmp_path / "dog" / "notes.txt").write_text("no picture")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_the_sub_folders_of_a_folder_are_its_classes(folder):
    dataset = datasets.open_dataset(f"folder:{folder}", "ignored")
    assert dataset.num_classes == 2 and len(dataset) == 4
    ends = [dataset.describe(i).removeprefix(str(folder)) for i in range(4)]
    assert ends == ["/cat/a.jpg", "/cat/b.JPEG", "/dog/d.jpg", "/dog/deep/c.jpeg"]
    assert [dataset[i].label for i in range(4)] == [0, 0, 1, 1]
    assert dataset[1].image == jpeg(0)


def test_a_flat_folder_has_no_labels(folder):
    dataset = datasets.open_dataset(f"folder:{folder}/cat", "train")
    assert dataset.num_classes is None and [dataset[i].label for i in range(2)] == [-1, -1]


def test_the_split_replaces_its_placeholder_in_the_path(folder):
    assert len(datasets.open_dataset(f"folder:{folder}/{{split}}", "cat")) == 2


def test_a_folder_leaves_out_the_files_to_skip(folder):
    dataset = datasets.open_dataset(f"folder:{folder}", "train", skip=("b.JPEG",))
    assert len(dataset) == 3


def test_images_next_to_class_folders_are_refused(folder):
    with pytest.raises(DataError, match="1 images .d.jpg.* next to its 1 class folders"):
        datasets.open_dataset(f"folder:{folder}/dog", "train")


def test_an_image_deleted_after_indexing_raises_broken_image_error(folder):
    dataset = datasets.open_dataset(f"folder:{folder}", "train")
    (folder / "cat" / "a.jpg").unlink()
    with pytest.raises(BrokenImageError, match="a.jpg"):
        dataset[0]


def test_missing_folders_and_folders_without_images_are_refused(tmp_path):
    with pytest.raises(DataError, match="no folder of images at"):
        datasets.open_dataset(f"folder:{tmp_path}/none", "train")
    with pytest.raises(DataError, match="no images .*jpg.* under"):
        datasets.open_dataset(f"folder:{tmp_path}", "train")


def test_a_folder_and_tfds_give_the_same_pixels(imagenet, imagenet_tars, tmp_path):
    _, pictures = imagenet_tars
    for name, data in pictures.items():
        path = tmp_path / name.split("_")[0] / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    ours = datasets.open_dataset(f"folder:{tmp_path}", "train")
    theirs = datasets.open_dataset("imagenet2012", "train", data_dir=imagenet)
    by_name = {name: theirs[i].image for i, name in enumerate(file_names(theirs))}
    for index in range(len(ours)):
        np.testing.assert_array_equal(
            transforms.decode(ours[index].image),
            transforms.decode(by_name[ours.describe(index).rsplit("/", 1)[1]]),
        )
