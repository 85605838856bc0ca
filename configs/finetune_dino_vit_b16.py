r"""Fine-tune FD-DINO ViT-B/16 on ImageNet-1K (docs/reference.md#table-1).

    python finetune.py --config=configs/finetune_dino_vit_b16.py \
      --config.init_from=runs/distill_dino_vit_b16/model --workdir=runs/finetune_dino_vit_b16

Paper: 83.8 top-1. Ours: not yet run.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.fine_tuning(drop_path=0.2, layer_decay=0.60, peak_lr=1.5e-3, floor_lr=2.5e-7)
    return base.shrink_fine_tuning(config) if base.arguments(arg)["smoke"] else config
