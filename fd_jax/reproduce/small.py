"""The paper's grid at a scale that two CPU cores finish in hours, in several settings.

A setting is a teacher, the data it is distilled and fine-tuned on, and a number of labels. All of
its cells start from the same teacher. Cells of the same seed are paired: the student's initial
weights and the order of pictures have the same seed, and fine-tuning sees the same labelled
pictures in the same order. Each seed has labelled pictures of its own.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from fd_jax.reproduce.cells import (
    DEFAULTS,
    FINETUNE,
    ROWS,
    TRAIN,
    Cell,
    Command,
    Diagnosis,
    Row,
)
from fd_jax.reproduce.paper import AFTER, BEFORE, LINEAR_AFTER, LINEAR_BEFORE, TEACHERS

CONFIG = "configs/ablations_cpu.py"
DIAGNOSE = ("-m", "fd_jax.diagnose")
RANDOM = "random weights"  # row of Table 1: the student without distillation
NO_DROP_PATH = "0"  # default row of Table 5
HEADS = "heads"  # table of the comparison that Hybrid Distill asks for (arXiv 2306.15876)
HEADS_DATA, HEADS_IMAGES = "fashion_mnist_debian:test", 512
TITLES = {"clip": "CLIP", "dino": "DINO", "deit": "DeiT"}  # teachers of the paper's ablations


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
      teacher: how its teacher comes about, and the name of that teacher's folder: a stage of the
        config ("contrastive", "supervised"), or a converter source.
      labels: number of labelled pictures for fine-tuning.
      tables: names of the tables that are measured.
      about: what the setting is, in whole sentences.
      head: whether the teacher has a classifier head, which logit targets need.
    """

    teacher: str
    labels: int
    tables: tuple[str, ...]
    about: str
    head: bool = False


SETTINGS = {
    "contrastive_1000": Setting(
        "contrastive",
        1000,
        ("1", "2", "3", "4", "5", HEADS),
        "A ViT with absolute positions is trained by SimCLR on the 60,000 training pictures of "
        "Fashion-MNIST without their labels, and distilled on the same pictures. Networks are "
        "fine-tuned with 1,000 labelled pictures. Accuracy is on the 10,000 held-out pictures.",
    ),
    "contrastive_100": Setting(
        "contrastive",
        100,
        ("1",),
        "The networks of `contrastive_1000`, fine-tuned with 100 labelled pictures.",
    ),
    "supervised_1000": Setting(
        "supervised",
        1000,
        ("1", "2"),
        "The same teacher network is trained to classify the 60,000 pictures with their labels, as "
        "DeiT is. It has therefore seen the labels with which networks are fine-tuned, 1,000 of "
        "them. It has a head, so that logits can be a target.",
        head=True,
    ),
    "dinov2_1000": Setting(
        "dinov2_vits14_onnx",
        1000,
        ("1",),
        "The quickstart's DINOv2 ViT-S/14 sees the pictures of Fashion-MNIST at 56 pixels, is "
        "distilled on 10,000 of them without labels, and networks are fine-tuned with 1,000 "
        "labelled pictures. Accuracy is on 2,000 held-out pictures.",
    ),
}


def cells(seeds: Sequence[int]) -> list[Cell]:
    """All cells, setting by setting."""
    return [
        cell
        for name, setting in SETTINGS.items()
        for table in setting.tables
        for cell in _table(table, name, tuple(seeds))
    ]


def _table(table: str, name: str, seeds: tuple[int, ...]) -> list[Cell]:
    if table == "1":
        return [_first_table_cell(row, name, seeds) for row in CHANGES]
    if table == HEADS:
        return [_heads_cell(row, name, seeds) for row in HEADS_ROWS]
    default = DEFAULTS.get(table, NO_DROP_PATH)
    rows = [row for row in ROWS if row.table == table]
    if table == "5":
        rows.insert(0, Row("5", NO_DROP_PATH, "no drop path", {}, {}))
    return [
        _ablation_cell(row, name, seeds, default)
        for row in rows
        if row.name != "logits" or SETTINGS[name].head
    ]


CHANGES = {
    BEFORE: "teacher, fine-tuned",
    RANDOM: "student with random weights, fine-tuned",
    AFTER: "student, fine-tuned",
    LINEAR_BEFORE: "teacher, linear probe",
    LINEAR_AFTER: "student, linear probe",
}


def _first_table_cell(row: str, name: str, seeds: tuple[int, ...]) -> Cell:
    runs = {
        BEFORE: _tuned_teacher,
        RANDOM: _tuned_random,
        AFTER: _tuned_student,
        LINEAR_BEFORE: _probed_teacher,
        LINEAR_AFTER: _probed_student,
    }
    figures = [(TITLES[teacher], TEACHERS[teacher].figures.get(row)) for teacher in TITLES]
    return Cell(
        table="1",
        row=row,
        teacher=name,
        change=CHANGES[row],
        default=LINEAR_BEFORE if row in (LINEAR_BEFORE, LINEAR_AFTER) else BEFORE,
        paper=tuple((title, figure) for title, figure in figures if figure is not None),
        seeds=seeds,
        runs=tuple(runs[row](name, seed) for seed in seeds),
    )


