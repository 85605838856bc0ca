r"""Distillation steps on one GPU: every choice of attention, compared with PyTorch.

    python -m benchmarks.gpu --output=benchmarks/gpu/h100.json
    python -m benchmarks.gpu --table                       # the docs' table from those files
    python -m benchmarks.gpu --output=/tmp/toy.json --toy  # everything on a CPU, at toy size

The steps distil CLIP ViT-B/16 into ViT-B/16 and CLIP ViT-L/14 into ViT-L/14 in bfloat16, with
random weights and pictures. They need no data set, no TFDS and no TensorFlow. Each measurement runs
in its own process and prints its row when it ends. The file is rewritten after each measurement, so
an interrupted run keeps what it has measured. Measurements that do not fit into --seconds are
listed as not run.

A card that is there for minutes is used best in several runs: --models, --choices, --flags and
--first select, and --append adds to the file. The parts run in this order (--parts selects some):
"accuracy" compares loss and gradients of each implementation with XLA's in float32; "fd_jax" and
"torch" measure the steps; "flags" repeats the fastest step of ViT-B under several XLA flags.
"""

import argparse
from collections.abc import Iterator
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from benchmarks.gpu_worker import ACCURACY_BATCH, Job

FOLDER = pathlib.Path(__file__).parent / "gpu"
PARTS = ("accuracy", "fd_jax", "torch", "flags")
BATCHES = {"b": (512, 128), "l": (128, 64)}  # the first batch runs before the second for all models
CHOICES = ("cudnn", "xla")
TORCH_CHOICES = ("compile", "eager")
DEVICE_SECONDS = 120.0  # time limit for jax to report its device
LEAST_SECONDS = 20.0  # with less time left, no measurement is started

# Packages that every run needs, and packages that only the PyTorch side needs.
NEEDED = ("jax", "flax", "optax", "orbax.checkpoint", "ml_collections", "etils", "absl", "numpy")
WANTED = ("torch",)

# Flags measured in the part "flags"; each is compared with the same step without the flag.
FLAGS = {
    "cublas": "--xla_gpu_enable_triton_gemm=false",  # matmuls by cuBLAS alone
    "no_graphs": "--xla_gpu_enable_command_buffer=",  # no CUDA graphs
    "latency": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "tilings": "--xla_gpu_exhaustive_tiling_search=true",  # every tiling of matmuls is tried
}

OPTIONS = {
    "parts": PARTS,
    "models": tuple(BATCHES),
    "choices": CHOICES + TORCH_CHOICES,
    "flags": tuple(FLAGS),
}

