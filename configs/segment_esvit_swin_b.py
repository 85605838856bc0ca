r"""UPerNet on FD-EsViT Swin-B, on ADE20K (docs/reference.md#table-1).

    python finetune.py --config=configs/segment_esvit_swin_b.py \
      --config.init_from=runs/distill_esvit_swin_b/model --workdir=runs/segment_esvit_swin_b \
      --config.data.root=ADEChallengeData2016

Paper: 48.9 mIoU (EsViT itself: 47.3). Ours: not yet run.

The paper does not give the values of this run. These are those of Swin-B in its authors' own
segmentation, but for the windows in evaluation: they test whole pictures.

At 512 pixels the grids are 128, 64, 32 and 16 tokens wide. Windows of 14 do not divide them, and
the authors' code fills the rest with zeros; here windows are 16 tokens wide.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.segmentation(
        peak_lr=6e-5, layer_decay=1.0, drop_path=0.3, channels=512, weight_decay=0.01
    )
    config.segment.window = 16
    return base.shrink_segmentation(config) if base.arguments(arg)["smoke"] else config
