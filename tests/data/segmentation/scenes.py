"""Folders of pictures and masks with the layouts that users have, written by Pillow."""

import io
import pathlib

import numpy as np
from PIL import Image

from fd_jax.data.segmentation import SegmentationFeed

SPLITS = {"training": ("train", 7), "validation": ("val", 3)}


def encode(pixels, kind="PNG", mode=None, **options):
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def blocks(seed, height, width, values, side=12):
    """A mask of rectangles, each with one of the values. uint8 [height, width]"""
    rng = np.random.default_rng(seed)
    coarse = rng.choice(np.asarray(values, np.uint8), (-(-height // side), -(-width // side)))
    return np.kron(coarse, np.ones((side, side), np.uint8))[:height, :width]


def picture(seed, height, width):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height)))


def ade20k(folder):
    """ADEChallengeData2016 with ten pictures; returns its folder."""
    root = pathlib.Path(folder) / "ADEChallengeData2016"
    for split, (short, count) in SPLITS.items():
        for number in range(1, count + 1):
            height, width = 60 + 4 * number, 90 - 3 * number
            name = f"ADE_{short}_{number:08d}"
            pixels = picture(number, height, width)
            kind = {"mode": "L"} if number == 2 else {}  # a few of ADE20K's pictures are grey
            write(root / "images" / split / f"{name}.jpg", encode(pixels, "JPEG", **kind))
            mask = blocks(number, height, width, range(151))
            write(root / "annotations" / split / f"{name}.png", encode(mask))
    lines = [f"{k}\t0.1\t9\t1\t0\tname {k}, synonym" for k in range(1, 151)]
    lines.insert(0, "Idx\tRatio\tTrain\tVal\tStuff\tName")
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    (root / "sceneCategories.txt").write_text("ADE_train_00000001 airport_terminal\n")
    return root


def palette_png(mask):
    """A mask as PNG with a palette, like those of Pascal VOC."""
    image = Image.fromarray(mask).convert("P")
    image.putdata(mask.ravel().tolist())
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tolist())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


FIELDS = {
    "name": "ade20k",
    "root": "",
    "images": "images/{split}",
    "labels": "annotations/{split}",
    "class_names": "",
    "ignore": 255,
    "reduce_zero_label": True,
    "split": "training",
    "eval_split": "validation",
    "data_dir": "",
    "image_size": 48,
    "scale": (256, 64),
    "ratio": (0.5, 2.0),
    "max_share": 0.75,
    "flip": True,
    "distort": True,
    "threads": 4,
    "workers": 0,
    "max_broken": 1,
    "fill": (124, 116, 104),
    "classes": 150,
}


def feed(**fields):
    return SegmentationFeed(**{**FIELDS, **fields})
