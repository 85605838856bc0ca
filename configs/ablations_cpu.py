r"""The paper's ablations on Fashion-MNIST, at a scale for two CPU cores.

    python -m fd_jax.reproduce --scale=cpu --workdir=runs/reproduce

runs every stage of every cell in its settings (fd_jax/reproduce/small.py). To run one stage by
hand, for example:

    python train.py --config=configs/ablations_cpu.py:stage=contrastive --workdir=runs/contrastive
"""

from configs import base
from fd_jax.errors import ConfigError

SIZE = 28
SHAPE = {"patch_size": 7, "width": 64, "depth": 4, "heads": 4, "mlp_width": 256}

# The teachers that are trained here: absolute positions and a class token, as DINO's and DeiT's.
TEACHER = {
    **base.student(SHAPE, image_size=SIZE, position="ape"),
    "layer_scale": None,
    "qkv_bias": "qkv",
}

# DINOv2's patches are 14 pixels wide; at 56 pixels, its map has 4 x 4 patches.
DINOV2_SIZE = 56
DINOV2_STUDENT = {**SHAPE, "patch_size": 14}


def get_config(arg: str = ""):
    """See configs/base.py for the fields.

    Arguments: stage=..., pictures=dinov2, network=student (for stage=contrastive), smoke.
    """
    given = base.arguments(arg, stage="contrastive", pictures="fashion", network="teacher")
    stage, pictures = given["stage"], given["pictures"]
    if stage not in STAGES or pictures not in ("fashion", "dinov2"):
        raise ConfigError(
            f"stage={stage!r}, pictures={pictures!r}; expected one of {list(STAGES)} and of "
            "['fashion', 'dinov2']"
        )
    config = STAGES[stage]()
    config.data.update(name="fashion_mnist_debian", eval_split="test", data_dir="data", threads=2)
    # Views are cropped in the step, from the whole picture.
    config.data.update(rand_augment="", min_area=1.0 if stage == "contrastive" else 0.5)
    config.update(log_every=50)
    config.checkpoint.update(every=500, keep=1)
    config.eval.update(every=10**6, epochs=0.0, batches=0)
    config.optim.lr_batch = config.batch_size
    if stage == "distill":  # only the accuracy of what follows is compared
        config.eval.batches = 10
    if given["network"] == "student":
        config.contrast.arch = base.student(SHAPE, image_size=SIZE)
    if pictures == "dinov2":
        _use_dinov2(config)
    if given["smoke"]:
        config.steps = 3
        config.optim.warmup_epochs = 0.0
        config.checkpoint.every = 2
    return config


def contrastive():
    """A teacher without labels: SimCLR, see fd_jax/tasks/contrast.py."""
    config = base.common()
    config.contrast = {
        "family": "vit",
        "arch": TEACHER,
        "width": 64,  # of the vectors that are compared
        "temperature": 0.2,
        "min_area": 0.2,  # smallest share of the picture that a view covers
        "jitter": 0.4,  # largest change of contrast and brightness
    }
    config.data.image_size = SIZE
    config.batch_size = 256
    config.steps = 1000
    config.optim.update(peak_lr=1.5e-3, start_lr=1e-5, min_lr=1e-5, warmup_epochs=1.0)
    return config


def supervised():
    """A teacher with labels, as DeiT's: classification of all training pictures."""
    config = _classifier(layer_decay=1.0)
    config.model.update(family="vit", arch=TEACHER, pooling="cls", final_norm=True, head_scale=1.0)
    config.batch_size = 128
    config.steps = 1500
    config.optim.warmup_epochs = 0.5
    return config


def distill():
    """A teacher's map into a student with a shared position bias."""
    config = base.distillation(teacher="", shape=SHAPE, image_size=SIZE, drop_path=0.0)
    config.batch_size = 128
    # In a trial of one seed, a student after 400 steps at half this rate was 5 points behind its
    # teacher in fine-tuning, and one after these steps was equal to it.
    config.steps = 600
    config.optim.update(peak_lr=4e-3, start_lr=1e-5, min_lr=1e-5, warmup_epochs=0.1)
    return config


def finetune():
    """Few labels: the network in init_from, or a student with random weights without it."""
    config = _classifier(layer_decay=0.75)
    config.model.update(family="vit", arch=base.student(SHAPE, image_size=SIZE))
    config.batch_size = 50
    config.steps = 300
    config.optim.update(peak_lr=4e-3, warmup_epochs=2.0)
    return config


def probe():
    """Linear probe of the class token with few labels."""
    config = base.linear_probe(epochs=1)
    config.data.image_size = SIZE
    config.model.classes = 10
    config.batch_size = 100
    config.steps = 300
    config.optim.update(peak_lr=1.0, warmup_epochs=1.0)
    return config


STAGES = {
    "contrastive": contrastive,
    "supervised": supervised,
    "distill": distill,
    "finetune": finetune,
    "probe": probe,
}


def _classifier(layer_decay: float):
    config = base.fine_tuning(
        drop_path=0.0,
        layer_decay=layer_decay,
        peak_lr=2e-3,
        floor_lr=1e-5,
        image_size=SIZE,
    )
    config.model.classes = 10
    config.mixing.update(mixup=0.0, cutmix=0.0, erasing=0.0)
    return config


def _use_dinov2(config):
    """Larger pictures, fewer of them, and students with DINOv2's grid."""
    config.data.update(image_size=DINOV2_SIZE, eval_split="test[:2000]")
    if "teacher" in config:
        config.data.split = "train[:10000]"
        config.teacher.update(source="dinov2_vits14_onnx", image_size=DINOV2_SIZE)
        config.student.arch = base.student(DINOV2_STUDENT, image_size=DINOV2_SIZE)
        config.steps = 100
    elif config.model.trains == "all":
        config.model.arch = base.student(DINOV2_STUDENT, image_size=DINOV2_SIZE)
        config.optim.peak_lr = 5e-4
        config.steps = 100
    else:
        config.steps = 50
