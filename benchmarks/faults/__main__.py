r"""Faults of runs and of stored files, and what they do: the figures of docs/reliability.md.

    python -m benchmarks.faults --output=benchmarks/faults/faults.json
    python -m benchmarks.faults --short --output=/tmp/short.json
    python -m benchmarks.faults --table=benchmarks/faults/faults.json

Parts (--parts selects some, by default all): "kills" and "terms" stop small runs at random moments;
"storage" lets storage fail under them; "bits" flips bits in checkpoints and model folders; "json"
mutates model.json; "soak" is one long run. The file is rewritten after each part, and keeps the
parts of earlier commands with the same --output. Everything is on the CPU. Some of the storage
faults need the rights of root, to mount; without them they are listed as not run. The exit status
is 1 if any figure is not what it should be.
"""

import argparse
from collections.abc import Callable
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import logging

from benchmarks.faults import damage, runs, stops, storage
from benchmarks.faults.runs import ROOT, Lab
import fd_jax
from fd_jax import storage as files

SEEDS = {"kills": 1, "terms": 2, "bits": 3, "json": 4}
# How many of each part: kills, signals, faults, bits, files, steps.
LONG = {"kills": 100, "terms": 30, "storage": len(storage.FAULTS), "bits": 2000, "json": 10_000}
LONG |= {"soak": 20_000}
SHORT = {"kills": 2, "terms": 2, "storage": 3, "bits": 60, "json": 300, "soak": 200}
GROWTH = 1.1  # memory at the end of a soak, of that after a tenth


def main() -> int:
    """Command line."""
    arguments = _arguments()
    logging.set_verbosity(logging.FATAL)  # Orbax logs what it then raises
    files.quiet_threads()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return 0
    counts = SHORT if arguments.short else LONG
    report = _opened(arguments.output, short=arguments.short)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for part in arguments.parts:
            began = time.monotonic()
            found = measure(part, counts[part], pathlib.Path(folder), short=arguments.short)
            report["parts"][part] = {
                "date": time.strftime("%Y-%m-%d"),
                "code": _code(),
                "count": counts[part],
                "seed": SEEDS.get(part),
                "seconds": round(time.monotonic() - began),
                **found,
            }
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    return int(not all(is_fine(report, part) for part in report["parts"]))


def measure(part: str, count: int, root: pathlib.Path, *, short: bool) -> dict[str, Any]:
    """The figures of one part, in a new folder of `root`; parts share the inputs of their runs."""
    folder, inputs = root / part, root / "inputs"
    folder.mkdir()
    try:
        return _measure(part, count, folder, inputs, short=short)
    finally:
        runs.remove(folder)


def _measure(
    part: str, count: int, folder: pathlib.Path, inputs: pathlib.Path, *, short: bool
) -> dict[str, Any]:
    def log(text: str) -> None:
        print(f"{part}: {text}", flush=True)

    if part == "bits":
        return {"by_target": damage.flip_bits(folder, count, SEEDS[part], log)}
    if part == "json":
        return damage.mutate_descriptions(count, SEEDS[part], log)
    if part == "storage":
        lab = Lab(folder, inputs, f"--config.steps={storage.STEPS // (4 if short else 1)}")
        return {"rows": list(storage.run(lab, count, log))}
    lab = Lab(folder, inputs)
    if part == "soak":
        return stops.soak(lab, count, log)
    number = signal.SIGKILL if part == "kills" else signal.SIGTERM
    return stops.run(lab, count, number, SEEDS[part], log)


def table(report: dict[str, Any]) -> str:
    """Markdown of a report."""
    lines = [
        f"`python -m benchmarks.faults{' --short' if report['short'] else ''}`, "
        f"{report['processors']} processors, Python {report['python']}:",
        "",
        "| part | tried | result | expected | date, code |",
        "|---|---|---|---|---|",
    ]
    for part, (title, cells) in _ROWS.items():
        found = report["parts"].get(part)
        end = f"{cells(found)} | {found['date']}, {found['code']}" if found else "not yet run | | |"
        lines.append(f"| {title} | {end} |")
    faults = report["parts"].get("storage", {}).get("rows", [])
    if faults:
        lines += ["", "| storage fault | seconds to the end, since | outcome |", "|---|---|---|"]
        lines += [f"| {r['fault']} | {_seconds(r)} | {r['outcome']} |" for r in faults]
    return "\n".join(lines)


def _seconds(row: dict[str, Any]) -> str:
    return f"{row['seconds']}, {row['since']}" if "seconds" in row else ""