TARGETS = {"b": 0.40, "l": 0.45}  # MFU
TARGET_RATIO = 1.3  # images per second, relative to torch.compile


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a run measures.

    Attributes:
      parts: some of PARTS.
      models: some of the keys of BATCHES.
      choices: some of CHOICES and TORCH_CHOICES.
      flags: some of the keys of FLAGS.
      orders: which of each model's batches: (0,) or (0, 1).
    """

    parts: list[str]
    models: list[str]
    choices: list[str]
    flags: list[str]
    orders: tuple[int, ...]


class Report:
    """The output file of a run, which is complete after every row.

    Args:
      path: the JSON file.
      environment: versions and processor.
      append: keeps the rows that the file has.

    Raises:
      SystemExit: the file to append to is of another environment.
    """

    def __init__(self, path: pathlib.Path, environment: dict[str, Any], *, append: bool = False):
        self.path = path
        self.content: dict[str, Any] = {"environment": environment, "rows": []}
        if append and path.exists():
            before = json.loads(path.read_text())
            if before["environment"] != environment:
                raise SystemExit(
                    f"--append: {path} was measured in another environment "
                    f"({before['environment']}, here {environment}); name another --output"
                )
            self.content = before
        self._write()

    def add(self, row: dict[str, Any]) -> None:
        """Prints a row and rewrites the file with it."""
        print(line_of(row), flush=True)
        self.content["rows"].append(row)
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        staging = self.path.with_name(f"{self.path.name}.new")
        staging.write_text(json.dumps(self.content, indent=2) + "\n")
        staging.replace(self.path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    for option, known in OPTIONS.items():
        parser.add_argument(
            f"--{option}", default=",".join(known), help="comma-separated; default: all of them"
        )
    parser.add_argument("--first", action="store_true", help="the first batch of each model only")
    parser.add_argument("--append", action="store_true", help="keep the rows that --output has")
    parser.add_argument("--seconds", type=float, default=470.0, help="time limit of the whole run")
    parser.add_argument("--profile", default="", help="folder for one trace per model")
    parser.add_argument("--toy", action="store_true", help="run on a CPU at toy size")
    parser.add_argument("--table", action="store_true", help="print the docs' table")
    args = parser.parse_args()
    selected = {option: getattr(args, option).split(",") for option in OPTIONS}
    for option, known in OPTIONS.items():
        if unknown := sorted(set(selected[option]) - set(known)):
            parser.error(f"--{option}={','.join(unknown)} is unknown; expected some of {known}")
    if args.table:
        files = [args.output] if args.output else sorted(FOLDER.glob("*.json"))
        if missing := [str(file) for file in files if not file.is_file()]:
            parser.error(f"--output={missing[0]}: there is no such file to make a table of")
        print(table({file.name: json.loads(file.read_text()) for file in files}))
        return
    if args.output is None:
        parser.error("--output=FILE.json is missing")
    if args.output.is_dir():
        parser.error(f"--output={args.output} is a folder; name a file in it")
    run(args, Selection(**selected, orders=(0,) if args.first else (0, 1)))


def run(args: argparse.Namespace, selection: Selection) -> None:
    """Measures until everything is done or the time is up."""
    deadline = time.monotonic() + args.seconds
    missing = [name for name in (*NEEDED, *WANTED) if not _installed(name)]
    print(f"missing packages: {', '.join(missing) or 'none'}", flush=True)
    if needed := [name for name in missing if name in NEEDED]:
        raise SystemExit(f"nothing can run without {', '.join(needed)}: install it first")
    with tempfile.TemporaryDirectory() as cache:
        (found,) = measure(Job("device", "b", 0, toy=args.toy), DEVICE_SECONDS, cache)
        if not args.toy and found.get("platform") != "gpu":
            raise SystemExit(
                f"jax finds no GPU here ({found.get('device', found['status'])}): install jax for "
                "CUDA, or add --toy to try this script on the CPU"
            )
        where = environment(missing) | {"device": found.get("device")}
        report = Report(args.output, where, append=args.append)
        for job in jobs(selection, report, toy=args.toy, profile=args.profile):
            left = deadline - time.monotonic()
            if left < LEAST_SECONDS:
                report.add(
                    {**described(job), "status": f"not yet run: {max(left, 0.0):.0f} s were left"}
                )
                continue
            for row in measure(job, left, cache):
                report.add({**described(job), **row})


def jobs(selection: Selection, report: Report, *, toy: bool, profile: str) -> Iterator[Job]:
    """The measurements, the most informative first: large batches of each side, then small ones."""
    if "accuracy" in selection.parts:
        yield Job("accuracy", "b", 4 if toy else ACCURACY_BATCH, toy=toy)
    for order in selection.orders:
        for model in selection.models:
            batch = (8, 4)[order] if toy else BATCHES[model][order]
            common: dict[str, Any] = {"model": model, "batch": batch, "toy": toy}
            common["round_seconds"] = 0.02 if toy else 1.0
            for part, choices in (("fd_jax", CHOICES), ("torch", TORCH_CHOICES)):
                for choice in choices:
                    traced = profile if choice == CHOICES[1 if toy else 0] and not order else ""
                    if part in selection.parts and choice in selection.choices:
                        yield Job(part, choice=choice, profile=traced, **common)
    if "flags" in selection.parts and "b" in selection.models:
        best = fastest(report.content["rows"], "b")
        for name in selection.flags if best else ():
            yield Job("flags", "b", best["batch"], best["choice"], FLAGS[name], toy=toy)


def fastest(rows: list[dict[str, Any]], model: str) -> dict[str, Any] | None:
    """The fd_jax row with the highest throughput at this model's first batch."""
    measured = [
        row
        for row in rows
        if row["part"] == "fd_jax" and row["model"] == model and "images_per_second" in row
    ]
    first = max((row["batch"] for row in measured), default=0)
    of_first = [row for row in measured if row["batch"] == first]
    return max(of_first, key=lambda row: row["images_per_second"], default=None)


