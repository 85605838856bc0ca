r"""A linear decoder on a frozen FD-CLIP ViT-B/16, on ADE20K.

    python finetune.py --config=configs/segment_linear_vit_b16.py \
      --config.init_from=runs/distill_clip_vit_b16/model --workdir=runs/segment_linear_vit_b16 \
      --config.data.root=ADEChallengeData2016

Paper: none. Ours: not yet run.

The protocol of DINOv2: BatchNorm and a 1x1 convolution on the last map, after the final norm. The
values (a rate of 1e-3, weight decay of 1e-4, 40,000 steps) are ours, not from a publication.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.linear_segmentation()
    return base.shrink_segmentation(config) if base.arguments(arg)["smoke"] else config
