r"""Two teachers and one student on photographs, in minutes on a CPU (docs/several_teachers.md).

    make several

runs all stages (benchmarks/several.py): a second teacher is trained here, by contrasts of the
photographs, and then one student learns from it and from the quickstart's DINOv2, and others from
each alone. To run one stage by hand, for example:

    python train.py --config=configs/several.py:stage=contrast --workdir=runs/several/contrast
    python train.py --config=configs/several.py:teachers=both --workdir=runs/several/both
"""

from configs import base
from fd_jax.errors import ConfigError

# The second teacher: patches of 16 beside the student's and DINOv2's of 14.
CONTRASTED = {"patch_size": 16, "width": 128, "depth": 6, "heads": 4, "mlp_width": 512}
CONTRASTED_SIZE = 96
STUDENT = {"patch_size": 14, "width": 192, "depth": 6, "heads": 3, "mlp_width": 768}
SIZE = 98

TEACHERS = {
    "dinov2": base.teacher("dinov2_vits14_onnx", image_size=SIZE),
    "contrast": base.teacher("", path="runs/several/contrast/model", target__resample="bilinear"),
}


def get_config(arg: str = ""):
    """See configs/base.py for the fields.

    Arguments: stage=contrast or distill, teachers=both, dinov2 or contrast, smoke.
    """
    given = base.arguments(arg, stage="distill", teachers="both")
    stage, chosen = given["stage"], given["teachers"]
    if stage not in ("contrast", "distill") or chosen not in ("both", *TEACHERS):
        raise ConfigError(
            f"stage={stage!r}, teachers={chosen!r}; expected 'contrast' or 'distill', and one of "
            f"{['both', *TEACHERS]}"
        )
    config = contrast() if stage == "contrast" else distill(chosen)
    config.data.update(name="photos", eval_split="test", data_dir="data", threads=2)
    config.log_every = 10
    config.checkpoint.every = 100
    config.eval.update(every=100, batches=4)
    config.optim.update(lr_batch=config.batch_size, start_lr=1e-5, min_lr=1e-5, warmup_epochs=0.5)
    if given["smoke"]:
        config.steps = 3
        config.optim.warmup_epochs = 0.0
    return config


def contrast():
    """The second teacher: SimCLR, see fd_jax/tasks/contrast.py."""
    config = base.common()
    arch = base.student(CONTRASTED, image_size=CONTRASTED_SIZE, position="ape")
    config.contrast = {
        "family": "vit",
        "arch": {**arch, "layer_scale": None, "qkv_bias": "qkv"},
        "width": 64,
        "temperature": 0.2,
        "min_area": 0.2,
        "jitter": 0.4,
    }
    config.data.update(image_size=CONTRASTED_SIZE, min_area=1.0)
    config.update(batch_size=64, steps=150)
    config.optim.peak_lr = 1.5e-3
    return config


def distill(chosen: str):
    """One student of both teachers, or of one of them."""
    teachers = [(name, section) for name, section in TEACHERS.items() if chosen in ("both", name)]
    config = base.several_teachers(teachers, shape=STUDENT, image_size=SIZE, drop_path=0.0)
    config.data.min_area = 0.5
    config.update(batch_size=32, steps=200)
    config.optim.peak_lr = 1.5e-3
    return config