def measure(job: Job, seconds: float, cache: str) -> Iterator[dict[str, Any]]:
    """Runs a job in its own process; yields its rows, or a row that says why there are none."""
    command = [sys.executable, "-m", "benchmarks.gpu_worker", json.dumps(dataclasses.asdict(job))]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            env=_environment_of(job, cache),
            text=True,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        assert process.stdout is not None
        killer = threading.Timer(seconds, process.kill)
        killer.start()
        began, rows = time.monotonic(), 0
        for line in process.stdout:
            if line.startswith("ROW "):
                rows += 1
                yield {"status": "ok", **json.loads(line.removeprefix("ROW "))}
        code = process.wait()
        killer.cancel()
        if time.monotonic() - began >= seconds:
            yield {"status": f"cut off after {seconds:.0f} s"}
        elif code or not rows:
            errors.seek(0)
            yield {"status": f"failed: {_last_line(errors.read())}"}


def _environment_of(job: Job, cache: str) -> dict[str, str]:
    made = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "TF_CPP_MIN_LOG_LEVEL": "2"}
    flags = [os.environ.get("XLA_FLAGS", ""), job.xla_flags]
    if job.toy:
        made["JAX_PLATFORMS"] = "cpu"
    elif not job.xla_flags:
        # Matmuls that several programs share are tuned once. A run that measures a flag does not
        # use this cache, because it would get the choices made without the flag.
        flags.append(f"--xla_gpu_per_fusion_autotune_cache_dir={cache}")
    made["XLA_FLAGS"] = " ".join(filter(None, flags))
    return made


def _last_line(text: str) -> str:
    """The message of an error: the last line that is not part of a traceback or a log."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("  ")]
    return lines[-1][:500] if lines else "no message"


def described(job: Job) -> dict[str, Any]:
    """The fields of a row that identify its measurement."""
    row = {"part": job.part, "model": job.model, "batch": job.batch}
    row |= {"choice": job.choice} if job.choice else {}
    return row | ({"xla_flags": job.xla_flags} if job.xla_flags else {})


def environment(missing: list[str]) -> dict[str, Any]:
    """Where the benchmark ran: versions of the relevant packages, and the processor."""
    versions = {}
    for name in ("jax", "jaxlib", "flax", "optax", "torch", "numpy"):
        if _installed(name):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": versions,
        "missing": missing,
    }


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package of `name` is missing
        return False


def line_of(row: dict[str, Any]) -> str:
    """One row as a line for the terminal."""
    what = " ".join(
        str(row[key]) for key in ("part", "model", "batch", "choice", "xla_flags") if key in row
    )
    if "images_per_second" in row:
        return f"{what}: {_rate(row)}, compiled in {row['compile_seconds']:.0f} s"
    if "gradient_error" in row:
        return (
            f"{what}: loss off by {row['loss_error']:.1e}, gradients by "
            f"{row['gradient_error']:.1e}, that of the bias by {row['bias_gradient_error']:.1e}"
        )
    if "profile" in row:
        return f"{what}: longest kernel {row['profile'][0]['kernel'][:60]}"
    return f"{what}: {row['status']}"


def _rate(row: dict[str, Any]) -> str:
    text = f"{row['images_per_second']:.0f} images/s ({row['least']:.0f} to {row['most']:.0f})"
    return f"{text}, MFU {row['mfu']:.1%}" if row.get("mfu") else text


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Markdown tables of all runs by their files' names, or a sentence if there are none."""
    if not reports:
        return "Not yet run on a GPU: `python -m benchmarks.gpu --output=benchmarks/gpu/NAME.json`."
    return "\n\n".join(_table_of(name, report) for name, report in reports.items())


