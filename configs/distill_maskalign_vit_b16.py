"""Distil CLIP ViT-B/16 into a masked ViT-B/16 for 200 epochs (MaskAlign, docs/masked_students.md).

    python train.py --config=configs/distill_maskalign_vit_b16.py --workdir=runs/maskalign_vit_b16

The authors: 85.4 top-1 after configs/finetune_maskalign_vit_b16.py. Ours: not yet run.
The values are those of the command in the authors' repository. docs/masked_students.md#differences
says where this run differs.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    clip = base.teacher(
        "openai_clip_vit_b16",
        weight=2.0,  # the authors double the loss
        target__after_norm=False,
        target__blocks=(7, 8, 9, 10, 11),
        loss__beta=1.0,
    )
    config = base.several_teachers([("clip", clip)], drop_path=0.1, epochs=200)
    config.student.mask.update(keep=0.3, by="attention")
    config.student.arch.update(position="ape", layer_scale=None, qkv_bias="qkv")
    config.batch_size = 1024
    config.data.update(min_area=0.2, interpolation="bicubic")
    config.optim.update(
        peak_lr=1.5e-4,
        start_lr=0.0,
        min_lr=2.5e-6,  # 1e-5 at this batch
        lr_batch=256,
        warmup_epochs=20.0,
        betas=(0.9, 0.95),
        clip_norm=0.0,
        lag=0,
    )
    return base.shrink(config) if base.arguments(arg)["smoke"] else config
