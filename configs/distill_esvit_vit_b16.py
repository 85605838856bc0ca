"""Distil the third stage of EsViT Swin-B, 14 x 14 tokens of 512 channels, into ViT-B/16.

    python train.py --config=configs/distill_esvit_vit_b16.py --workdir=runs/distill_esvit_vit_b16

Paper: no figure. The original has a switch for this target (docs/reference.md#stage-3-target), but
ships no experiment that uses it. The other values are those of the ViT-B students.
Ours: not yet run.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.distillation(teacher="esvit_swin_base_w14", drop_path=0.3)
    config.teacher.stages = 3
    return base.shrink(config) if base.arguments(arg)["smoke"] else config
