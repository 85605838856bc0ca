"""Distil DINO ViT-B/16 into ViT-B/16 for 300 epochs (FD-DINO, docs/reference.md#table-1).

    python train.py --config=configs/distill_dino_vit_b16.py --workdir=runs/distill_dino_vit_b16

Paper: 83.8 top-1 after fine-tuning (DINO itself: 82.8), 76.1 with a linear probe.
Ours: not yet run.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.distillation(teacher="dino_vitb16", drop_path=0.3)
    return base.shrink(config) if base.arguments(arg)["smoke"] else config
