"""The cells of the paper's Tables 1 to 5, at full scale (docs/reference.md#paper-tables).

Every distillation config is one of configs/. Tables 2 to 5 fine-tune with the recipe of the
teacher's published run, as the paper names no other; for CLIP there is one for 100 epochs.
"""

from collections.abc import Sequence
import dataclasses

from fd_jax.reproduce.cells import DEFAULTS, FINETUNE, ROWS, TRAIN, Cell, Command, Row

# Rows of Table 1, by what they measure.
BEFORE, AFTER = "before", "after"
LINEAR_BEFORE, LINEAR_AFTER = "linear before", "linear after"


@dataclasses.dataclass(frozen=True)
class Teacher:
    """One teacher of the paper, with the configs of its runs and the figures of Table 1.

    Attributes:
      title: name for people.
      source: converter source; the weights are expected in teachers/<source>.
      distill: config of its distillation.
      finetune: config with which the student is fine-tuned.
      before: value of the argument `teacher` of configs/finetune_teacher.py; "" for none.
      probe: config of the linear probe; "" where the paper has no figure.
      figures: the paper's figures of Table 1 by row.
      ablation: config with which the students of Tables 2 to 5 are fine-tuned; "" for none.
      drop_path: the student's best drop path in Table 5, which Tables 2 to 4 use.
      by_name: why the teacher runs only if it is selected by name; "" if it always does.
    """

    title: str
    source: str
    distill: str
    finetune: str
    before: str
    probe: str
    figures: dict[str, float]
    ablation: str = ""
    drop_path: str = ""
    by_name: str = ""


TEACHERS = {
    "clip": Teacher(
        "CLIP ViT-B/16",
        "openai_clip_vit_b16",
        "distill_clip_vit_b16",
        "finetune_clip_vit_b16",
        "clip_b",
        "linear_vit_b16",
        {BEFORE: 82.9, AFTER: 84.9, LINEAR_BEFORE: 79.5, LINEAR_AFTER: 80.3},
        ablation="finetune_clip_vit_b16_100ep",
        drop_path="0.1",
    ),
    "clip_l": Teacher(
        "CLIP ViT-L/14",
        "openai_clip_vit_l14",
        "distill_clip_vit_l14",
        "finetune_clip_vit_l14",
        "clip_l",
        "linear_vit_l14",
        {BEFORE: 86.1, AFTER: 87.7, LINEAR_BEFORE: 83.5, LINEAR_AFTER: 84.8},
    ),
    "dino": Teacher(
        "DINO ViT-B/16",
        "dino_vitb16",
        "distill_dino_vit_b16",
        "finetune_dino_vit_b16",
        "dino_b",
        "linear_vit_b16",
        {BEFORE: 82.8, AFTER: 83.8, LINEAR_BEFORE: 78.2, LINEAR_AFTER: 76.1},
        ablation="finetune_dino_vit_b16",
        drop_path="0.2",
    ),
    "deit": Teacher(
        "DeiT ViT-B/16",
        "deit_base_patch16_224",
        "distill_deit_vit_b16",
        "finetune_deit_vit_b16",
        "deit_b",
        "",
        {BEFORE: 81.8, AFTER: 83.0},
        ablation="finetune_deit_vit_b16",
        drop_path="0.2",
    ),
    "mae": Teacher(
        "MAE ViT-B/16",
        "mae_vit_base_pretrain",
        "distill_mae_vit_b16",
        "finetune_mae_vit_b16",
        "mae_b",
        "",
        {BEFORE: 83.6, AFTER: 83.8},
    ),
    "esvit": Teacher(
        "EsViT Swin-B",
        "esvit_swin_base_w14",
        "distill_esvit_swin_b",
        "finetune_esvit_swin_b",
        "esvit_swin_b",
        "linear_swin_b",
        {BEFORE: 83.9, AFTER: 85.1, LINEAR_BEFORE: 81.3, LINEAR_AFTER: 80.4},
    ),
    "swinv2_g": Teacher(
        "SwinV2-G",
        "swinv2_giant",
        "distill_swinv2_g",
        "finetune_swinv2_g",
        "",
        "",
        {AFTER: 89.4},
        by_name="its weights were never released",
    ),
    "clip_l_336": Teacher(
        "CLIP ViT-L/14, then ImageNet-22K, 336 px",
        "openai_clip_vit_l14",
        "distill_clip_vit_l14",
        "finetune_clip_vit_l14_336",
        "",
        "",
        {AFTER: 89.0},
        by_name="it needs ImageNet-22K",
    ),
}
CHANGES = {
    BEFORE: "teacher, fine-tuned",
    AFTER: "student, fine-tuned",
    LINEAR_BEFORE: "teacher, linear probe",
    LINEAR_AFTER: "student, linear probe",
}


