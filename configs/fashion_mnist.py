r"""Train a small ViT on Fashion-MNIST from random weights, to detect a broken recipe.

    python -m benchmarks.fashion_mnist

That command trains it and compares the accuracy with the one that it has to reach.
"""

from configs import base, miniature

SHAPE = {"patch_size": 7, "width": 96, "depth": 4, "heads": 3, "mlp_width": 384}


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.fine_tuning(
        drop_path=0.05,
        layer_decay=1.0,
        peak_lr=3e-3,
        floor_lr=1e-5,
        epochs=4,
        warmup_epochs=0.3,
        image_size=miniature.SIZE,
    )
    # Layer scale starts branches at a tenth, and a relative bias at nothing, which a run of a few
    # epochs does not make up for.
    arch = base.student(SHAPE, image_size=miniature.SIZE, position="ape") | {"layer_scale": None}
    config.model.update(family="vit", arch=arch, classes=10, head_scale=1.0)
    config.batch_size = 128
    config.mixing.update(mixup=0.0, cutmix=0.0, erasing=0.0)
    config.data.update(
        name="fashion_mnist_debian", eval_split="test", data_dir="data", threads=2, min_area=0.8
    )
    config.data.rand_augment = ""
    config.optim.lr_batch = config.batch_size
    config.checkpoint.every = 500
    if base.arguments(arg)["smoke"]:
        config.steps = 3
        config.optim.warmup_epochs = 0.0
    return config