def _table_of(name: str, report: dict[str, Any]) -> str:
    steps = [row for row in report["rows"] if row["part"] in ("fd_jax", "torch", "flags")]
    rows = [row for row in steps if not _left_out(row)]
    device = next((row["device"] for row in rows if "device" in row), "no device")
    versions = ", ".join(f"{k} {v}" for k, v in report["environment"]["versions"].items())
    lines = [
        f"`{name}`: {device}, {report['environment']['date']}, "
        f"Python {report['environment']['python']}, {versions}:",
        "",
        "| model | batch | step | images/s | MFU | / torch.compile | peak GiB | compile s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "profile" not in row:
            lines.append(_table_row(row, rows))
    if left_out := [" ".join(_identity(row)) for row in steps if _left_out(row)]:
        lines += ["", f"Not yet run: {'; '.join(left_out)}."]
    accuracy = [row for row in report["rows"] if row["part"] == "accuracy"]
    if accuracy:
        lines += [
            "",
            f"Against XLA in float32 ({ACCURACY_BATCH} images, two blocks of ViT-B), relative:",
            "",
            "| attention | loss | gradients | gradient of the bias |",
            "|---|---|---|---|",
        ]
    for row in accuracy:
        errors = [row.get(f"{name}_error") for name in ("loss", "gradient", "bias_gradient")]
        cells = [_shortened(row["status"]), "", ""]
        if None not in errors:
            cells = [f"{error:.1e}" for error in errors]
        lines.append(f"| {row.get('choice', '')} | {' | '.join(cells)} |")
    return "\n".join(lines + ["", *verdicts(rows)])


def _left_out(row: dict[str, Any]) -> bool:
    return str(row.get("status", "")).startswith("not yet run")


def _identity(row: dict[str, Any]) -> tuple[str, str, str]:
    names = {"fd_jax": "fd_jax, ", "torch": "PyTorch, ", "flags": f"`{row.get('xla_flags')}`, "}
    return f"ViT-{row['model'].upper()}", str(row["batch"]), names[row["part"]] + row["choice"]


def _table_row(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    cells = list(_identity(row))
    if "images_per_second" not in row:
        return _cells(*cells, _shortened(row["status"]), "", "", "", "")
    ratio = ratio_to_compiled(row, rows)
    cells += [
        f"{row['images_per_second']:.0f} ({row['least']:.0f} to {row['most']:.0f})",
        f"{row['mfu']:.1%}" if row.get("mfu") else "",
        f"{ratio:.2f}" if ratio else "",
        f"{row['peak_gib']:.1f}" if row.get("peak_gib") else "",
        f"{row['compile_seconds']:.0f}",
    ]
    return _cells(*cells)


def _cells(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _shortened(status: str) -> str:
    """The reason for a missing figure, cut to fit a cell; the file has the full text."""
    text = status.replace("|", "/")
    return text if len(text) <= 80 else f"{text[:77]}..."


def ratio_to_compiled(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """Images per second relative to torch.compile at the same model and batch."""
    for other in rows:
        same = all(other[key] == row[key] for key in ("model", "batch"))
        if same and other["part"] == "torch" and other["choice"] == "compile":
            rate = other.get("images_per_second")
            return row["images_per_second"] / rate if rate else None
    return None


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """One line per model: whether its best row meets the targets, or what is missing."""
    lines = []
    for model, mfu in TARGETS.items():
        best = fastest(rows, model)
        if best is None or not best.get("mfu"):
            lines.append(f"ViT-{model.upper()}: not yet run on a chip whose peak is known.")
            continue
        ratio = ratio_to_compiled(best, rows)
        beside = "PyTorch not yet run" if ratio is None else f"{ratio:.2f} of torch.compile"
        lines.append(
            f"ViT-{model.upper()}: MFU {best['mfu']:.1%} (target {mfu:.0%}), {beside} "
            f"(target {TARGET_RATIO})."
        )
    return lines


if __name__ == "__main__":
    main()
