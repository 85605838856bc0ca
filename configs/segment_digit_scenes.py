r"""UPerNet on the quickstart's student, on photographs with digits: `make segment`.

    python -m fd_jax.data.prepare --name=digit_scenes --data_dir=data
    python finetune.py --config=configs/segment_digit_scenes.py \
      --config.init_from=runs/quickstart/model --workdir=runs/segment/student

It takes minutes on a CPU. The code path is that of the recipes for ADE20K; sizes, rates and the
number of steps are ours.
"""

from configs import base

SIDE = 112  # pixels: eight patches of the quickstart's student


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.segmentation(peak_lr=5e-3, layer_decay=0.8, drop_path=0.0, channels=32)
    config.update(batch_size=8, steps=700, log_every=20)
    config.segment.update(classes=11, auxiliary_channels=16, dropout=0.0)
    config.data.update(
        name="digit_scenes",
        root="",
        split="train",
        eval_split="test",
        data_dir="data",
        reduce_zero_label=False,
        image_size=SIDE,
        scale=(600, 150),  # a card is two to four patches wide
        ratio=(0.9, 1.1),
        flip=False,  # the mirror image of a digit is none
        distort=False,
        threads=2,
    )
    config.eval.update(every=350, stride=2 * SIDE // 3)
    config.checkpoint.every = 100
    config.optim.update(lr_batch=8, warmup_steps=20)
    return base.shrink_segmentation(config) if base.arguments(arg)["smoke"] else config
