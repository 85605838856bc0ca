r"""Fine-tune a masked student on ImageNet-1K as MaskAlign's authors do (docs/masked_students.md).

    python finetune.py --config=configs/finetune_maskalign_vit_b16.py \
      --config.init_from=runs/maskalign_vit_b16/model --workdir=runs/finetune_maskalign_vit_b16

The authors: 85.4 top-1. Ours: not yet run.
The values are those of the command and the defaults in the authors' repository.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.fine_tuning(
        drop_path=0.2, layer_decay=0.55, peak_lr=3e-4, floor_lr=0.0, warmup_epochs=5
    )
    config.batch_size = 1024
    # The minimum is 1e-6 at this batch.
    config.optim.update(min_lr=2.5e-7, lr_batch=256, clip_norm=0.0, lag=0, scale_floors=True)
    return base.shrink_fine_tuning(config) if base.arguments(arg)["smoke"] else config
