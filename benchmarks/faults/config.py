"""The small run that `python -m benchmarks.faults` disturbs.

A random ViT is distilled into another on the digits. Every step is logged; checkpoints, evaluations
and log lines fall on different steps. `runs.py` names the teacher and the data folder.
"""

from configs import base

STUDENT = {"patch_size": 8, "width": 32, "depth": 1, "heads": 2, "mlp_width": 64}


def get_config(arg: str = ""):
    """See configs/base.py for the fields."""
    del arg
    config = base.distillation(teacher="random", drop_path=0.1)
    config.student.arch.update({**STUDENT, "image_size": 32})
    config.teacher.image_size = 32
    config.data.update(
        name="digits", eval_split="test", image_size=32, min_area=0.5, threads=1, workers=0
    )
    config.update(batch_size=8, steps=60, log_every=1)
    config.checkpoint.update(every=7, keep=2)
    config.eval.update(every=21, batches=1)
    config.optim.update(peak_lr=1e-3, lr_batch=8, warmup_epochs=0.01)
    return config
