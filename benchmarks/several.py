r"""One student of two teachers beside a student of each alone, on photographs.

    make several
    python -m benchmarks.several --workdir=runs/several --output=benchmarks/several.json
    python -m benchmarks.several --table          # the table of docs/several_teachers.md

The stages are those of configs/several.py, and the steps the same for every student. A finished
stage is not repeated, so the command can be stopped and started again. Held-out R2 is that of a
report: 1 for a perfect prediction of the teacher's normalised tokens, 0 for their mean.
"""

import argparse
import json
import pathlib
import time

import jax

from benchmarks import miniature
from configs import several
from fd_jax.report import distillation, write_report

RESULTS = pathlib.Path(__file__).with_name("several.json")
STUDENTS = ("dinov2", "contrast", "both")


def run(stage: str, where: str, workdir: pathlib.Path, seed: int) -> float:
    """Runs a stage to its end, unless an earlier command did; returns its seconds."""
    config = several.get_config(stage)
    config.seed = seed
    if "teachers" in config and "contrast" in config.teachers:
        config.teachers.contrast.path = str(workdir / "contrast" / "model")
    began = time.monotonic()
    miniature.train(config, workdir / where)
    return time.monotonic() - began


def agreement(student: str, workdir: pathlib.Path) -> dict[str, dict[str, float]]:
    """Held-out R2 of a finished student, by teacher and kind of token, from its report."""
    folder = write_report(workdir)
    content = json.loads((folder / distillation.AGREEMENT).read_text())
    named = content.get(distillation.TEACHERS, {student: content})
    return {
        teacher: {kind: score["r2"] for kind, score in scores["after"].items()}
        for teacher, scores in named.items()
    }


def table(results: dict) -> str:
    """The results as Markdown: a row for each student, a column for each teacher."""
    lines = [
        "| student of | DINOv2: class, patches | contrastive: class, patches | minutes |",
        "|---|---|---|---|",
    ]
    for student in STUDENTS:
        row = results["students"][student]
        cells = [_cell(row["r2"].get(teacher)) for teacher in ("dinov2", "contrast")]
        lines.append(f"| {student} | {' | '.join(cells)} | {row['seconds'] / 60:.1f} |")
    return "\n".join(lines)


def _cell(scores: dict[str, float] | None) -> str:
    return "" if scores is None else f"{scores['cls']:.3f}, {scores['patch']:.3f}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/several"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, help="file of the results; default: none")
    parser.add_argument("--table", action="store_true", help="print the committed results only")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(RESULTS.read_text())) if RESULTS.exists() else "not yet run")
        return
    miniature.set_up(args.workdir)
    workdir, began = args.workdir.absolute(), time.monotonic()
    seconds = {"contrast": run("stage=contrast", "contrast", workdir, args.seed)}
    print(f"contrastive teacher: {seconds['contrast']:.0f} s", flush=True)
    students = {}
    for student in STUDENTS:
        taken = run(f"teachers={student}", f"of_{student}", workdir, args.seed)
        found = agreement(student, workdir / f"of_{student}")
        students[student] = {"seconds": round(taken, 1), "r2": found}
        print(f"student of {student}: {taken:.0f} s, held-out R2 {found}", flush=True)
    results = {
        "command": f"python -m benchmarks.several --seed={args.seed}",
        "jax": jax.__version__,
        "steps": several.get_config().steps,
        "teacher_seconds": round(seconds["contrast"], 1),
        "students": students,
    }
    print(f"\n{table(results)}\n\n{(time.monotonic() - began) / 60:.1f} minutes")
    print(f"report of both: {workdir / 'of_both' / 'report' / 'report.html'}")
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
