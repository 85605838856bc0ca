r"""The control FT-CLIP: fine-tune CLIP ViT-B/16 at 224 px with the recipe of Dong et al. 2022.

    python finetune.py --config=configs/ft_clip_vit_b16.py \
      --config.init_from=teachers/openai_clip_vit_b16 \
      --workdir=runs/ft_clip_vit_b16

Published for CLIP itself: 85.7 top-1. Ours: not yet run.
`init_from` takes any model folder, including that of a distilled student.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.clip_recipe(peak_lr=6e-4, layer_decay=0.6, epochs=50, warmup_epochs=10)
    return base.shrink_fine_tuning(config) if base.arguments(arg)["smoke"] else config
