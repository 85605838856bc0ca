"""Writes a report on a finished distillation run.

    python -m fd_jax.report --workdir=runs/quickstart

Reads a finished workdir and writes `report/report.md` and its plots: the loss curve, the agreement
with the teacher before and after training, on held-out and on training images, and the feature maps
of teacher and student in colour.
"""

import argparse
from collections.abc import Sequence
import json
import sys
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fd_jax import files, model_folder
from fd_jax.data.feed import Feed
from fd_jax.errors import UserError
from fd_jax.evaluation import agreement
from fd_jax.show import pictures
from fd_jax.tasks import registry
from fd_jax.tasks.distill import DistillTask
from fd_jax.training import metric_writer
from fd_jax.training import workdir as workdirs
from fd_jax.typing import Config, PyTree

BATCH = 64
MAP_IMAGES = 6


def write_report(workdir: epath.PathLike) -> epath.Path:
    """Writes the report of a finished run and returns its folder.

    Raises:
      UserError: the workdir has no finished distillation run.
    """
    workdir = epath.Path(workdir)
    config, task, trained = _open_run(workdir)
    folder = workdir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    frozen = jax.tree.map(jnp.asarray, task.load_frozen())
    untrained, _ = jax.jit(task.init)(jax.random.key(config.seed))
    feed = Feed(**config.data)

    mean = agreement.mean_target(task, frozen, feed.sequential("train", batch_size=BATCH))

    def score(params: PyTree, split: str) -> dict[str, dict[str, float]]:
        batches = feed.sequential(split, batch_size=BATCH)
        return agreement.agreement(task, params, frozen, batches, mean)

    scores = {
        "before": score(untrained, "eval"),
        "after": score(trained, "eval"),
        "training": score(trained, "train"),
    }
    rows = metric_writer.read(workdir)
    pictures.losses(rows, folder / "loss.png")
    images = _held_out_images(feed, config.data.image_size)
    students = {"student, before": untrained, "student, after": trained}
    patches = _patches(task, students, frozen, images)
    pictures.maps(images, patches, folder / "maps.png", grid=task.student.grid, reference="teacher")
    files.write_text(folder / "agreement.json", json.dumps(scores, indent=2) + "\n")
    text = _text(task, rows, scores)
    files.write_text(folder / "report.md", text)
    return folder


def summary(folder: epath.Path) -> str:
    """The main results of a written report, in a few lines for the terminal."""
    scores = json.loads((folder / "agreement.json").read_text())
    lines = [f"held-out agreement with the teacher (report in {folder}/report.md)"]
    for kind, after in scores["after"].items():
        before = scores["before"][kind]
        lines.append(
            f"  {kind:5s}  R2 {before['r2']:.3f} -> {after['r2']:.3f} "
            f"(training images: {scores['training'][kind]['r2']:.3f})   "
            f"cosine {before['cosine']:.3f} -> {after['cosine']:.3f} "
            f"(constant mean: {after['cosine_of_mean']:.3f})"
        )
    return "\n".join(lines)


def _open_run(workdir: epath.Path) -> tuple[Config, DistillTask, PyTree]:
    path = workdir / workdirs.CONFIG
    if not path.exists():
        raise UserError(
            f"{workdir} is not a workdir: it has no config.json; use the --workdir of train.py"
        )
    config = ml_collections.ConfigDict(workdirs.read_config(workdir))
    if registry.kind_of(config) is not registry.DISTILLATION:
        raise UserError(f"{workdir} is not a distillation run: its config has no teacher")
    task = DistillTask(config)
    kind = task.goal.target.kind
    if kind != "full":
        raise UserError(f"reports compare whole maps; this run has target.kind={kind}")
    _, params = model_folder.load(workdir / workdirs.MODEL)
    return config, task, jax.tree.map(jnp.asarray, params)


def _held_out_images(feed: Feed, size: int) -> np.ndarray:
    """Some held-out images, with different labels if there are any. -> [M, size, size, 3] uint8."""
    chosen: dict[int, int] = {}
    for index in range(feed.examples("eval")):
        label = feed.label("eval", index)
        chosen.setdefault(label if label >= 0 else -1 - index, index)
        if len(chosen) == MAP_IMAGES:
            break
    return np.stack([feed.image("eval", index, size) for index in chosen.values()])


def _patches(
    task: DistillTask, students: dict[str, PyTree], frozen: PyTree, images: np.ndarray
) -> dict[str, np.ndarray]:
    """Patch tokens of the teacher and of each student's prediction. -> [M, H*W, D] by name."""
    batch = {"image": images}
    maps = {"teacher": jax.jit(task.teacher_target)(frozen, batch)}
    predict = jax.jit(task.predict)
    maps |= {name: predict(params, batch) for name, params in students.items()}
    return {
        name: np.asarray(agreement.split_kinds(tokens, cls=task.cls)["patch"])
        for name, tokens in maps.items()
    }


def _text(task: DistillTask, rows: Sequence[dict[str, float]], scores: dict[str, Any]) -> str:
    teacher, student = task.goal.teacher, task.student
    lines = [
        "# Distillation report",
        "",
        f"Teacher: {teacher.spec.source}, {teacher.width} wide, {teacher.depth} deep, frozen. "
        f"Student: {student.width} wide, {student.depth} deep, from random weights. "
        f"Input {student.image_size} px, grid {student.grid}.",
        "",
        "![loss](loss.png)",
        "",
        "Agreement with the teacher's whitened features on held-out images. R2 is relative to the"
        " mean target of the training set; a network that predicts this constant has R2 0 and the"
        " cosine in the last column. R2 in training is measured on the training images, without"
        " random crops.",
        "",
        "| token | R2 before | R2 after | R2 in training | cosine before | cosine after | "
        "cosine of the mean |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, after in scores["after"].items():
        before = scores["before"][kind]
        lines.append(
            f"| {kind} | {before['r2']:.3f} | {after['r2']:.3f} "
            f"| {scores['training'][kind]['r2']:.3f} | {before['cosine']:.3f} "
            f"| {after['cosine']:.3f} | {after['cosine_of_mean']:.3f} |"
        )
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
    lines += [
        "",
        "![maps](maps.png)",
        "",
        "Colours are the first three principal components of the teacher's patch tokens, the same "
        "for every column.",
        "",
        f"Steps: {int(rows[-1]['step'])}. Median rate: {np.median(rates):.1f} images/s.",
        "",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; a mistake of the user gives one message and exit status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workdir", required=True, help="workdir of a finished run, local or gs://"
    )
    args = parser.parse_args(argv)
    try:
        print(summary(write_report(args.workdir)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
