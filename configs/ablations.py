"""Ablations: one row of one of the paper's Tables 2 to 5, for one teacher.

See docs/reference.md#ablations.

    python train.py --config=configs/ablations.py:table=3,row=l2,teacher=dino --workdir=runs/t3_l2

Each row is a ViT-B/16 that is distilled for 100 epochs and then fine-tuned. The comment beside the
row gives the paper's top-1 after fine-tuning for CLIP, DINO and DeiT. Ours: not yet run.
"""

from configs import base
from fd_jax.errors import ConfigError

# teacher: (converter source, best drop path of the student: docs/reference.md#table-5)
TEACHERS = {
    "clip": ("openai_clip_vit_b16", 0.1),
    "dino": ("dino_vitb16", 0.2),
    "deit": ("deit_base_patch16_224", 0.2),
}

# table: row: fields that differ from the default row
TABLES = {
    "2": {  # distillation target (docs/reference.md#table-2)
        "logits": {"target.kind": "logits"},  # -, -, 81.9
        "cls": {"target.kind": "cls"},  # 81.7, 82.2, 78.0
        "gap": {"target.kind": "gap"},  # 83.4, 82.8, 82.0
        "full": {},  # 84.3, 83.6, 82.7
    },
    "3": {  # normalisation of the target (docs/reference.md#table-3)
        "none": {"target.normalize": "none"},  # 83.5, 83.4, 81.7
        "l2": {"target.normalize": "l2"},  # 83.9, 83.6, 81.6
        "whiten": {},  # 84.3, 83.6, 82.7
    },
    "4": {  # position encoding of the student (docs/reference.md#table-4)
        "ape": {"student.arch.position": "ape"},  # 84.0, 83.4, 82.3
        "rpb": {"student.arch.position": "rpb"},  # 83.9, 83.6, 82.6
        "shared_rpb": {},  # 84.3, 83.6, 82.7
    },
    "5": {  # drop path of student and teacher (docs/reference.md#table-5)
        "0.1": {"student.drop_path": 0.1},  # 84.3, 83.2, 82.4
        "0.2": {"student.drop_path": 0.2},  # 84.0, 83.6, 82.7
        "0.3": {"student.drop_path": 0.3},  # -, 83.6, 81.9
        "teacher": {"teacher.drop_path": 0.1},  # 84.0, 83.6, -
    },
}


def get_config(arg: str = "table=2,row=full,teacher=clip"):
    """See configs/base.py for the fields; arguments: table, row, teacher, smoke."""
    values = base.arguments(arg, table="2", row="full", teacher="clip")
    if values["teacher"] not in TEACHERS:
        raise ConfigError(f"teacher={values['teacher']}; expected one of {sorted(TEACHERS)}")
    rows = TABLES.get(values["table"])
    if rows is None or values["row"] not in rows:
        known = {table: sorted(rows) for table, rows in TABLES.items()}
        raise ConfigError(f"table={values['table']},row={values['row']}; expected one of {known}")
    source, drop_path = TEACHERS[values["teacher"]]
    config = base.distillation(teacher=source, drop_path=drop_path, epochs=100)
    if values["smoke"]:
        base.shrink(config)
    config.update_from_flattened_dict(rows[values["row"]])
    return config