def _ablation_cell(row: Row, name: str, seeds: tuple[int, ...], default: str) -> Cell:
    return Cell(
        table=row.table,
        row=row.name,
        teacher=name,
        change=row.change,
        default=default,
        paper=tuple((TITLES[teacher], figure) for teacher, figure in row.paper.items()),
        seeds=seeds,
        runs=tuple(_tuned_student(name, seed, row) for seed in seeds),
    )


TRAINED = {"distilled": "distilled student", "contrasted": "the same network by SimCLR"}
POSITIONS = {"shared_rpb": "a shared position bias", "ape": "absolute positions"}
# row: (how the student was trained, its positions, row that it is compared with)
HEADS_ROWS = {
    "distilled, shared_rpb": ("distilled", "shared_rpb", "contrasted, shared_rpb"),
    "distilled, ape": ("distilled", "ape", "contrasted, ape"),
    "contrasted, shared_rpb": ("contrasted", "shared_rpb", "contrasted, ape"),
    "contrasted, ape": ("contrasted", "ape", "contrasted, ape"),
}


def _heads_cell(row: str, name: str, seeds: tuple[int, ...]) -> Cell:
    """Spread of the attention distances of the student, distilled or trained as its teacher was."""
    how, position, default = HEADS_ROWS[row]
    return Cell(
        table=HEADS,
        row=row,
        teacher=name,
        change=f"{TRAINED[how]} with {POSITIONS[position]}",
        default=default,
        paper=(),
        seeds=seeds,
        runs=tuple(_diagnosed(how, position, name, seed) for seed in seeds),
        measure="spread",
    )


def _diagnosed(how: str, position: str, name: str, seed: int) -> Diagnosis:
    if how == "distilled":
        rows = {row.fields.get("student.arch.position", "shared_rpb"): row for row in ROWS}
        trained = _student(name, seed, rows[position] if position != "shared_rpb" else None)
    else:
        where = f"{SETTINGS[name].teacher}/contrasted_{position}/seed{seed}/pretrain"
        fields = (("contrast.arch.position", position), ("steps", 400), ("seed", seed))
        config = f"{CONFIG}:stage=contrastive,network=student"
        trained = Command(where, TRAIN, config, fields)
    return Diagnosis(
        trained.where.rpartition("/")[0] + "/diagnose",
        DIAGNOSE,
        config="",
        fields=(("model", trained),),
        data=HEADS_DATA,
        images=HEADS_IMAGES,
    )


def _teacher(name: str) -> tuple[Any, str]:
    """(command that makes the teacher or its folder, its converter source or "")."""
    teacher = SETTINGS[name].teacher
    if teacher == "contrastive":
        return Command(f"{teacher}/teacher", TRAIN, f"{CONFIG}:stage={teacher}"), ""
    if teacher == "supervised":
        return Command(f"{teacher}/teacher", FINETUNE, f"{CONFIG}:stage={teacher}"), ""
    return f"teachers/{teacher}", teacher


def _student(name: str, seed: int, row: Row | None) -> Command:
    """Distils one row; None or a row without changes is the default."""
    made, source = _teacher(name)
    changes = tuple(row.fields.items()) if row else ()
    folder = f"table{row.table}_{row.name}" if row and changes else "default"
    where = f"{SETTINGS[name].teacher}/{folder}/seed{seed}/distill"
    fields = (("teacher.path", made), ("seed", seed), *changes)
    return Command(where, TRAIN, _config("distill", name), fields, source)


def _config(stage: str, name: str) -> str:
    pictures = ",pictures=dinov2" if SETTINGS[name].teacher.startswith("dinov2") else ""
    return f"{CONFIG}:stage={stage}{pictures}"


def _labelled(
    stage: str, name: str, start: Any, folder: str, seed: int, source: str = ""
) -> Command:
    """Fine-tunes or probes a network with the labelled pictures of a seed."""
    setting = SETTINGS[name]
    where = f"{setting.teacher}/{folder}/seed{seed}/{stage}_{setting.labels}"
    split = f"train[{seed * setting.labels}:{(seed + 1) * setting.labels}]"
    fields = (("init_from", start), ("data.split", split), ("seed", seed))
    if not start:  # the config has the student's network with random weights
        fields = fields[1:]
    return Command(where, FINETUNE, _config(stage, name), fields, source)


def _tuned_student(name: str, seed: int, row: Row | None = None) -> Command:
    student = _student(name, seed, row)
    return _labelled("finetune", name, student, student.where.split("/")[1], seed)


def _probed_student(name: str, seed: int) -> Command:
    return _labelled("probe", name, _student(name, seed, None), "default", seed)


def _tuned_random(name: str, seed: int) -> Command:
    return _labelled("finetune", name, "", "random", seed)


def _tuned_teacher(name: str, seed: int) -> Command:
    made, source = _teacher(name)
    return _labelled("finetune", name, made, "before", seed, source)


def _probed_teacher(name: str, seed: int) -> Command:
    made, source = _teacher(name)
    return _labelled("probe", name, made, "before", seed, source)
