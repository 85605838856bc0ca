r"""Fine-tune a teacher directly: the rows "before distillation" (docs/reference.md#table-1).

    python finetune.py --config=configs/finetune_teacher.py:teacher=clip_b \
      --config.init_from=teachers/openai_clip_vit_b16 --workdir=runs/finetune_clip_b

Paper: see TEACHERS. Ours: not yet run.

The original code cannot fine-tune its ViT teachers, and the paper gives no hyperparameters for any
teacher. The recipe here is that of the distilled student in the same row. Each network keeps its
own structure and pixel statistics.
"""

from configs import base
from fd_jax.errors import ConfigError

B = {"drop_path": 0.2, "layer_decay": 0.65, "peak_lr": 1.25e-3, "floor_lr": 2.5e-7}
SWIN = {"drop_path": 0.4, "layer_decay": 0.80, "peak_lr": 1.25e-3, "floor_lr": 2.5e-7}
L = {"drop_path": 0.4, "layer_decay": 0.75, "peak_lr": 2.5e-4, "floor_lr": 5e-7}

# name: (recipe, the paper's top-1 without distillation)
TEACHERS = {
    "clip_b": (B, 82.9),
    "clip_l": ({**L, "epochs": 50, "warmup_epochs": 5}, 86.1),
    "dino_b": (B, 82.8),
    "deit_b": (B, 81.8),
    "mae_b": (B, 83.6),
    "esvit_swin_b": (SWIN, 83.9),
}


def get_config(arg: str = ""):
    """See configs/base.py for the fields; arguments: teacher=NAME, smoke."""
    given = base.arguments(arg, teacher="clip_b")
    if given["teacher"] not in TEACHERS:
        raise ConfigError(f"teacher={given['teacher']!r}; expected one of {sorted(TEACHERS)}")
    recipe = TEACHERS[given["teacher"]][0]
    config = (base.swin_fine_tuning if recipe is SWIN else base.fine_tuning)(**recipe)
    return base.shrink_fine_tuning(config) if given["smoke"] else config
