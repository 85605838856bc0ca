"""Distil CLIP ViT-B/16 into ViT-B/16 for 300 epochs (FD-CLIP, docs/reference.md#table-1).

    python train.py --config=configs/distill_clip_vit_b16.py --workdir=runs/distill_clip_vit_b16

Paper: 84.9 top-1 after fine-tuning (CLIP itself: 82.9), 80.3 with a linear probe.
Ours: not yet run.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.distillation(teacher="openai_clip_vit_b16", drop_path=0.2)
    return base.shrink(config) if base.arguments(arg)["smoke"] else config
