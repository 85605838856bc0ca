"""Distil SwinV2-G into SwinV2-G at 256 pixels (FD-SwinV2-G, docs/reference.md#table-1).

    python train.py --config=configs/distill_swinv2_g.py --workdir=runs/distill_swinv2_g

Paper: 89.4 top-1 and 61.4 mIoU after fine-tuning (SwinV2-G itself: 89.2 and 59.9).
Ours: not yet run.

Neither the weights nor the hyperparameters of this run were published. Heads, windows, drop path
and learning rates are those of the SwinV2-B experiment or follow from it. The mesh is one that 64
or more chips can form.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.distillation(
        teacher="swinv2_giant",
        shape=base.SWIN_G,
        family="swin_v2",
        image_size=256,
        drop_path=0.3,
    )
    config.optim.update(peak_lr=2e-4, start_lr=1e-6, min_lr=1e-5)
    config.remat = "full"
    if base.arguments(arg)["smoke"]:
        return base.shrink(config)
    config.mesh.update(data=-1, fsdp=16, tensor=4)
    return config
