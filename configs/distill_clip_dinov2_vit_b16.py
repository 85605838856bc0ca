"""Distil CLIP ViT-B/16 and DINOv2 ViT-B/14 into one ViT-B/16 (docs/several_teachers.md).

    python train.py --config=configs/distill_clip_dinov2_vit_b16.py \
      --workdir=runs/distill_clip_dinov2_vit_b16

At 224 pixels DINOv2's map has 16 x 16 patches and the student's 14 x 14. Everything else is as in
the paper's runs with one teacher; the combination is ours, and there is no published figure.
Ours: not yet run.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    teachers = [
        ("clip", base.teacher("openai_clip_vit_b16")),
        ("dinov2", base.teacher("dinov2_vitb14", image_size=224, target__resample="bilinear")),
    ]
    config = base.several_teachers(teachers, drop_path=0.1)
    return base.shrink(config) if base.arguments(arg)["smoke"] else config
