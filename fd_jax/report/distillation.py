"""How well the student of a run predicts its teacher, in numbers and in coloured maps."""

from collections.abc import Mapping
import json

from etils import epath
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fd_jax import files, model_folder
from fd_jax.data.feed import Feed
from fd_jax.errors import UserError
from fd_jax.evaluation import agreement
from fd_jax.show import document, pictures
from fd_jax.tasks.distill import DistillTask
from fd_jax.training import workdir as workdirs
from fd_jax.training.program import overlay
from fd_jax.typing import Config, PyTree

AGREEMENT = "agreement.json"
BATCH = 64
EXAMPLES = 256  # of each split, evenly spread: what a laptop measures in seconds
MAP_IMAGES = 6
COARSE = 8  # pixels along the side of an image in which only its parts are left
# Patches along the side of a map, and their number as a multiple of that in training.
MAP_GRID = 16
MAP_FACTOR = 2

Scores = dict[str, dict[str, dict[str, float]]]


def has_maps(config: Config) -> bool:
    """Whether the student learns a whole map, which is what can be compared and drawn."""
    return config.target.kind == "full"


def blocks(config: Config, workdir: epath.Path, folder: epath.Path) -> list[document.Block]:
    """Measures and draws; the part of a report that needs data, teacher and student.

    Args:
      config: of a run with `has_maps`.
      workdir: of the run.
      folder: existing folder that receives agreement.json and the maps.

    Raises:
      UserError: the teacher or the data is not there any more.
    """
    config = as_plain(config)
    feed = Feed(**config.data)
    task = DistillTask(config)
    trained = load_trained(workdir)
    untrained = initial(task, config.seed)
    scores = measure(task, feed, before=untrained, after=trained)
    files.write_text(folder / AGREEMENT, json.dumps(scores, indent=2) + "\n")
    grid = _draw(config, feed, {"before": untrained, "after": trained}, folder / "maps.png")
    return _blocks(task, feed, scores, grid)


def as_plain(config: Config) -> Config:
    """The config of a run with the student as its model folder has it: whole, and of one size."""
    result: Config = ml_collections.ConfigDict(config.to_dict())
    result.student.freeze_blocks = 0
    result.data.update(sizes=(), phases=())
    if "lora" in result:
        result.lora.rank = 0
    return result


def load_trained(workdir: epath.Path) -> PyTree:
    """The student and projector of a finished run."""
    return jax.tree.map(jnp.asarray, model_folder.load(workdir / workdirs.MODEL)[1])


def initial(task: DistillTask, seed: int) -> PyTree:
    """The student and projector with which step 0 of the run began."""
    # Without jit, since blocks repeat each other: their operations are compiled once for all.
    return overlay(task.init(jax.random.key(seed))[0], task.load_initial())


def measure(task: DistillTask, feed: Feed, *, before: PyTree, after: PyTree) -> Scores:
    """Agreement "before" and "after" on held-out images, and "training" on those seen in training.

    A run without held-out images has only "training".
    """
    frozen = jax.tree.map(jnp.asarray, task.load_frozen())

    def totals(split: str, students: Mapping[str, PyTree]) -> dict[str, agreement.Totals]:
        batches = feed.sequential(split, batch_size=BATCH, examples=EXAMPLES)
        return agreement.measure(task, students, frozen, batches)

    training = totals("train", {"after": after})
    mean = {kind: total.mean for kind, total in training.items()}
    scores = {"training": agreement.scores(training, "after", mean)}
    if feed.eval_dataset is not None:
        held_out = totals("eval", {"before": before, "after": after})
        scores |= {name: agreement.scores(held_out, name, mean) for name in ("before", "after")}
    return scores


def summary(scores: Scores) -> list[str]:
    """The agreement of a report in a few lines."""
    if "after" not in scores:
        return [f"  {k}  R2 in training {v['r2']:.3f}" for k, v in scores["training"].items()]
    return ["held-out agreement with the teacher"] + [
        f"  {kind:5s}  R2 {before['r2']:.3f} -> {after['r2']:.3f} "
        f"(training images: {scores['training'][kind]['r2']:.3f})   "
        f"cosine {before['cosine']:.3f} -> {after['cosine']:.3f} "
        f"(constant mean: {after['cosine_of_mean']:.3f})"
        for kind, before, after in _pairs(scores)
    ]


def _pairs(scores: Scores) -> list[tuple[str, dict[str, float], dict[str, float]]]:
    return [(kind, scores["before"][kind], after) for kind, after in scores["after"].items()]


