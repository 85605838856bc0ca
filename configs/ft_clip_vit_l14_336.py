r"""The control FT-CLIP: fine-tune CLIP ViT-L/14 at 336 px with the recipe of Dong et al. 2022.

    python finetune.py --config=configs/ft_clip_vit_l14_336.py \
      --config.init_from=teachers/openai_clip_vit_l14_336 \
      --workdir=runs/ft_clip_vit_l14_336

Published for CLIP itself: 88.3 top-1. Ours: not yet run.
`init_from` takes any model folder, including that of a distilled student.

The published batch is 20 per GPU with 4 accumulation steps. The number of GPUs is not stated; 8 are
assumed.
"""

from configs import base


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.clip_recipe(
        batch_size=640, peak_lr=6e-4, layer_decay=0.65, epochs=30, warmup_epochs=5, image_size=336
    )
    return base.shrink_fine_tuning(config) if base.arguments(arg)["smoke"] else config
