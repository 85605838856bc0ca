r"""Which published backbones can be imported, and whether their features are the library's.

    python -m benchmarks.coverage --facts
    python -m benchmarks.coverage --only='*dinov2*'
    python -m benchmarks.coverage --page
    python -m benchmarks.coverage --whole --only='eva02_large*'
    python -m benchmarks.coverage --returned

The first writes `fd_jax/convert/published/*.json`, the second tries some backbones (all without
`--only`, about an hour on two cores) and saves benchmarks/coverage/results.json after each, the
third renders docs/teachers.md from that file. The fourth tries networks with all their blocks, the
fifth gives networks back to timm and transformers; both save benchmarks/coverage/more.json. All but
the third need an environment with timm, open_clip_torch, torchvision and transformers beside
fd_jax; the tests do not. The exit status is 1 if a backbone is taken with other features than its
library's.
"""

import argparse
import fnmatch
import json
from pathlib import Path
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.coverage import page

RESULTS = Path("benchmarks/coverage/results.json")
MORE = Path("benchmarks/coverage/more.json")  # of `--whole` and `--returned`
PAGE = Path("docs/teachers.md")
LIBRARIES = ("torch", "timm", "open_clip", "transformers", "jax")


def main() -> int:
    """Command line."""
    arguments = _arguments()
    if arguments.facts:
        from benchmarks.coverage import tables

        tables.write()
        return 0
    if arguments.outputs:
        from benchmarks.coverage import outputs

        outputs.write()
        return 0
    if arguments.opened:
        from benchmarks.coverage import opened

        opened.write()
        return 0
    if arguments.whole or arguments.returned:
        return _try_more(arguments)
    results = _read(arguments.results)
    if not arguments.page:
        _try(results, arguments)
    PAGE.write_text(page.render(results, _read(MORE)))
    rows = results["runs"][arguments.run]["rows"].values()
    return int(any(found["is"] == "other" for row in rows for found in _forms(row)))


def _try(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Tries the backbones that are asked for, and saves after each."""
    from benchmarks.coverage import making

    results["versions"] = {name: _version(name) for name in LIBRARIES}
    run = results.setdefault("runs", {}).setdefault(arguments.run, {"rows": {}})
    run["date"], code = time.strftime("%Y-%m-%d"), _code()
    chosen = _mixed([b for b in making.every() if fnmatch.fnmatch(b.name, arguments.only)])
    order = [backbone.name for backbone in making.every()]
    for number, backbone in enumerate(chosen, 1):
        if arguments.resume and backbone.name in run["rows"]:
            continue
        began = time.monotonic()
        try:
            row = {**_row(backbone), "code": code}
        except Exception as error:  # a structure that this library version cannot make
            print(f"{backbone.name}: not made: {type(error).__name__}: {error}", flush=True)
            continue
        run["rows"][backbone.name] = row
        run["rows"] = {name: run["rows"][name] for name in order if name in run["rows"]}
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")
        said = ", ".join(f"{form} {row[form]['is']}" for form in row if isinstance(row[form], dict))
        taken = time.monotonic() - began
        print(f"{number}/{len(chosen)} {backbone.name}: {said} ({taken:.0f} s)", flush=True)


def _try_more(arguments: argparse.Namespace) -> int:
    """Tries whole networks, or the way back to a library, and saves after each."""
    from benchmarks.coverage import making, returning

    kind = "whole" if arguments.whole else "returned"
    more = _read(MORE)
    more["versions"] = {name: _version(name) for name in LIBRARIES}
    rows = more.setdefault(kind, {})
    chosen = [b for b in making.every() if fnmatch.fnmatch(b.name, arguments.only)]
    if kind == "returned":
        chosen = [b for b in chosen if b.library in returning.FORMATS]
    for backbone in chosen:
        if arguments.resume and backbone.name in rows:
            continue
        try:
            rows[backbone.name] = _more(backbone, whole=arguments.whole)
        except Exception as error:  # one row, not the end
            rows[backbone.name] = {"is": "failed", "says": f"{type(error).__name__}: {error}"[:400]}
        print(backbone.name, rows[backbone.name], flush=True)
        MORE.write_text(json.dumps(more, indent=1) + "\n")
    PAGE.write_text(page.render(_read(arguments.results), more))
    return int(any(row["is"] in ("other", "failed") for row in rows.values()))


def _more(backbone: Any, *, whole: bool) -> dict[str, Any]:
    from benchmarks.coverage import comparing, making, returning

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "made").mkdir()
        with making.whole(whole), making.uninitialised():
            made = backbone.make(folder / "made")
        with making.whole(whole):
            if whole:
                return comparing.whole(made)
            return returning.returned(made, backbone.library, folder)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _mixed(backbones: list[Any]) -> list[Any]:
    """In an order in which a run that is cut short has seen every kind."""
    kinds: dict[tuple[str, str], int] = {}
    places = []
    for backbone in backbones:
        kind = backbone.library, backbone.lacked
        kinds[kind] = kinds.get(kind, -1) + 1
        places.append(kinds[kind])
    return [backbones[i] for i in sorted(range(len(backbones)), key=places.__getitem__)]


def _row(backbone: Any) -> dict[str, Any]:
    from benchmarks.coverage import comparing, making

    row = {"library": backbone.library, "lacked": backbone.lacked}
    with tempfile.TemporaryDirectory() as folder:
        with making.uninitialised():
            made = backbone.make(Path(folder))
        return row | comparing.outcome(made)


def _forms(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [found for found in row.values() if isinstance(found, dict)]


def _version(package: str) -> str:
    return __import__(package).__version__


def _code() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--facts", action="store_true", help="write the tables of facts")
    parser.add_argument("--outputs", action="store_true", help="write tests/convert/outputs")
    parser.add_argument("--opened", action="store_true", help="write tests/convert/opened")
    parser.add_argument("--whole", action="store_true", help="try networks with all their blocks")
    parser.add_argument("--returned", action="store_true", help="export to their own library")
    parser.add_argument("--page", action="store_true", help="render the page, try nothing")
    parser.add_argument("--only", default="*", help="a pattern of names")
    parser.add_argument("--resume", action="store_true", help="leave out what has been tried")
    parser.add_argument("--run", default="now", help="which run of the results this is")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
