r"""UPerNet on FD-CLIP ViT-B/16, on ADE20K (docs/reference.md#table-1).

    python finetune.py --config=configs/segment_clip_vit_b16.py \
      --config.init_from=runs/distill_clip_vit_b16/model --workdir=runs/segment_clip_vit_b16 \
      --config.data.root=ADEChallengeData2016

Paper: 52.8 mIoU (CLIP itself: 49.5). Ours: not yet run.

The paper gives rate, layer decay, drop path, weight decay and crop
(docs/reference.md#ade20k-training). It leaves the decoder's channels and the windows in evaluation
open; they are BEiT's here.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.segmentation(peak_lr=4e-4, layer_decay=0.65, drop_path=0.2, channels=768)
    return base.shrink_segmentation(config) if base.arguments(arg)["smoke"] else config