def _draw(
    config: Config, feed: Feed, students: Mapping[str, PyTree], path: epath.Path
) -> tuple[int, int]:
    """Draws the maps of the teacher and of each student; returns their grid."""
    trained = DistillTask(config).student_spec
    task = DistillTask(enlarged(config))
    size = task.student.image_size
    images = _images(feed, size)
    target, predict = jax.jit(task.teacher_target), jax.jit(task.predict)

    def patches(tokens: jax.Array) -> np.ndarray:
        return np.asarray(agreement.split_kinds(tokens, cls=task.cls)["patch"])

    maps = {"teacher": patches(target(task.load_frozen(), {"image": images}))}
    for name, params in students.items():
        encoder = jax.tree.map(np.asarray, params["encoder"])
        params = {**params, "encoder": trained.resized(encoder, size)[1]}
        maps[f"student, {name}"] = patches(predict(params, {"image": images}))
    pictures.maps(images, maps, path, grid=task.student.grid, reference="teacher")
    return task.student.grid


def enlarged(config: Config) -> Config:
    """The config at a larger image size, whose maps show more; as it is where there is none.

    Patches keep their size. The side of the map is `MAP_FACTOR` times that of training, and at
    least `MAP_GRID`. Not every size suits the windows of a Swin.
    """
    task = DistillTask(config)
    rows = task.student.grid[0]
    wanted = max(MAP_GRID, MAP_FACTOR * rows)
    sides = [size * wanted for size in (task.student.image_size, task.goal.teacher.image_size)]
    if any(side % rows for side in sides):
        return config
    result: Config = ml_collections.ConfigDict(config.to_dict())
    result.student.arch.image_size = result.data.image_size = sides[0] // rows
    result.teacher.image_size = sides[1] // rows
    try:
        DistillTask(result)
    except UserError:
        return config
    return result


def _images(feed: Feed, size: int) -> np.ndarray:
    """Held-out images that show something. -> [M, size, size, 3] uint8.

    Of each class, the image with the largest contrasts between its parts is a candidate; without
    classes, every image is one.
    """
    split = "train" if feed.eval_dataset is None else "eval"
    examples = feed.examples(split)
    best: dict[int, tuple[float, int]] = {}
    for index in range(0, examples, -(-examples // EXAMPLES)):
        label = feed.label(split, index)
        contrast = float(feed.image(split, index, COARSE).std(axis=(0, 1)).sum())
        key = label if label >= 0 else -1 - index
        best[key] = max(best.get(key, (0.0, index)), (contrast, index))
    chosen = sorted(best.values(), reverse=True)[:MAP_IMAGES]
    return np.stack([feed.image(split, index, size) for _, index in chosen])


def _blocks(
    task: DistillTask, feed: Feed, scores: Scores, grid: tuple[int, int]
) -> list[document.Block]:
    teacher, student = task.goal.teacher, task.student
    trained = " x ".join(map(str, student.grid))
    shown = " x ".join(map(str, grid))
    columns = ("R2 before", "R2 after", "R2 in training", "cosine before", "cosine after")
    return [
        document.Heading("Agreement with the teacher"),
        document.Paragraph(
            f"Teacher: {teacher.spec.source}, {teacher.width} wide, {teacher.depth} deep, frozen. "
            f"Student: {student.width} wide, {student.depth} deep, from {_origin(task)}. "
            f"Input {student.image_size} px, grid {trained}."
        ),
        document.Table(("token", *columns, "cosine of the mean"), _rows(scores)),
        document.Paragraph(
            f"Measured on {_count(feed, 'eval')} held-out and {_count(feed, 'train')} training "
            "images, evenly spread and without random crops, against the teacher's normalised "
            "features. R2 is relative to the mean target of the training set; a network that "
            "predicts this constant has R2 0 and the cosine in the last column.",
            quiet=True,
        ),
        document.Heading("Feature maps"),
        document.Picture("maps.png", "pictures, the teacher's features, and the student's"),
        document.Paragraph(
            "Colours are the first three principal components of the teacher's patch tokens, the "
            f"same for every column. The maps have {shown} patches; in training they had "
            f"{trained}. Pictures: of each class, the one with the largest contrasts.",
            quiet=True,
        ),
    ]


def _origin(task: DistillTask) -> str:
    config = task.config
    return config.student.get("init_from", "") or config.init_from or "random weights"


def _count(feed: Feed, split: str) -> int:
    return min(feed.examples(split), EXAMPLES) if split == "train" or feed.eval_dataset else 0


def _rows(scores: Scores) -> list[tuple[str, ...]]:
    """A row for each kind of token; only R2 in training if nothing was held out."""
    if "after" not in scores:
        return [(k, "", "", f"{v['r2']:.3f}", "", "", "") for k, v in scores["training"].items()]
    return [
        (
            kind,
            f"{before['r2']:.3f}",
            f"{after['r2']:.3f}",
            f"{scores['training'][kind]['r2']:.3f}",
            f"{before['cosine']:.3f}",
            f"{after['cosine']:.3f}",
            f"{after['cosine_of_mean']:.3f}",
        )
        for kind, before, after in _pairs(scores)
    ]
