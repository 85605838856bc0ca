r"""Fine-tune FD-EsViT Swin-B on ImageNet-1K (docs/reference.md#table-1).

    python finetune.py --config=configs/finetune_esvit_swin_b.py \
      --config.init_from=runs/distill_esvit_swin_b/model --workdir=runs/finetune_esvit_swin_b

Paper: 85.1 top-1. Ours: not yet run.

The student is a SwinV2-B with windows of 14. The original's file has 64 images on each of 16
devices, half the batch of the other experiments, which its authors call a mistake. Its learning
rates are per 512 images, so a batch of 1024 gives the rates that they ran.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.swin_fine_tuning(
        drop_path=0.4, layer_decay=0.80, peak_lr=1.25e-3, floor_lr=2.5e-7
    )
    config.batch_size = 1024
    return base.shrink_fine_tuning(config) if base.arguments(arg)["smoke"] else config
