r"""UPerNet on FD-SwinV2-G, on ADE20K (docs/reference.md#table-1).

    python finetune.py --config=configs/segment_swinv2_g.py \
      --config.init_from=runs/distill_swinv2_g/model --workdir=runs/segment_swinv2_g \
      --config.data.root=ADEChallengeData2016

Paper: 61.4 mIoU (SwinV2-G itself: 59.9). Ours: not yet run.

Neither the weights nor the values of this run were published. These are the values of the large
ViT, with the decoder of Swin-B; the paper refers to the frame of SwinV2, which is not reproduced
here. The mesh is one that 64 or more chips can form.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.segmentation(peak_lr=1e-4, layer_decay=0.75, drop_path=0.4, channels=512)
    config.remat = "full"
    if base.arguments(arg)["smoke"]:
        return base.shrink_segmentation(config)
    config.mesh.update(data=-1, fsdp=16, tensor=4)
    return config
