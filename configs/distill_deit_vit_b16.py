"""Distil DeiT ViT-B/16 into ViT-B/16 for 300 epochs (FD-DeiT, docs/reference.md#table-1).

    python train.py --config=configs/distill_deit_vit_b16.py --workdir=runs/distill_deit_vit_b16

Paper: 83.0 top-1 after fine-tuning (DeiT itself: 81.8). Ours: not yet run.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.distillation(teacher="deit_base_patch16_224", drop_path=0.3)
    return base.shrink(config) if base.arguments(arg)["smoke"] else config
