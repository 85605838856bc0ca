"""Distil CLIP ViT-L/14 into ViT-L/14 for 300 epochs (FD-CLIP ViT-L, docs/reference.md#table-1).

    python train.py --config=configs/distill_clip_vit_l14.py --workdir=runs/distill_clip_vit_l14

Paper: 87.7 top-1 after fine-tuning (CLIP itself: 86.1), 84.8 with a linear probe.
Ours: not yet run.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.distillation(teacher="openai_clip_vit_l14", shape=base.VIT_L14, drop_path=0.3)
    return base.shrink(config) if base.arguments(arg)["smoke"] else config