def _stops(found: dict[str, Any]) -> str:
    return (
        f"{found['signals']} in {found['runs']} runs | "
        f"{found['models']} models and {found['rows']} rows differ | 0 and 0"
    )


def _storage(found: dict[str, Any]) -> str:
    outcomes = [row["outcome"] for row in found["rows"]]
    missing = sum(outcome.startswith("not run") for outcome in outcomes)
    good = outcomes.count("one line, nothing lost")
    return (
        f"{len(outcomes) - missing} ({missing} not run) | {good} with one line, "
        f"an end within {storage.LIMIT:.0f} s and the same model after a rerun | all"
    )


def _bits(found: dict[str, Any]) -> str:
    sums = {name: sum(t[name] for t in found["by_target"].values()) for name in damage.COUNTS}
    return (
        f"{sum(sums.values())} | "
        f"{sums['refused']} refused, {sums['harmless']} without effect, {sums['silent']} silent, "
        f"{sums['tracebacks']} tracebacks | 0 silent, 0 tracebacks"
    )


def _json(found: dict[str, Any]) -> str:
    return (
        f"{found['count']} | {found['refused']} refused, {found['valid']} "
        f"other networks, {found['equal']} equal, {found['tracebacks']} tracebacks | 0 tracebacks"
    )


def _soak(found: dict[str, Any]) -> str:
    changes = ", ".join(f"{n} {a} -> {b}" for n, a, b in stops.changes(found["samples"]))
    return f"{found['steps']} steps | {changes} | flat"


# What each part is called in the table, and its cells: what was tried, found and expected.
_ROWS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "kills": ("SIGKILL at random moments", _stops),
    "terms": ("SIGTERM at random moments", _stops),
    "storage": ("storage faults", _storage),
    "bits": ("flipped bits in checkpoints and model folders", _bits),
    "json": ("mutated model.json", _json),
    "soak": ("one long run, from a tenth of its steps to the end", _soak),
}


def is_fine(report: dict[str, Any], part: str) -> bool:
    """Whether the figures of a part are what they should be."""
    found = report["parts"][part]
    if part == "storage":
        return not any(row["outcome"] == "wrong" for row in found["rows"])
    if part == "bits":
        return not any(t["silent"] or t["tracebacks"] for t in found["by_target"].values())
    if part == "json":
        return not found["tracebacks"]
    if part == "soak":
        whole = found["status"] == 0 and len(found["samples"]) == stops.SAMPLES
        return whole and _is_flat(found["samples"], memory=not report["short"])
    return not (found["models"] or found["rows"])


def _is_flat(samples: list[dict[str, int]], *, memory: bool) -> bool:
    """Whether nothing grows; memory is still being filled after a tenth of a short run."""
    first, last = samples[0], samples[-1]
    if memory and last["memory_mb"] > GROWTH * first["memory_mb"]:
        return False
    return last["shm"] <= first["shm"] and last["files"] <= first["files"] + 8


def _code() -> str:
    """The commit of this code, marked if files differ from it; the version outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    return found.stdout.strip() or fd_jax.__version__


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), default=[*LONG], help="comma-separated"
    )
    parser.add_argument("--short", action="store_true", help="a few of everything, in minutes")
    parser.add_argument("--folder", type=pathlib.Path, help="where the runs are made")
    parser.add_argument("--table", type=pathlib.Path, help="print the tables of this JSON file")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - LONG.keys():
        parser.error(f"--parts: {', '.join(unknown)} unknown; expected some of {', '.join(LONG)}")
    if not (arguments.table or arguments.output):
        parser.error("name a file to write: --output=faults.json")
    return arguments


def _opened(path: pathlib.Path, *, short: bool) -> dict[str, Any]:
    """The report to add to; parts of another form or machine are not kept."""
    report = {
        "short": short,
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "parts": {},
    }
    if path.exists():
        before = json.loads(path.read_text())
        same = all(before.get(name) == report[name] for name in ("short", "processors", "python"))
        report["parts"] = before["parts"] if same else {}
    return report


def _in_namespace() -> None:
    """Starts this command again where its mounts are its own, if this process may do that."""
    if os.environ.get(storage.NAMESPACE) or os.geteuid() != 0:
        return
    if subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL).returncode == 0:
        os.environ[storage.NAMESPACE] = "1"
        command = [sys.executable, "-m", "benchmarks.faults", *sys.argv[1:]]
        os.execvp("unshare", ["unshare", "--mount", *command])


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    _in_namespace()
    sys.exit(main())
