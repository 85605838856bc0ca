r"""The paper in miniature: docs/reference.md#table-1 on small pictures, in minutes on a CPU.

    make miniature

runs all stages over several seeds (benchmarks/miniature.py). To run one stage by hand, for example:

    python finetune.py --config=configs/miniature.py:stage=pretrain,data=digits \
      --workdir=runs/miniature/by_hand
"""

from configs import base
from fd_jax.errors import ConfigError

SHAPE = {"patch_size": 7, "width": 64, "depth": 4, "heads": 4, "mlp_width": 256}
SIZE = 28

# The teacher is like DeiT: absolute positions, a class token, trained by image classification.
TEACHER = {
    **base.student(SHAPE, image_size=SIZE, position="ape"),
    "layer_scale": None,
    "qkv_bias": "qkv",
}

# dataset: epochs of pre-training, distillation, fine-tuning and probe; training examples
DATA = {
    "digits": {"pretrain": 20, "distill": 60, "finetune": 10, "probe": 20, "split": "train"},
    "fashion_mnist_debian": {
        "pretrain": 4,
        "distill": 8,
        "finetune": 2,
        "probe": 4,
        "split": "train[:10000]",
    },
}


def get_config(arg: str = ""):
    """See configs/base.py for the fields; arguments: stage=..., data=..., smoke."""
    given = base.arguments(arg, stage="pretrain", data="digits")
    stage, data = given["stage"], given["data"]
    if stage not in STAGES or data not in DATA:
        raise ConfigError(
            f"stage={stage!r}, data={data!r}; expected one of {list(STAGES)} and of {list(DATA)}"
        )
    config = STAGES[stage]()
    config.epochs = float(DATA[data][stage])
    config.data.update(
        name=data, split=DATA[data]["split"], eval_split="test", data_dir="data", image_size=SIZE
    )
    config.data.update(min_area=0.8, flip=data != "digits", rand_augment="", threads=2)
    if stage != "distill":
        config.model.classes = 10
    config.update(log_every=10**6)
    config.checkpoint.every = 10**6
    config.eval.update(every=10**6, epochs=0.0, batches=0)
    config.optim.update(lr_batch=config.batch_size)
    if given["smoke"]:
        config.steps = 3
        config.optim.warmup_epochs = 0.0
    return config


def pretrain():
    """Image classification from random weights."""
    config = _classifier()
    config.model.update(family="vit", arch=TEACHER, pooling="cls", final_norm=True, head_scale=1.0)
    return config


def distill():
    """Distillation of the teacher into a student with a shared position bias."""
    config = base.distillation(teacher="", shape=SHAPE, drop_path=0.0)
    config.student.arch.image_size = SIZE
    config.batch_size = 64
    config.optim.update(peak_lr=2e-3, start_lr=1e-5, min_lr=1e-5, warmup_epochs=1.0)
    return config


def finetune():
    """Fine-tuning of the network in init_from, or of a student with random weights without it."""
    config = _classifier(layer_decay=0.75)
    arch = {**base.student(SHAPE, image_size=SIZE)}
    config.model.update(family="vit", arch=arch)
    return config


def probe():
    """Linear probe and nearest neighbours of the class token."""
    config = base.linear_probe(epochs=1)
    config.batch_size = 128
    config.eval.knn = 10
    config.optim.update(peak_lr=3.0, warmup_epochs=0.5)
    return config


STAGES = {"pretrain": pretrain, "distill": distill, "finetune": finetune, "probe": probe}


def _classifier(layer_decay: float = 1.0):
    config = base.fine_tuning(
        drop_path=0.0,
        layer_decay=layer_decay,
        peak_lr=3e-3,
        floor_lr=1e-5,
        warmup_epochs=1,
        image_size=SIZE,
    )
    config.batch_size = 64
    config.mixing.update(mixup=0.0, cutmix=0.0, erasing=0.0)
    return config
