"""What the log of any run shows: its settings, its curves, its rates and its last evaluation."""

from collections.abc import Sequence

from etils import epath
import numpy as np

from fd_jax.settings import flat
from fd_jax.show import document, pictures
from fd_jax.training.watch import EVALUATION, Best
from fd_jax.typing import Config

Rows = Sequence[dict[str, float]]

# Settings that tell runs apart, of those that a config has.
SHOWN = (
    "teacher.source",
    "target.kind",
    "init_from",
    "model.trains",
    "segment.decoder",
    "data.name",
    "data.split",
    "data.eval_split",
    "data.image_size",
    "batch_size",
    "optim.name",
    "optim.peak_lr",
    "optim.lr_batch",
    "optim.weight_decay",
    "optim.layer_decay",
    "seed",
)
# The same of each of several teachers.
OF_TEACHERS = ("source", "weight", "target.kind", "target.normalize")
RATES = {
    "images_per_second": "images/s",
    "step_seconds": "seconds per step",
    "input_wait": "share of the time spent waiting for data",
    "mfu": "model FLOPs utilisation",
}


def blocks(config: Config, rows: Rows, folder: epath.Path) -> list[document.Block]:
    """The part of a report that needs neither data nor weights.

    Args:
      config: of the run.
      rows: of its metrics, see `metric_writer.read`.
      folder: existing folder that receives the plots.
    """
    pictures.losses(rows, folder / "loss.png")
    result: list[document.Block] = [
        document.Table(("setting", "value"), _settings(config), words=True),
        document.Heading("Training"),
        document.Picture("loss.png", "loss over the steps"),
        document.Table(("rate", "median"), _rates(rows)),
    ]
    curves = evaluations(rows)
    if curves:
        if any(len(points) > 1 for points in curves.values()):
            pictures.curves(curves, folder / "evaluation.png")
            result.append(document.Picture("evaluation.png", "held-out figures over the steps"))
        head = ("held out", "at the end", "best", "best at step")
        result.append(document.Table(head, [_final(n, p, rows) for n, p in curves.items()]))
    return result


def summary(rows: Rows) -> list[str]:
    """The last evaluation in a line, if there was one."""
    last = [f"{name} {points[-1][1]:.5f}" for name, points in evaluations(rows).items()]
    return [f"held out, step {int(rows[-1]['step'])}: " + "  ".join(last)] if last else []


def evaluations(rows: Rows) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every held-out figure, by its name."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(EVALUATION):
                point = (int(row["step"]), value)
                curves.setdefault(name.removeprefix(EVALUATION), []).append(point)
    return curves


def _settings(config: Config) -> list[tuple[str, str]]:
    values = flat(config.to_dict())
    teachers = [f"teachers.{name}" for name in config.get("teachers", {})]
    names = [f"{teacher}.{field}" for teacher in teachers for field in OF_TEACHERS] + [*SHOWN]
    return [(name, str(values[name])) for name in names if values.get(name) not in (None, "")]


def _rates(rows: Rows) -> list[tuple[str, str]]:
    medians = [("steps", str(int(rows[-1]["step"])))]
    for name, shown in RATES.items():
        values = [row[name] for row in rows if name in row]
        if values:
            medians.append((shown, f"{np.median(values):.4g}"))
    return medians


def _final(name: str, points: Sequence[tuple[int, float]], rows: Rows) -> tuple[str, ...]:
    """The last value and the best one; of equal ones the one that `eval.keep_best` would keep."""
    best = Best(name, rows)
    step = "" if best.step is None else str(best.step)  # None: it was never a number
    return name, f"{points[-1][1]:.5f}", f"{best.value:.5f}", step
