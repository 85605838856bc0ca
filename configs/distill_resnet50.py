"""Distil DINOv2 ViT-B/14 into a ResNet-50 (docs/students.md).

    python train.py --config=configs/distill_resnet50.py --workdir=runs/distill_resnet50

At 224 pixels the teacher has 16 x 16 patches and the student a map of 7 x 7, to which the teacher's
is resized. The combination and its values are ours; no paper has a figure for it. The student is
torchvision's ResNet-50 (v1.5), and its rate of drop path that of its training from scratch in
arXiv 2110.00476 (A1).
Ours: not yet run.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.distillation(teacher="dinov2_vitb14", family="resnet", drop_path=0.05)
    config.teacher.image_size = 224
    config.target.resample = "bilinear"
    return base.shrink(config) if base.arguments(arg)["smoke"] else config
