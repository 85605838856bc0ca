r"""UPerNet on BEiT ViT-B/16 with BEiT's own recipe, on ADE20K.

    python finetune.py --config=configs/segment_beit_b16.py \
      --config.init_from=teachers/timm_beit_base_patch16_224 --workdir=runs/segment_beit_b16 \
      --config.data.root=ADEChallengeData2016

BEiT: 53.6 mIoU published, 53.0 to 53.3 in others' repetitions (microsoft/unilm, issue 585).
Ours: not yet run.

A check of the whole pipeline on public weights: those that BEiT fine-tuned on ImageNet-22K. The
values are those of its authors' config.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.segmentation(peak_lr=3e-5, layer_decay=0.9, drop_path=0.1, channels=768)
    return base.shrink_segmentation(config) if base.arguments(arg)["smoke"] else config
