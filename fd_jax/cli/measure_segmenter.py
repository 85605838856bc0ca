"""Evaluation without training: mean IoU of a segmenter, a table of its classes, and pictures."""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

from etils import epath
import jax
from jax.sharding import Mesh
import numpy as np

from fd_jax import files, inference, model_folder, sharding
from fd_jax.cli import evaluation_only
from fd_jax.console import say
from fd_jax.data.segmentation import SegmentationFeed
from fd_jax.errors import ConfigError
from fd_jax.evaluation import segmentation
from fd_jax.evaluation.evaluators import Weights
from fd_jax.models.spec import ModelSpec
from fd_jax.show import overlays, tables
from fd_jax.tasks.segment import outside
from fd_jax.typing import Config

SHOWN = 12  # pictures of the page


class Loaded(NamedTuple):
    """A segmenter on a mesh, in the form in which `Segmented` calls a network.

    Attributes:
      mesh: mesh of devices.
      predict: jitted (params, extra, frozen, batch) -> logits, split over the batch.
    """

    mesh: Mesh
    predict: Any


def measure(
    config: Config, workdir: epath.PathLike, *, per_class: bool = False
) -> dict[str, float]:
    """Evaluates the segmenter in `workdir`/model or, if there is none, in `config.init_from`.

    Writes evaluation.json into the workdir; per_class.csv, confusion.csv and overlays.html on
    request.

    Args:
      config: segmentation config, of which the data, evaluation and mesh fields are used.
      workdir: folder that receives the results.
      per_class: whether to write a table of the classes and a page of pictures.

    Returns:
      {"miou", "macc", "aacc"} over the held-out split.

    Raises:
      UserError: there is no such folder, it has no segmenter, or one of other classes.
    """
    workdir = epath.Path(workdir)
    folder, spec = _folder(config, workdir)
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch(config.batch_size, 1, mesh)
    evaluator = segmentation.Segmented.of(config, spec, fill=outside(spec))
    data = _held_out(config)
    model = inference.load_model(folder, image_size=config.data.image_size)
    say(f"measuring {folder} ({spec.source}) on {config.data.eval_split} of {data.name}")
    weights = Weights(jax.device_put(model.params, sharding.replicated(mesh)), {}, {})
    matrix = evaluator.confusion_matrix(_loaded(model.spec, mesh), weights, data)
    result = segmentation.scores(matrix)
    figures = {"miou": result.miou, "macc": result.macc, "aacc": result.aacc}
    say("  ".join(f"{name} {value:.5f}" for name, value in figures.items()))
    if jax.process_index() == 0:
        measured_on = f"{data.name}/{config.data.eval_split}"
        evaluation_only.write_record(workdir, folder=folder, data=measured_on, figures=figures)
        if per_class:
            names = data.class_names or [str(k) for k in range(evaluator.classes)]
            table = overlays.per_class(names, result.iou, result.accuracy)
            files.write_text(workdir / "per_class.csv", table)
            files.write_text(workdir / tables.CONFUSION, tables.confusion(matrix, names))
            files.write_text(workdir / "overlays.html", _page(model, data, names))
        say(f"written to {workdir}")
    return figures


def _folder(config: Config, workdir: epath.Path) -> tuple[epath.Path, ModelSpec]:
    """The folder to measure and its spec, which has a segmenter of the config's classes."""
    folder = evaluation_only.trained(config, workdir, "segmenter")
    spec = model_folder.load_spec(folder)
    if spec.segmenter is None:
        raise ConfigError(
            f"--eval_only: {folder} has no segmenter; leave --eval_only out to train one on it"
        )
    classes = spec.segmenter["classes"]
    if classes != config.segment.classes:
        raise ConfigError(
            f"--eval_only: the segmenter in {folder} has {classes} classes, but segment.classes="
            f"{config.segment.classes}; set --config.segment.classes={classes} and the data it is "
            "of"
        )
    return folder, spec


def _held_out(config: Config) -> SegmentationFeed:
    """The held-out pictures; those for training do not have to exist."""
    fields = {**config.data.to_dict(), "split": config.data.eval_split}
    return SegmentationFeed(**fields, classes=config.segment.classes, fill=(0, 0, 0))


def _loaded(spec: ModelSpec, mesh: Mesh) -> Loaded:
    logits = functools.partial(inference.segmenter_logits, spec)

    def predict(params, extra, frozen, batch):
        del extra, frozen
        return logits(params, spec.normalize(batch["image"]))

    return Loaded(mesh, jax.jit(predict, out_shardings=sharding.batch_sharding(mesh)))


def _page(model: inference.Model, data: SegmentationFeed, names: Sequence[str]) -> str:
    """HTML of the first held-out pictures, their labels and predictions."""
    shown = range(min(SHOWN, data.examples("eval")))
    samples = [
        overlays.Sample(picture.name, picture.image, picture.mask, _labels(model, picture.image))
        for picture in data.pictures("eval", shown)
    ]
    return overlays.page(samples, names, title=model.spec.source)


def _labels(model: inference.Model, image: np.ndarray) -> np.ndarray:
    return model.segment([image])[0]
