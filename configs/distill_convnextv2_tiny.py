r"""Distil DINOv2 ViT-B/14 into a ConvNeXt V2-T (docs/students.md).

    python train.py --config=configs/distill_convnextv2_tiny.py \
      --workdir=runs/distill_convnextv2_tiny

At 224 pixels the teacher has 16 x 16 patches and the student a map of 7 x 7, to which the teacher's
is resized. The combination and its values are ours; no paper has a figure for it.
Ours: not yet run.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.distillation(teacher="dinov2_vitb14", family="convnext", drop_path=0.2)
    config.teacher.image_size = 224
    config.target.resample = "bilinear"
    return base.shrink(config) if base.arguments(arg)["smoke"] else config
