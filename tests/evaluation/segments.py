"""A small segmenter on a ViT and pictures of several sizes; as a script, one process of several."""

from collections.abc import Collection
import dataclasses
import json
import sys
from typing import Any

from flax import nnx
import jax
import numpy as np

from fd_jax import inference, sharding
from fd_jax.evaluation import evaluators
from fd_jax.models.spec import ModelSpec, split
from tests import tiny

SIDE, CLASSES = 32, 5
SIZES = ((40, 57), (32, 32), (90, 50), (33, 75), (64, 20), (120, 41), (57, 40))
SCALE = (64, 36)


def spec():
    segmenter = {
        "classes": CLASSES,
        "neck": "pyramid",
        "decoder": "upernet",
        "channels": 8,
        "auxiliary_channels": 0,
        "dropout": 0.1,
        "blocks": [0, 0, 1, 1],
    }
    arch = {**tiny.TEACHER, "final_norm": False}
    return ModelSpec("vit", arch, segmenter=segmenter, source="tiny")


def parts(made):
    """Random weights under which every class is predicted somewhere."""
    encoder = tiny.randomize(split(made.build(rngs=nnx.Rngs(7)))[1], 1)
    module = made.build_segmenter(rngs=nnx.Rngs(3))
    segmenter = tiny.randomize(split(module)[1], 2)
    classifier = segmenter["decoder"]["classifier"]
    classifier["bias"] = np.zeros(CLASSES, np.float32)
    classifier["kernel"] -= classifier["kernel"].mean(axis=2, keepdims=True)
    statistics = jax.tree.map(np.asarray, module.fresh_statistics())
    return {"encoder": encoder, "segmenter": segmenter, "segmenter_statistics": statistics}


@dataclasses.dataclass(frozen=True)
class Picture:
    index: int
    name: str
    image: np.ndarray
    mask: np.ndarray


def picture(index, size):
    """Blocks of colour with noise, and labels of which some are ignored; the last class is rare."""
    rng = np.random.default_rng(index)
    blocks = rng.integers(0, 256, (-(-size[0] // 8), -(-size[1] // 8), 3))
    image = np.kron(blocks, np.ones((8, 8, 1)))[: size[0], : size[1]]
    image = np.clip(image + rng.normal(0, 10, image.shape), 0, 255).astype(np.uint8)
    mask = rng.integers(0, CLASSES - 1, size).astype(np.uint8)
    mask[rng.random(size) < 0.2] = 255
    return Picture(index, f"picture {index}", image, mask)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Held-out pictures as `SegmentationFeed` gives them."""

    items: list[Picture]
    broken: Collection[int] = ()

    def examples(self, split):
        assert split == "eval"
        return len(self.items)

    def pictures(self, split, indices=None):
        assert split == "eval"
        for index in range(len(self.items)) if indices is None else indices:
            if index not in self.broken:
                yield self.items[index]


def held_out(sizes=SIZES):
    return Pictures([picture(index, size) for index, size in enumerate(sizes)])


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The jitted functions of a segmentation task on a mesh."""

    mesh: Any
    predict: Any


def compiled(made, devices, **axes):
    mesh = sharding.make_mesh(devices=devices, **axes)
    encoder, segmenter = made.abstract()[0], made.abstract_segmenter()[0]

    def predict(params, extra, frozen, batch):
        del frozen
        images = made.normalize(batch["image"])
        maps = nnx.merge(encoder, params["encoder"]).intermediates(images, made.segmenter["blocks"])
        return nnx.merge(segmenter, params["segmenter"])(maps, extra).logits

    return Compiled(mesh, jax.jit(predict, out_shardings=sharding.batch_sharding(mesh)))


def of_any_size(made, devices):
    """As `compiled`, for pictures of any size."""
    mesh = sharding.make_mesh(devices=devices)

    def predict(params, extra, frozen, batch):
        del frozen
        parts = {**params, "segmenter_statistics": extra}
        return inference.segmenter_logits(made, parts, made.normalize(batch["image"]))

    return Compiled(mesh, jax.jit(predict, out_shardings=sharding.batch_sharding(mesh)))


def weights(made, mesh):
    whole = sharding.replicated(mesh)
    placed = jax.tree.map(lambda leaf: sharding.place(np.asarray(leaf), whole), parts(made))
    statistics = placed.pop("segmenter_statistics")
    return evaluators.Weights(placed, statistics, {})


def main(process, count, port, tensor, mode="slide", broken=""):
    """Prints the confusion matrix and the number of pictures that this process opened."""
    from fd_jax.evaluation import segmentation

    jax.distributed.initialize(f"localhost:{port}", int(count), int(process))
    made, devices = spec(), jax.devices()
    whole = mode == "whole"
    run = of_any_size(made, devices) if whole else compiled(made, devices, tensor=int(tensor))
    data = held_out()
    opened = []

    class Counted(Pictures):
        def pictures(self, split, indices=None):
            for item in super().pictures(split, indices):
                opened.append(item.name)
                yield item

    patch = made.arch["patch_size"]
    evaluator = segmentation.Segmented(8, CLASSES, SIDE, SCALE, mode, 20, patch=patch)
    counted = Counted(data.items, {int(broken)} if broken else ())
    matrix = evaluator.confusion_matrix(run, weights(made, run.mesh), counted)
    print(json.dumps({"matrix": matrix.tolist(), "opened": opened}))


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    main(*sys.argv[1:])
