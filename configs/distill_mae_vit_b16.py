"""Distil MAE ViT-B/16 into ViT-B/16 for 300 epochs (docs/reference.md#table-1).

    python train.py --config=configs/distill_mae_vit_b16.py --workdir=runs/distill_mae_vit_b16

Paper: 83.8 top-1 after fine-tuning (MAE itself: 83.6). Ours: not yet run.
The official code has no MAE config. The values are those of its DINO and DeiT configs.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.distillation(teacher="mae_vit_base_pretrain", drop_path=0.3)
    return base.shrink(config) if base.arguments(arg)["smoke"] else config
