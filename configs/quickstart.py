"""Distil DINOv2 ViT-S/14 into a small ViT on the photographs of two Python packages.

    make quickstart

Once that has prepared the teacher and the pictures, this is enough:

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

It takes minutes on a CPU. The code path is that of the paper's runs; only the sizes are smaller.
"""

from configs import base

STUDENT = {"patch_size": 14, "width": 192, "depth": 12, "heads": 3, "mlp_width": 768}


def get_config(arg: str = ""):
    """See configs/base.py for the fields; argument: smoke."""
    config = base.distillation(teacher="dinov2_vits14_onnx", drop_path=0.0)
    config.student.arch.update({**STUDENT, "image_size": 98})
    config.teacher.image_size = 98
    config.data.update(
        name="photos", eval_split="test", data_dir="data", image_size=98, min_area=0.5, threads=2
    )
    config.update(batch_size=32, steps=400, log_every=10)
    config.eval.update(every=100, batches=4)
    config.checkpoint.every = 100
    # Absolute rates: a short run on few images needs a higher peak and hardly any decay.
    config.optim.update(peak_lr=1.5e-3, start_lr=1e-5, min_lr=1e-5, lr_batch=32, warmup_epochs=0.5)
    return base.shrink(config) if base.arguments(arg)["smoke"] else config
