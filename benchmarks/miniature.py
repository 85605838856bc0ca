r"""The paper in miniature: pre-train, distil, fine-tune and probe, over several seeds.

    python -m benchmarks.miniature --data digits fashion_mnist_debian --seeds 3

Every stage runs the code of train.py and finetune.py with configs/miniature.py. A finished stage is
not repeated, so the command can be stopped and started again. The table has the layout of
docs/reference.md#table-1. It is printed and written to WORKDIR/table.md, and its figures to
WORKDIR/table.json.
"""

import argparse
from collections.abc import Callable
import json
import pathlib
import statistics
import time

from absl import logging
from etils import epath
from flax import nnx
import jax

from configs import base, miniature
from fd_jax import model_folder
from fd_jax.models.spec import ModelSpec, split
from fd_jax.tasks import registry
from fd_jax.training import loop, metric_writer
from fd_jax.typing import Config

COLUMNS = {"fine-tune": "top1", "linear": "top1", "kNN": "knn_top1"}
Figures = dict[str, dict[str, list[float]]]  # row -> column -> one accuracy per seed


def measure(start: str, name: str, run: Callable[..., dict], *, tune: bool) -> dict[str, float]:
    """Fine-tuning, linear probe and nearest neighbours of one model folder, in percent.

    Args:
      start: the folder; "" fine-tunes a student with random weights.
      name: name of the row, used for the workdirs.
      run: runs a stage by its name, with config fields.
      tune: whether to fine-tune as well.
    """
    probe = run("probe", f"{name}/probe", init_from=start)
    figures = {"linear": probe["top1"], "kNN": probe["knn_top1"]}
    if tune:
        figures["fine-tune"] = run("finetune", f"{name}/finetune", init_from=start)["top1"]
    return {column: 100 * value for column, value in figures.items()}


def train(config: Config, workdir: pathlib.Path, *, figure: str = "eval_loss") -> dict[str, float]:
    """Runs a config to its end, unless an earlier run did; returns its last evaluation.

    `figure` is one that every evaluation of such a run has.
    """
    finished = (workdir / "model").exists()
    if not finished and loop.fit(registry.make(config), config, workdir).preempted:
        raise SystemExit(loop.PREEMPTED)
    rows = [row for row in metric_writer.read(epath.Path(workdir)) if figure in row]
    last = rows[-1].items()
    return {name.removeprefix("eval_"): value for name, value in last if name.startswith("eval_")}


def run_stage(workdir: pathlib.Path, data: str, seed: int) -> Callable[..., dict[str, float]]:
    """Returns a function (stage, folder in workdir, **fields) -> metrics that prints its time."""

    def run(stage: str, where: str, **fields) -> dict[str, float]:
        config = miniature.get_config(f"stage={stage},data={data}")
        config.update_from_flattened_dict({"seed": seed, **fields})
        began = time.monotonic()
        result = train(config, workdir / where)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in sorted(result.items()))
        print(f"{data} seed {seed} {where}: {shown}  in {time.monotonic() - began:.0f} s")
        return result

    return run


def save_random(folder: pathlib.Path, arch: dict, seed: int) -> str:
    """Saves a model folder of a student with random weights."""
    if not folder.exists():
        spec = ModelSpec("vit", arch, source="random weights")
        module = spec.build(rngs=nnx.Rngs(seed), init="fd_student")
        model_folder.save(folder, spec, {"encoder": split(module)[1]})
    return str(folder)


def one_seed(data: str, seed: int, workdir: pathlib.Path) -> dict[str, dict[str, float]]:
    """All rows of one dataset and seed."""
    run = run_stage(workdir, data, seed)
    run("pretrain", "teacher/run")
    teacher = str(workdir / "teacher/run/model")
    run("distill", "student/run", **{"teacher.path": teacher})
    arch = base.student(miniature.SHAPE, image_size=miniature.SIZE)
    random = save_random(workdir / "random/model", arch, seed)
    return {
        "teacher (image classification)": measure(teacher, "teacher", run, tune=True),
        "same student, random weights": measure(random, "random", run, tune=True),
        "FD student": measure(str(workdir / "student/run/model"), "student", run, tune=True),
    }


def table(figures: dict[str, Figures]) -> str:
    """Markdown: mean and standard deviation over the seeds, and difference from the teacher."""
    lines = ["| data | method | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for data, rows in figures.items():
        base_row = next(iter(rows.values()))
        for row, columns in rows.items():
            cells = []
            for column in COLUMNS:
                values = columns.get(column, [])
                cells.append(_cell(values, base_row.get(column, []) if columns != base_row else []))
            lines.append(f"| {data} | {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float], reference: list[float]) -> str:
    if not values:
        return "-"
    cell = f"{statistics.mean(values):.2f}"
    if len(values) > 1:
        cell += f" ± {statistics.stdev(values):.2f}"
    if reference:
        cell += f" ({statistics.mean(values) - statistics.mean(reference):+.2f})"
    return cell


def collect(figures: dict[str, Figures], data: str, found: dict[str, dict[str, float]]) -> None:
    """Appends one seed's figures."""
    for row, columns in found.items():
        for column, value in columns.items():
            by_row = figures.setdefault(data, {}).setdefault(row, {})
            by_row.setdefault(column, []).append(value)


def finish(figures: dict[str, Figures], workdir: pathlib.Path, *, began: float) -> None:
    """Prints the table and writes it into the workdir."""
    text = table(figures)
    (workdir / "table.json").write_text(json.dumps(figures, indent=2) + "\n")
    (workdir / "table.md").write_text(text)
    print(f"\ntop-1 in percent, mean ± standard deviation over the seeds\n\n{text}")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes; written to {workdir}/table.md")


def set_up(workdir: pathlib.Path) -> None:
    """Reduces logging and caches compiled programs in the workdir."""
    logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compiled"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", choices=list(miniature.DATA), default=["digits"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/miniature"))
    args = parser.parse_args()
    set_up(args.workdir)
    figures: dict[str, Figures] = {}
    began = time.monotonic()
    for data in args.data:
        for seed in range(args.seeds):
            found = one_seed(data, seed, args.workdir.absolute() / data / str(seed))
            collect(figures, data, found)
    finish(figures, args.workdir, began=began)


if __name__ == "__main__":
    main()
