r"""Fine-tune FD-CLIP ViT-L/14 on ImageNet-1K (docs/reference.md#table-1).

    python finetune.py --config=configs/finetune_clip_vit_l14.py \
      --config.init_from=runs/distill_clip_vit_l14/model --workdir=runs/finetune_clip_vit_l14

Paper: 87.7 top-1. Ours: not yet run.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.fine_tuning(
        drop_path=0.4,
        layer_decay=0.75,
        peak_lr=2.5e-4,
        floor_lr=5e-7,
        epochs=50,
        warmup_epochs=5,
    )
    return base.shrink_fine_tuning(config) if base.arguments(arg)["smoke"] else config
