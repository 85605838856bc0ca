"""What a distillation run achieved, for people to look at.

    python -m fd_jax.report --workdir=runs/quickstart

Reads a finished workdir and writes `report/report.md` with its pictures: the loss curve, held-out
agreement with the teacher before and after, beside that on what was trained on, and colour maps of
both feature maps.
"""

from collections.abc import Callable, Iterable, Sequence
import json
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fd_jax import files, metrics, model_folder
from fd_jax.cli import application, scripts
from fd_jax.data.feed import Feed
from fd_jax.errors import UserError
from fd_jax.evaluation import agreement
from fd_jax.show import pictures
from fd_jax.tasks import registry
from fd_jax.tasks.distill import DistillTask
from fd_jax.typing import Config, PyTree

BATCH = 64
MAP_PICTURES = 6


def write_report(workdir: epath.PathLike) -> epath.Path:
    """Writes the report of a finished run and returns its folder.

    Raises:
      UserError: the workdir holds no finished distillation run.
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
    rows = metrics.read(workdir)
    _plot_losses(rows, folder / "loss.png")
    images = _held_out_pictures(feed, config.data.image_size)
    _plot_maps(
        task,
        {"student, before": untrained, "student, after": trained},
        frozen,
        images,
        folder / "maps.png",
    )
    files.write_text(folder / "agreement.json", json.dumps(scores, indent=2) + "\n")
    text = _text(task, rows, scores)
    files.write_text(folder / "report.md", text)
    return folder


def summary(folder: epath.Path) -> str:
    """The figures of a written report in a few lines for the terminal."""
    scores = json.loads((folder / "agreement.json").read_text())
    lines = [f"held-out agreement with the teacher (report in {folder}/report.md)"]
    for kind, after in scores["after"].items():
        before = scores["before"][kind]
        lines.append(
            f"  {kind:5s}  R2 {before['r2']:.3f} -> {after['r2']:.3f} "
            f"(training pictures: {scores['training'][kind]['r2']:.3f})   "
            f"cosine {before['cosine']:.3f} -> {after['cosine']:.3f} "
            f"(constant mean: {after['cosine_of_mean']:.3f})"
        )
    return "\n".join(lines)


def _open_run(workdir: epath.Path) -> tuple[Config, DistillTask, PyTree]:
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} is no workdir: it has no config.json; name one of train.py's")
    config = ml_collections.ConfigDict(json.loads(path.read_text()))
    if registry.kind_of(config) is not registry.DISTILLATION:
        raise UserError(f"{workdir} is not a distillation run: its config names no teacher")
    task = DistillTask(config)
    kind = task.goal.target.kind
    if kind != "full":
        raise UserError(f"reports compare whole maps; this run has target.kind={kind}")
    _, params = model_folder.load(workdir / "model")
    return config, task, jax.tree.map(jnp.asarray, params)


def _held_out_pictures(feed: Feed, size: int) -> np.ndarray:
    """Some held-out pictures, of different labels where there are any. [M, size, size, 3] uint8"""
    chosen: dict[int, int] = {}
    for index in range(feed.examples("eval")):
        label = feed.label("eval", index)
        chosen.setdefault(label if label >= 0 else -1 - index, index)
        if len(chosen) == MAP_PICTURES:
            break
    return np.stack([feed.picture("eval", index, size) for index in chosen.values()])


def _plot_losses(rows: Iterable[dict[str, float]], path: epath.Path) -> None:
    plt = pictures.pyplot()
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if "eval" in name else "")
    axes.set(xlabel="step", ylabel="smooth-L1 loss", yscale="log")
    axes.legend()
    pictures.save(figure, path)


def _plot_maps(
    task: DistillTask,
    students: dict[str, PyTree],
    frozen: PyTree,
    images: np.ndarray,
    path: epath.Path,
) -> None:
    """Pictures, teacher and students side by side, in the teacher's three principal colours."""
    batch = {"image": images}
    maps = {"teacher": jax.jit(task.teacher_target)(frozen, batch)}
    predict = jax.jit(task.predict)
    maps |= {name: predict(params, batch) for name, params in students.items()}
    patches = {
        name: np.asarray(agreement.split_kinds(tokens, cls=task.cls)["patch"])
        for name, tokens in maps.items()
    }
    colour = principal_colours(patches["teacher"])
    plt = pictures.pyplot()
    columns = ["held-out picture", *patches]
    figure, axes = plt.subplots(
        len(images),
        len(columns),
        figsize=(2 * len(columns), 2 * len(images)),
        layout="constrained",
        squeeze=False,
    )
    for row, picture in enumerate(images):
        axes[row][0].imshow(picture)
        for column, tokens in enumerate(patches.values(), start=1):
            colours = colour(tokens[row]).reshape(*task.student.grid, 3)
            axes[row][column].imshow(colours, interpolation="nearest")
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    pictures.save(figure, path)


def principal_colours(tokens: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Fits the first three principal components of [..., D] tokens to red, green and blue.

    Returns:
      A function [..., D] -> [..., 3] in [0, 1], the same for every network that is compared.
    """
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    mean = flat.mean(axis=0)
    _, _, axes = np.linalg.svd(flat - mean, full_matrices=False)
    low, high = np.percentile((flat - mean) @ axes[:3].T, [1, 99], axis=0)

    def colour(other: np.ndarray) -> np.ndarray:
        return np.clip(((other - mean) @ axes[:3].T - low) / (high - low), 0, 1)

    return colour


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
        "Agreement with the teacher's whitened features on held-out regions. R2 is measured against"
        " the training set's mean target; a network that predicts that constant has R2 0 and the"
        " cosine of the last column. R2 in training is that of the training pictures, without"
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


def main(argv: Sequence[str]) -> None:
    """Command line."""
    workdir = scripts.WORKDIR.value
    if len(argv) > 1 or workdir is None:
        raise UserError("usage: python -m fd_jax.report --workdir=WORKDIR")
    print(summary(write_report(workdir)))


if __name__ == "__main__":
    application.run_app(main)
