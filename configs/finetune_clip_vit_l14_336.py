r"""Fine-tune FD-CLIP ViT-L on ImageNet-22K, then on ImageNet-1K at 336 px.

This is the row with 89.0 in docs/reference.md#table-1, in two stages:

    python finetune.py --config=configs/finetune_clip_vit_l14_336.py:stage=22k \
      --config.init_from=runs/distill_clip_vit_l14/model --config.data.name=folder:/data/in22k \
      --workdir=runs/finetune_l14_22k
    python finetune.py --config=configs/finetune_clip_vit_l14_336.py:stage=1k \
      --config.init_from=runs/finetune_l14_22k/model --workdir=runs/finetune_l14_336

Paper: 89.0 top-1 after both stages. Ours: not yet run.

The paper does not publish the hyperparameters of this row. The epochs, learning rates and drop path
here are OURS, chosen between those of its ViT-L run and of the usual ImageNet-22K recipes.
ImageNet-22K can be a folder of class folders or your own TFDS builder (TFDS has none). Its held-out
split may be any part of it; use "" for none.
"""

from configs import base
from fd_jax.errors import ConfigError

STAGES = {
    "22k": {"peak_lr": 1.25e-4, "epochs": 30, "warmup_epochs": 5, "drop_path": 0.3},
    "1k": {"peak_lr": 2.5e-5, "epochs": 20, "warmup_epochs": 2, "drop_path": 0.4},
}


def get_config(arg: str = ""):
    """See configs/base.py for the fields; arguments: stage=22k|1k, smoke."""
    given = base.arguments(arg, stage="22k")
    if given["stage"] not in STAGES:
        raise ConfigError(f"stage={given['stage']!r}; expected one of {sorted(STAGES)}")
    large = given["stage"] == "1k"
    config = base.fine_tuning(
        **STAGES[given["stage"]],
        layer_decay=0.75 if large else 0.8,
        floor_lr=2.5e-7,
        image_size=336 if large else 224,
    )
    if not large:
        config.model.classes = 21841
        config.data.update(name="folder:/data/imagenet22k", eval_split="", skip_official=True)
        config.eval.epochs = 0.0
    return base.shrink_fine_tuning(config) if given["smoke"] else config
