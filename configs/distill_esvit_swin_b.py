"""Distil EsViT Swin-B into SwinV2-B for 300 epochs (FD-EsViT, docs/reference.md#table-1).

    python train.py --config=configs/distill_esvit_swin_b.py --workdir=runs/distill_esvit_swin_b

Paper: 85.1 top-1 after fine-tuning (EsViT itself: 83.9), 80.4 with a linear probe.
Ours: not yet run.

The student's windows are 14 tokens wide.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.distillation(
        teacher="esvit_swin_base_w14", shape=base.SWIN_B_W14, family="swin_v2", drop_path=0.3
    )
    config.optim.update(peak_lr=2e-4, start_lr=1e-6, min_lr=1e-5)
    return base.shrink(config) if base.arguments(arg)["smoke"] else config
