r"""Fine-tune FD-CLIP ViT-B/16 on ImageNet-1K after 100 epochs (Tables 2 to 5).

    python finetune.py --config=configs/finetune_clip_vit_b16_100ep.py \
      --config.init_from=runs/distill_clip_vit_b16_100ep/model \
      --workdir=runs/finetune_clip_vit_b16_100ep

Paper: 84.3 top-1. Ours: not yet run.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.fine_tuning(drop_path=0.1, layer_decay=0.65, peak_lr=1.25e-3, floor_lr=2.5e-7)
    return base.shrink_fine_tuning(config) if base.arguments(arg)["smoke"] else config
