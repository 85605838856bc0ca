r"""Fine-tune FD-SwinV2-G on ImageNet-1K at 256 pixels (docs/reference.md#table-1).

    python finetune.py --config=configs/finetune_swinv2_g.py \
      --config.init_from=runs/distill_swinv2_g/model --workdir=runs/finetune_swinv2_g

Paper: 89.4 top-1 (SwinV2-G itself: 89.2). Ours: not yet run.

The hyperparameters of this run were not published. These are the values of the SwinV2-B experiment
with the layer decay of the large ViT.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.swin_fine_tuning(
        drop_path=0.4, layer_decay=0.75, peak_lr=2.5e-4, floor_lr=5e-7, image_size=256
    )
    config.remat = "full"
    if base.arguments(arg)["smoke"]:
        return base.shrink_fine_tuning(config)
    config.mesh.update(data=-1, fsdp=16, tensor=4)
    return config
