"""How well the student of a run predicts its teachers, in numbers and in coloured maps."""

from collections.abc import Mapping
import json
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fd_jax import files, model_folder, settings
from fd_jax.data.feed import Feed
from fd_jax.errors import ConfigError, UserError
from fd_jax.evaluation import agreement
from fd_jax.show import document, pictures
from fd_jax.tasks import sections, stored
from fd_jax.tasks.base import EXTRA
from fd_jax.tasks.distill import DistillTask
from fd_jax.tasks.of_teacher import OfTeacher
from fd_jax.tasks.sections import SINGLE_TEACHER
from fd_jax.training import workdir as workdirs
from fd_jax.training.program import overlay
from fd_jax.typing import Config, PyTree

AGREEMENT = "agreement.json"
TEACHERS = (
    "teachers"  # key of agreement.json whose value has the scores of each of several teachers
)
BATCH = 64
EXAMPLES = 256  # of each split, evenly spread: what a laptop measures in seconds
MAP_IMAGES = 6
PAPERS_CROPS = 300 * 1_281_167  # epochs of ImageNet
COARSE = 8  # pixels along the side of an image in which only its parts are left
# Patches along the side of a map, and their number as a multiple of that in training.
MAP_GRID = 16
MAP_FACTOR = 2

Scores = dict[str, dict[str, dict[str, float]]]


def has_maps(config: Config) -> bool:
    """Whether the student learns the whole map of a teacher that runs.

    That is what can be compared and drawn.
    """
    return bool(_with_maps(config))


def _with_maps(config: Config) -> dict[str, sections.Section]:
    """The teachers that run, and whose whole map the student learns."""
    return {
        name: section
        for name, section in sections.of(config).items()
        if section.target.kind == "full" and not stored.folder_of(section)
    }


def blocks(config: Config, workdir: epath.Path, folder: epath.Path) -> list[document.Block]:
    """Measures and draws; the part of a report that needs data, teachers and student.

    Args:
      config: of a run with `has_maps`.
      workdir: of the run.
      folder: existing folder that receives agreement.json and the maps.

    Raises:
      UserError: a teacher or the data is not there any more.
    """
    config = as_plain(config)
    feed = Feed(**config.data)
    task = DistillTask(config)
    trained, extra = load_trained(task, workdir)
    students = {"before": initial(task, config.seed), "after": trained}
    scores: dict[str, Scores] = {}
    result: list[document.Block] = []
    for name in _with_maps(config):
        scores[name] = measure(task.of_teacher(name, extra), feed, **students)
        picture = f"maps_{name}.png" if name else "maps.png"
        grid = _draw(config, name, feed, students, extra, folder / picture)
        result += _blocks(task, name, feed, scores[name], grid, picture)
    # The file of a run with one teacher has no level of names.
    content = scores[SINGLE_TEACHER] if SINGLE_TEACHER in scores else {TEACHERS: scores}
    files.write_text(folder / AGREEMENT, json.dumps(content, indent=2) + "\n")
    return result


def as_plain(config: Config) -> Config:
    """The config of a run with the student as its model folder has it: whole, and of one size."""
    result: Config = ml_collections.ConfigDict(config.to_dict())
    result.student.freeze_blocks = 0
    result.data.update(sizes=(), phases=())
    if "lora" in result:
        result.lora.rank = 0
    return result


def load_trained(task: DistillTask, workdir: epath.Path) -> tuple[PyTree, PyTree]:
    """The student and projectors of a finished run, and the state that was not trained."""
    stored = model_folder.load(workdir / workdirs.MODEL)[1]
    parts = task.from_stored(jax.tree.map(jnp.asarray, stored))
    extra = task.extra_of(parts)
    return {name: parts[name] for name in ("encoder", "projector")}, extra


def initial(task: DistillTask, seed: int) -> PyTree:
    """The student and projectors with which step 0 of the run began."""
    # Without jit, since blocks repeat each other: their operations are compiled once for all.
    params, extra = task.init(jax.random.key(seed))
    found = task.load_initial()
    return task.as_stored(overlay(params, found), overlay(extra, found.get(EXTRA, {})))


def measure(task: OfTeacher, feed: Feed, *, before: PyTree, after: PyTree) -> Scores:
    """Agreement "before" and "after" on held-out images, and "training" on those seen in training.

    A run without held-out images has only "training".
    """
    frozen = jax.tree.map(jnp.asarray, task.load())

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


def summary(content: dict[str, Any]) -> list[str]:
    """The agreement of a report in a few lines, from the content of agreement.json."""
    named = content[TEACHERS] if TEACHERS in content else {"": content}
    return [line for name, scores in named.items() for line in _summary(scores, name)]


