"""The cells of both scales against docs/reference.md and the configs that their commands name."""

import collections
import dataclasses
import pathlib
import re

import pytest

from configs import ablations, finetune_teacher
from fd_jax.convert import families
from fd_jax.diagnose import catalogue, subjects
from fd_jax.diagnose import cli as diagnose
from fd_jax.errors import ConfigError
from fd_jax.reproduce import __main__ as command_line
from fd_jax.reproduce import cells, launching, paper, small
from fd_jax.tasks import registry

ROOT = pathlib.Path(__file__).parent.parent.parent
REFERENCE = (ROOT / "docs" / "reference.md").read_text("utf-8")
GRIDS = {"full": paper.cells([0]), "cpu": small.cells([0])}
COMMANDS = {scale: cells.commands(grid) for scale, grid in GRIDS.items()}


def printed_table(anchor):
    """The rows of the first Markdown table after an anchor of docs/reference.md, as lists."""
    text = REFERENCE[REFERENCE.index(f'<a id="{anchor}"></a>') :]
    lines = re.search(r"(\|.*\n)+", text)[0].splitlines()
    return [[entry.strip() for entry in line.strip("|").split("|")] for line in lines[2:]]


def number(entry):
    return None if entry == "-" else float(entry)


@pytest.mark.parametrize("table", ablations.TABLES)
def test_ablation_rows_have_the_papers_figures(table):
    rows = [row for row in cells.ROWS if row.table == table]
    printed = printed_table(f"table-{table}")
    assert len(rows) == len(printed)
    for row, entries in zip(rows, printed, strict=True):
        figures = dict(zip(("clip", "dino", "deit"), map(number, entries[-3:]), strict=True))
        assert row.paper == {name: value for name, value in figures.items() if value is not None}


def test_ablation_rows_are_those_of_the_config():
    assert {(row.table, row.name): dict(row.fields) for row in cells.ROWS} == {
        (table, name): fields
        for table, rows in ablations.TABLES.items()
        for name, fields in rows.items()
    }
    for name, (source, drop_path) in ablations.TEACHERS.items():
        teacher = paper.TEACHERS[name]
        assert (teacher.source, teacher.drop_path) == (source, str(drop_path))


@pytest.mark.parametrize(
    "name,label",
    [
        ("dino", "DINO -> FD-DINO"),
        ("esvit", "EsViT -> FD-EsViT"),
        ("deit", "DeiT -> FD-DeiT"),
        ("clip", "CLIP -> FD-CLIP"),
        ("swinv2_g", "SwinV2 -> FD-SwinV2"),
    ],
)
def test_the_first_table_has_the_papers_figures(name, label):
    entries = next(row for row in printed_table("table-1") if row[0] == label)
    tuned, probed = (re.findall(r"(?<![+.\d])\d\d\.\d", entries[column]) for column in (2, 3))
    figures = paper.TEACHERS[name].figures
    assert figures[paper.AFTER] == float(tuned[1])
    if paper.TEACHERS[name].before:
        assert figures[paper.BEFORE] == float(tuned[0])
    measured = [figures[row] for row in (paper.LINEAR_BEFORE, paper.LINEAR_AFTER) if row in figures]
    assert measured == [float(entry) for entry in probed]


def test_teachers_fine_tuned_directly_have_the_figures_of_their_config():
    for teacher in paper.TEACHERS.values():
        if teacher.before:
            expected = finetune_teacher.TEACHERS[teacher.before][1]
            assert teacher.figures[paper.BEFORE] == expected


@pytest.mark.parametrize("scale", GRIDS)
def test_every_command_has_a_workdir_of_its_own(scale):
    found = collections.Counter(command.where for command in COMMANDS[scale])
    assert set(found.values()) == {1}
    assert len(COMMANDS[scale]) < 2 * len(GRIDS[scale])  # default rows share their runs


@pytest.mark.parametrize("scale", GRIDS)
def test_commands_come_after_those_they_need(scale):
    seen = set()
    for command in COMMANDS[scale]:
        assert set(command.needs) <= seen
        seen.add(command)


@pytest.mark.parametrize("scale", GRIDS)
def test_every_cell_is_compared_with_a_row_of_its_table(scale):
    keys = {(cell.table, cell.teacher, cell.row) for cell in GRIDS[scale]}
    assert len(keys) == len(GRIDS[scale])
    for cell in GRIDS[scale]:
        assert (cell.table, cell.teacher, cell.default) in keys


def test_default_rows_of_all_ablations_are_one_run():
    """Tables 2 to 5 differ from the same default, which is trained once for each teacher."""
    for teacher in ("clip", "dino", "deit"):
        grid = [cell for cell in GRIDS["full"] if cell.teacher == teacher and cell.table > "1"]
        assert len({cell.runs for cell in grid if cell.row == cell.default}) == 1
        assert len({cell.runs for cell in grid}) == len(grid) - 3


@pytest.fixture
def in_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def config_of(command):
    return launching.read_config(command, "W")


@pytest.mark.parametrize("scale", GRIDS)
def test_every_printed_command_is_accepted_by_its_config(scale, in_checkout):
    for command in COMMANDS[scale]:
        if isinstance(command, cells.Diagnosis):
            continue
        config = config_of(command)
        for name, value in command.fields:
            node = config
            for part in name.split("."):
                node = node[part]
            expected = f"W/{value.where}/model" if isinstance(value, cells.Command) else value
            assert node == expected


