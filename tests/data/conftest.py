"""ImageNet as TFDS writes it, from tar files with the real layout and a few images in them."""

import io
import tarfile

import numpy as np
from PIL import Image
import pytest

SYNSETS = ("n01440764", "n02487347")  # classes 0 and 373; the second has a file to skip
PICTURES_EACH = 6
SKIPPED = "n02487347_1956.JPEG"


def jpeg(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((80, 60)).save(buffer, "JPEG")
    return buffer.getvalue()


def tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


@pytest.fixture(scope="session")
def imagenet_tars(tmp_path_factory):
    """A manual_dir, and the bytes of its training images by file name."""
    folder, pictures = tmp_path_factory.mktemp("manual"), {}
    for position, synset in enumerate(SYNSETS):
        for number in range(PICTURES_EACH):
            name = SKIPPED if position and not number else f"{synset}_{number}.JPEG"
            pictures[name] = jpeg(10 * position + number)
    inner = {}
    for synset in SYNSETS:
        tar(folder / synset, {k: v for k, v in pictures.items() if k.startswith(synset)})
        inner[f"{synset}.tar"] = (folder / synset).read_bytes()
    tar(folder / "ILSVRC2012_img_train.tar", inner)
    validation = {f"ILSVRC2012_val_{number:08d}.JPEG": jpeg(100 + number) for number in range(1, 6)}
    tar(folder / "ILSVRC2012_img_val.tar", validation)
    return folder, pictures


@pytest.fixture(scope="session")
def imagenet(imagenet_tars, tmp_path_factory):
    """A data_dir with imagenet2012, prepared the way users prepare it."""
    from fd_jax.data import prepare

    folder = str(tmp_path_factory.mktemp("imagenet"))
    prepare.prepare("imagenet2012", data_dir=folder, manual_dir=str(imagenet_tars[0]))
    return folder
