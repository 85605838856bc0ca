"""EsViT Swin-B into ViT-B/16: the map of the teacher's third stage, 14 x 14 tokens of 512 channels.

    python train.py --config=configs/distill_esvit_vit_b16.py --workdir=runs/distill_esvit_vit_b16

The original has the switch (docs/reference.md#stage-3-target) without a shipped experiment or a
published figure; the other values are those of the ViT-B students. Ours: not yet run.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.distillation(teacher="esvit_swin_base_w14", drop_path=0.3)
    config.teacher.stages = 3
    return base.shrink(config) if base.arguments(arg)["smoke"] else config
