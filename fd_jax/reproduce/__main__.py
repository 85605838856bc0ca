r"""Prints and launches the commands of the paper's Tables 1 to 5, and tabulates their results.

    python -m fd_jax.reproduce --scale=full --print
    python -m fd_jax.reproduce --scale=full --table=3 --teacher=dino --workdir=runs/paper \
      -- --config.data.data_dir=data --config.mesh.fsdp=4
    python -m fd_jax.reproduce --scale=cpu --workdir=runs/reproduce
    python -m fd_jax.reproduce --render

Commands run one after the other. The same call continues after any interruption, and after each
command W/results.json and W/results.md have the figures of all cells that are finished.
"""

import argparse
from collections.abc import Sequence
import sys

from etils import epath

from fd_jax import console, storage
from fd_jax.errors import ConfigError, UserError, check_choice, check_positive
from fd_jax.reproduce import cells, launching, page, paper, results, small
from fd_jax.reproduce.cells import Cell

SCALES = {"cpu": small.cells, "full": paper.cells}
SETTINGS = {
    "cpu": {name: setting.about for name, setting in small.SETTINGS.items()},
    "full": {name: teacher.title for name, teacher in paper.TEACHERS.items()},
}
SEEDS = {"cpu": 3, "full": 1}
# Teachers that few people have run only if they are named.
BY_NAME = {name for name, teacher in paper.TEACHERS.items() if teacher.by_name}


def select(
    scale: str, *, table: str = "", teacher: str = "", seeds: int | None = None, everything: bool
) -> list[Cell]:
    """The selected cells of a scale.

    Args:
      scale: "cpu" or "full".
      table: numbers of tables, separated by commas; "" for all.
      teacher: names of teachers (or settings), separated by commas; "" for all.
      seeds: number of seeds; None for the default of the scale.
      everything: whether to include what runs only if it is named.

    Raises:
      ConfigError: a name is unknown, or nothing is left.
    """
    count = SEEDS[scale] if seeds is None else seeds
    check_positive("--seeds", count)
    found = SCALES[scale](range(count))
    tables, teachers = _names(table), _names(teacher)
    for name in tables:
        check_choice("--table", name, sorted({cell.table for cell in found}))
    for name in teachers:
        check_choice("--teacher", name, list(SETTINGS[scale]))
    chosen = [
        cell
        for cell in found
        if (not tables or cell.table in tables)
        and (cell.teacher in teachers if teachers else everything or cell.teacher not in BY_NAME)
    ]
    if not chosen:
        raise ConfigError(
            f"--table={table} has no cell of --teacher={teacher} at --scale={scale}; "
            "leave one of the two flags out"
        )
    return chosen


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def run(
    scale: str,
    chosen: Sequence[Cell],
    everything: Sequence[Cell],
    workdir: epath.Path,
    extra: Sequence[str],
) -> None:
    """Launches the commands of the chosen cells; after each, writes the results of everything.

    Raises:
      UserError: something is missing or does not fit, or a command failed.
    """
    commands = cells.commands(chosen)
    launching.check(commands, workdir, extra)
    environment = {}
    if scale == "cpu":  # small programs take longer to compile than to read
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(workdir / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    for _ in launching.launch(commands, workdir, extra, environment=environment):
        results.write(results.collect(scale, everything, workdir, SETTINGS[scale]), workdir)
    print(results.markdown(results.collect(scale, chosen, workdir, SETTINGS[scale])))
    print(f"These and all other figures are in {workdir / results.MARKDOWN}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; a mistake of the user gives one message and exit status 2."""
    args, extra = _parse(list(sys.argv[1:] if argv is None else argv))
    try:
        with storage.one_message(args.workdir):
            _act(args, extra)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _act(args: argparse.Namespace, extra: Sequence[str]) -> None:
    if args.render:
        page.write(epath.Path(page.RESULTS), epath.Path(page.PAGE))
        return
    if not args.scale:
        raise ConfigError(f"--scale is missing; expected one of {', '.join(SCALES)}")
    if not (args.workdir or args.print):
        raise ConfigError("--workdir is missing: the folder of all runs, such as runs/reproduce")
    everything = select(args.scale, seeds=args.seeds, everything=True)
    names = {"table": args.table, "teacher": args.teacher}
    chosen = select(args.scale, **names, seeds=args.seeds, everything=args.print)
    workdir = epath.Path(args.workdir or f"runs/{args.scale}")
    if args.print:
        print("\n".join(launching.lines(cells.commands(chosen), workdir, extra)))
    elif args.collect:
        workdir.mkdir(parents=True, exist_ok=True)
        found = results.collect(args.scale, everything, workdir, SETTINGS[args.scale])
        results.write(found, workdir)
    else:
        run(args.scale, chosen, everything, workdir, extra)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and what follows a lone "--"."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = console.parser(
        "python -m fd_jax.reproduce",
        __doc__,
        epilog="Flags after a lone -- are added to every command.",
        allow_abbrev=False,
    )
    parser.add_argument("--scale", choices=SCALES, help="size of the runs")
    parser.add_argument("--workdir", default="", help="folder of all runs")
    parser.add_argument("--table", default="", help="only these tables, such as 2,3")
    parser.add_argument("--teacher", default="", help="only these teachers or settings")
    parser.add_argument("--seeds", type=int, help="number of seeds; 3 with cpu, 1 with full")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--print", action="store_true", help="print the commands, launch none")
    mode.add_argument("--collect", action="store_true", help="write all results, launch nothing")
    mode.add_argument("--render", action="store_true", help=f"write {page.PAGE}")
    return parser.parse_args(argv[:split]), argv[split + 1 :]


if __name__ == "__main__":
    sys.exit(main())
