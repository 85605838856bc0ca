r"""Linear probe of a frozen Swin-B on ImageNet-1K, with the protocol of MAE that the paper follows.

    python finetune.py --config=configs/linear_swin_b.py \
      --config.init_from=runs/distill_esvit_swin_b/model --workdir=runs/linear_swin_b

Paper: 80.4 for FD-EsViT, 81.3 for EsViT. Ours: not yet run.
The probe reads the mean token after the final norm, as the original does for this family.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.linear_probe(epochs=90, pooling="mean", final_norm=True)
    return base.shrink_fine_tuning(config) if base.arguments(arg)["smoke"] else config
