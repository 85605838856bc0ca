r"""UPerNet on FD-CLIP ViT-L/14, on ADE20K (docs/reference.md#table-1).

    python finetune.py --config=configs/segment_clip_vit_l14.py \
      --config.init_from=runs/distill_clip_vit_l14/model --workdir=runs/segment_clip_vit_l14 \
      --config.data.root=ADEChallengeData2016

Paper: 55.7 mIoU (CLIP itself: 53.5). Ours: not yet run.

The paper gives rate, layer decay, drop path, weight decay and crop
(docs/reference.md#ade20k-training). It leaves the decoder's channels and the windows in evaluation
open; they are BEiT's here. It does not say either how patches of 14 fill 512 pixels: here their
kernel is resized to 16 (docs/reference.md#ade20k-patch-14).
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.segmentation(peak_lr=1e-4, layer_decay=0.75, drop_path=0.4, channels=1024)
    config.segment.patch_size = 16
    return base.shrink_segmentation(config) if base.arguments(arg)["smoke"] else config
