r"""UPerNet on MAE's ViT-B/16, on ADE20K (docs/reference.md#table-1).

    python finetune.py --config=configs/segment_mae_vit_b16.py \
      --config.init_from=teachers/mae_vit_base_pretrain --workdir=runs/segment_mae_vit_b16 \
      --config.data.root=ADEChallengeData2016

Paper: 48.1 mIoU for MAE itself; none for FD-MAE. mmsegmentation, with these values: 48.13.
Ours: not yet run.

Rate, layer decay, drop path and channels are those of mmsegmentation's config. Its network adds a
relative position bias to the absolute positions; here there is none.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.segmentation(peak_lr=1e-4, layer_decay=0.65, drop_path=0.1, channels=768)
    return base.shrink_segmentation(config) if base.arguments(arg)["smoke"] else config
