r"""Linear probe of a frozen ViT-L on ImageNet-1K, with the protocol of MAE that the paper follows.

    python finetune.py --config=configs/linear_vit_l14.py \
      --config.init_from=runs/distill_clip_vit_l14/model --workdir=runs/linear_vit_l14

Paper: 84.8 for FD-CLIP, 83.5 for CLIP. Ours: not yet run.
The argument `official` follows the official code instead, which pools differently and gives its
learning rate per 512 images. Its probe config was not released.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; arguments: official, smoke."""
    given = base.arguments(arg, official="")
    config = base.linear_probe(epochs=50)
    if given["official"]:
        config = base.official_probe(config)
    return base.shrink_fine_tuning(config) if given["smoke"] else config