def cells(seeds: Sequence[int]) -> list[Cell]:
    """All cells, table by table."""
    seeds = tuple(seeds)
    first = [
        _first_table_cell(name, row, seeds)
        for name, teacher in TEACHERS.items()
        for row in teacher.figures
    ]
    others = [
        _ablation_cell(row, name, seeds)
        for name, teacher in TEACHERS.items()
        for row in ROWS
        if teacher.ablation and name in row.paper
    ]
    return first + sorted(others, key=lambda cell: cell.table)


def _first_table_cell(name: str, row: str, seeds: tuple[int, ...]) -> Cell:
    figures = TEACHERS[name].figures
    linear = row in (LINEAR_BEFORE, LINEAR_AFTER)
    default = LINEAR_BEFORE if linear else BEFORE
    run = {
        BEFORE: _tuned_teacher,
        AFTER: _tuned_student,
        LINEAR_BEFORE: _probed_teacher,
        LINEAR_AFTER: _probed_student,
    }[row]
    return Cell(
        table="1",
        row=row,
        teacher=name,
        change=CHANGES[row],
        default=default if default in figures else row,
        paper=((name, figures[row]),),
        seeds=seeds,
        runs=tuple(run(name, seed) for seed in seeds),
    )


def _distilled(name: str, seed: int) -> Command:
    teacher = TEACHERS[name]
    if teacher.distill == TEACHERS["clip_l"].distill:
        name = "clip_l"  # at 336 px the same student is fine-tuned further
    config = f"configs/{teacher.distill}.py"
    where = f"{name}/paper/seed{seed}/distill"
    return Command(where, TRAIN, config, (("seed", seed),), source=teacher.source)


def _tuned_student(name: str, seed: int) -> Command:
    config, where = f"configs/{TEACHERS[name].finetune}.py", f"{name}/paper/seed{seed}/finetune"
    start = _distilled(name, seed)
    if name == "clip_l_336":
        fields = (("init_from", start), ("seed", seed))
        start = Command(f"{where}_22k", FINETUNE, f"{config}:stage=22k", fields)
        config = f"{config}:stage=1k"
    return Command(where, FINETUNE, config, (("init_from", start), ("seed", seed)))


def _tuned_teacher(name: str, seed: int) -> Command:
    teacher = TEACHERS[name]
    config = f"configs/finetune_teacher.py:teacher={teacher.before}"
    return _from_teacher(name, config, f"{name}/before/seed{seed}/finetune", seed)


def _probed_teacher(name: str, seed: int) -> Command:
    config = f"configs/{TEACHERS[name].probe}.py"
    return _from_teacher(name, config, f"{name}/before/seed{seed}/probe", seed)


def _from_teacher(name: str, config: str, where: str, seed: int) -> Command:
    source = TEACHERS[name].source
    fields = (("init_from", f"teachers/{source}"), ("seed", seed))
    return Command(where, FINETUNE, config, fields, source=source)


def _probed_student(name: str, seed: int) -> Command:
    config, where = f"configs/{TEACHERS[name].probe}.py", f"{name}/paper/seed{seed}/probe"
    return Command(where, FINETUNE, config, (("init_from", _distilled(name, seed)), ("seed", seed)))


def _ablation_cell(row: Row, name: str, seeds: tuple[int, ...]) -> Cell:
    default = DEFAULTS.get(row.table, TEACHERS[name].drop_path)
    return Cell(
        table=row.table,
        row=row.name,
        teacher=name,
        change=row.change,
        default=default,
        paper=((name, row.paper[name]),),
        seeds=seeds,
        runs=tuple(_ablated(row, name, seed, default=row.name == default) for seed in seeds),
    )


def _ablated(row: Row, name: str, seed: int, *, default: bool) -> Command:
    """Distils and fine-tunes one row; the default rows of all tables are one run."""
    teacher = TEACHERS[name]
    table, label = ("2", DEFAULTS["2"]) if default else (row.table, row.name)
    folder = "default" if default else f"table{table}_{label}"
    where = f"{name}/{folder}/seed{seed}"
    config = f"configs/ablations.py:table={table},row={label},teacher={name}"
    student = Command(f"{where}/distill", TRAIN, config, (("seed", seed),), source=teacher.source)
    fields = (("init_from", student), ("seed", seed))
    return Command(f"{where}/finetune", FINETUNE, f"configs/{teacher.ablation}.py", fields)