def _summary(scores: Scores, name: str) -> list[str]:
    if "after" not in scores:
        return [
            f"  {f'{name} {kind}'.lstrip()}  R2 in training {values['r2']:.3f}"
            for kind, values in scores["training"].items()
        ]
    return [f"held-out agreement with {name or 'the teacher'}"] + [
        f"  {kind:5s}  R2 {before['r2']:.3f} -> {after['r2']:.3f} "
        f"(training images: {scores['training'][kind]['r2']:.3f})   "
        f"cosine {before['cosine']:.3f} -> {after['cosine']:.3f} "
        f"(constant mean: {after['cosine_of_mean']:.3f})"
        for kind, before, after in _pairs(scores)
    ]


def _pairs(scores: Scores) -> list[tuple[str, dict[str, float], dict[str, float]]]:
    return [(kind, scores["before"][kind], after) for kind, after in scores["after"].items()]


def _draw(
    config: Config,
    name: str,
    feed: Feed,
    students: Mapping[str, PyTree],
    extra: PyTree,
    path: epath.Path,
) -> tuple[int, int]:
    """Draws the maps of one teacher and of each student; returns their grid."""
    trained = DistillTask(config).student_spec
    whole = DistillTask(enlarged(config))
    task, size = whole.of_teacher(name, extra), whole.student.image_size
    images = _images(feed, size)
    target, predict = jax.jit(task.teacher_target), jax.jit(task.predict)

    def patches(tokens: jax.Array) -> np.ndarray:
        return np.asarray(agreement.split_kinds(tokens, cls=task.cls)["patch"])

    maps = {"teacher": patches(target(task.load(), {"image": images}))}
    for student, params in students.items():
        encoder = jax.tree.map(np.asarray, params["encoder"])
        params = {**params, "encoder": trained.resized(encoder, size)[1]}
        maps[f"student, {student}"] = patches(predict(params, {"image": images}))
    pictures.maps(images, maps, path, grid=task.goal.grid, reference="teacher")
    return task.goal.grid


def enlarged(config: Config) -> Config:
    """The config at a larger image size, whose maps show more; as it is where there is none.

    Patches keep their size. The side of the map is `MAP_FACTOR` times that of training, and at
    least `MAP_GRID`. Not every size suits the windows of a Swin, and statistics of a teacher's
    tokens are those of one size.
    """
    task = DistillTask(config)
    rows = task.student.grid[0]
    wanted = max(MAP_GRID, MAP_FACTOR * rows)
    result: Config = ml_collections.ConfigDict(config.to_dict())

    def larger(side: int) -> int:
        if side * wanted % rows:
            raise ConfigError(f"no size of {rows} patches a side is {side} pixels times {wanted}")
        return side * wanted // rows

    try:
        side = larger(task.student.image_size)
        result.student.arch.image_size = result.data.image_size = side
        for goal in task.goals.each.values():
            if goal.target.fitted:
                return config
            network = result.teachers[goal.section.name] if goal.section.name else result.teacher
            network.image_size = larger(goal.teacher.image_size)
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
    task: DistillTask,
    name: str,
    feed: Feed,
    scores: Scores,
    grid: tuple[int, int],
    picture: str,
) -> list[document.Block]:
    goal, student = task.goals.each[name], task.student
    teacher, which = goal.teacher, f"the teacher {name}".rstrip()
    trained = " x ".join(map(str, goal.grid))
    shown = " x ".join(map(str, grid))
    columns = ("R2 before", "R2 after", "R2 in training", "cosine before", "cosine after")
    return [
        document.Heading(f"Agreement with {which}"),
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
        *_expectation(task.config, feed),
        document.Heading(f"Feature maps of {which}" if name else "Feature maps"),
        document.Picture(picture, "pictures, the teacher's features, and the student's"),
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


def _expectation(config: Config, feed: Feed) -> list[document.Block]:
    """What a run that is short beside the paper's may be expected to reach."""
    steps = settings.total_steps(config, feed.steps_per_epoch(config.batch_size))
    pictures_seen = config.batch_size * steps
    if pictures_seen > PAPERS_CROPS / 10:
        return []
    return [
        document.Paragraph(
            f"The student saw {pictures_seen:,} crops of {feed.examples('train'):,} pictures; the "
            f"paper's students see {PAPERS_CROPS / 1e6:.0f} million. With far fewer, an R2 near or "
            "below 0 is no sign of a mistake: it rises with the length of the run, and that of "
            "held-out pictures with their number."
        )
    ]


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