def test_distillations_of_the_ablations_differ_in_their_row_alone(in_checkout):
    """The configs themselves say what the commands of a row change."""
    default = {}
    for cell in GRIDS["full"]:
        if cell.table == "1":
            continue
        (student,) = cell.runs[0].needs
        config = config_of(student).to_dict()
        if cell.table == "2" and cell.row == "full":
            default[cell.teacher] = config
    assert default.keys() == {"clip", "dino", "deit"}
    for cell in GRIDS["full"]:
        if cell.table in ("2", "3", "4"):
            (student,) = cell.runs[0].needs
            row = next(r for r in cells.ROWS if (r.table, r.name) == (cell.table, cell.row))
            changed = launching.differences(
                launching._flat(default[cell.teacher]),
                launching._flat(config_of(student).to_dict()),
            )
            assert [line.split(":")[0].strip() for line in changed] == list(row.fields)


def task_of(command, made):
    """The task of a command, built without weights; `made` are the specs of other commands."""
    config = config_of(command)
    given = [made[needed] for needed in command.needs]
    if command.source:
        source = families.get(command.source)
        spec = source.parts[source.default_part].spec
        # DeiT's file has a head of ImageNet's classes, which only the file itself tells.
        head = {"classes": 1000} if "target" in config and config.target.kind == "logits" else {}
        given = [dataclasses.replace(spec, source=command.source, **head)]
    roles = {registry.TEACHER: given[0], registry.INIT_FROM: given[0]} if given else {}
    return registry.make(config, roles)


def build(commands):
    """Builds the task of every command from the specs of those it reads."""
    made = {}
    for command in commands:
        if not isinstance(command, cells.Diagnosis):
            task = task_of(command, made)
            made[command] = getattr(task, "student_spec", None) or task.spec
    return made


def test_small_commands_define_tasks_that_fit_each_other(in_checkout):
    # The networks of contrastive_100 are those of contrastive_1000.
    chosen = [cell for cell in GRIDS["cpu"] if cell.teacher != "contrastive_100"]
    made = build(cells.commands(chosen))
    positions = {
        command.where: spec.arch["position"]
        for command, spec in made.items()
        if command.where.startswith("contrastive/") and command.where.endswith("distill")
    }
    assert positions["contrastive/table4_ape/seed0/distill"] == "ape"
    assert positions["contrastive/default/seed0/distill"] == "shared_rpb"
    assert made[small._tuned_student("contrastive_1000", 0)].arch["position"] == "rpb"


@pytest.mark.slow
def test_full_commands_define_tasks_that_fit_each_other(in_checkout):
    names = [name for name in paper.TEACHERS if name not in command_line.BY_NAME]
    chosen = [cell for cell in GRIDS["full"] if cell.teacher in names]
    assert len(build(cells.commands(chosen))) == len(cells.commands(chosen))


def test_diagnoses_are_commands_that_the_diagnostics_accept():
    diagnosed = [c for c in COMMANDS["cpu"] if isinstance(c, cells.Diagnosis)]
    assert len(diagnosed) == 4
    for command in diagnosed:
        arguments = command.arguments("W", ["--config.data.data_dir=/elsewhere"])
        assert arguments[:2] == ["-m", "fd_jax.diagnose"]
        args = diagnose._parser().parse_args(arguments[2:])
        folder = f"W/{command.needs[0].where}/model"
        assert subjects.folders(args.model) == {"network": folder}
        assert catalogue.parse(args.figures) == ["distance"]
        assert args.data_dir == "/elsewhere"
        assert args.output == f"W/{command.where}/figures"


def test_teachers_that_are_not_public_run_only_if_named():
    def teachers(**given):
        return {cell.teacher for cell in command_line.select("full", **given)}

    hidden = {"swinv2_g", "clip_l_336"}
    assert not hidden & teachers(everything=False)
    assert hidden < teachers(everything=True)
    assert teachers(teacher="swinv2_g", everything=False) == {"swinv2_g"}


def test_labelled_pictures_differ_between_seeds_and_not_between_rows(in_checkout):
    splits = collections.defaultdict(set)
    for cell in small.cells([0, 1, 2]):
        if cell.measure == "top1" and cell.teacher == "contrastive_1000":
            for seed, run in zip(cell.seeds, cell.runs, strict=True):
                splits[seed].add(dict(run.fields)["data.split"])
    assert splits == {0: {"train[0:1000]"}, 1: {"train[1000:2000]"}, 2: {"train[2000:3000]"}}


@pytest.mark.parametrize(
    "given,message",
    [
        ({"table": "7"}, "--table='7' is unknown; expected one of '1', '2'"),
        ({"teacher": "vgg"}, "--teacher='vgg' is unknown; expected one of 'clip'"),
        ({"seeds": 0}, "--seeds=0: expected a whole number above 0"),
        ({"table": "3", "teacher": "mae"}, "no cell of --teacher=mae"),
    ],
)
def test_unknown_names_are_refused(given, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        command_line.select("full", everything=False, **given)
