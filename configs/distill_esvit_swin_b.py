"""EsViT Swin-B into SwinV2-B with windows of 14, 300 epochs (FD-EsViT, docs/reference.md#table-1).

    python train.py --config=configs/distill_esvit_swin_b.py --workdir=runs/distill_esvit_swin_b

Paper after fine-tuning: 85.1 top-1 (EsViT itself 83.9), linear 80.4. Ours: not yet run.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.distillation(
        teacher="esvit_swin_base_w14", shape=base.SWIN_B_W14, family="swin_v2", drop_path=0.3
    )
    config.optim.update(peak_lr=2e-4, start_lr=1e-6, min_lr=1e-5)
    return base.shrink(config) if base.arguments(arg)["smoke"] else config
