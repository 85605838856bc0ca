"""The fields every run has, and the values that the paper's runs share.

An experiment's file starts from `distillation()` and sets what is its own. Any field can be set on
the command line: `--config.batch_size=1024 --config.mesh.fsdp=4`.
"""

from typing import Any

import ml_collections

from fd_jax.typing import Config

# Student shapes of the paper's Table 6.
VIT_B16 = {"patch_size": 16, "width": 768, "depth": 12, "heads": 12, "mlp_width": 3072}
VIT_L14 = {"patch_size": 14, "width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096}


def common() -> Config:
    """What the loop reads, whatever the task."""
    config: Config = ml_collections.ConfigDict()
    config.seed = 0
    config.epochs = 300.0
    config.steps = 0  # > 0: this many updates instead of `epochs`
    config.batch_size = 2048  # global
    config.accumulation = 1  # micro-batches per update
    config.dtype = "auto"  # of matmuls and activations: bfloat16 on accelerators, float32 on CPU
    config.grad_reduce_dtype = "float32"  # of gradients while they are summed over devices
    config.attention = "xla"  # or "dot_product"
    config.remat = ""  # "full" or "dots": what blocks recompute in the backward pass
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}  # -1: the devices that are left
    config.ema_decay = 0.0  # > 0: keep a moving average of the weights and evaluate it
    config.init_from = ""  # model folder to start from
    config.max_nonfinite = 10  # skipped updates in a row before the run stops
    config.log_every = 50  # steps
    config.profile_steps = 0  # > 0: trace this many steps into workdir/profile
    config.checkpoint = {"every": 1000, "keep": 2, "keep_every": 0}  # steps
    config.eval = {"every": 5000, "batches": 20}  # steps; 0 batches: the whole split
    config.data = {
        "name": "imagenet2012",  # TFDS name, or folder:/path
        "split": "train",
        "eval_split": "validation",  # "" for none
        "data_dir": "",  # "": TFDS's own default
        "image_size": 224,
        "min_area": 0.08,  # of the random crop
        "interpolation": "bilinear",
        "flip": True,
        "skip_official": False,  # leave out the 27 files that the original skips
        "threads": 16,  # decoding threads per worker process
        "workers": 0,  # worker processes; 0 decodes in this one
        "max_broken": 100,  # unreadable images that are replaced before the run stops
    }
    config.optim = {
        "peak_lr": 3e-4,  # rates are per `lr_batch` images and scaled to the batch size
        "start_lr": 5e-7,
        "min_lr": 5e-6,
        "lr_batch": 512,
        "warmup_epochs": 10.0,
        "lag": 1,  # the original's schedule is one step late
        "scale_floors": False,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.05,
        "clip_norm": 3.0,  # 0: no clipping
        "moments": "float32",  # or "bfloat16", "factored"
    }
    return config


def student(shape: dict, *, image_size: int, position: str = "shared_rpb") -> dict:
    """Architecture of a distilled student (reference 2.1)."""
    return {
        **shape,
        "image_size": image_size,
        "position": position,
        "cls_token": True,
        "registers": 0,
        "ln_pre": False,
        "final_norm": True,
        "activation": "gelu_erf",
        "norm_eps": 1e-6,
        "layer_scale": 0.1,
        "qkv_bias": "qv",
        "patch_bias": True,
    }


def distillation(
    *,
    teacher: str,
    shape: dict | None = None,
    drop_path: float,
    epochs: float = 300,
) -> Config:
    """A feature-distillation run with the paper's defaults (its Table 6).

    Args:
      teacher: converter source name; the weights are expected in teachers/<name>.
      shape: of the student, VIT_B16 by default.
      drop_path: of the student's last block.
      epochs: of distillation.
    """
    config = common()
    config.epochs = float(epochs)
    config.student = {
        "family": "vit",
        "arch": student(shape or VIT_B16, image_size=224),
        "drop_path": drop_path,
    }
    config.teacher = {
        "path": f"teachers/{teacher}",
        "source": teacher,  # must be what the folder was converted from; "" takes any
        "image_size": 0,  # 0: the size it was converted at
        "drop_path": 0.0,
    }
    config.target = {"kind": "full", "normalize": "whiten", "after_norm": True}
    config.loss_beta = 2.0
    return config


def arguments(text: str, **defaults: str) -> dict[str, Any]:
    """Reads "name=value,flag" after the colon of `--config=file.py:...`.

    Returns:
      The defaults with what was given; "smoke" is always known and False unless named.

    Raises:
      ValueError: an unknown name.
    """
    values: dict[str, Any] = {"smoke": False, **defaults}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in values:
            raise ValueError(
                f"config argument {name!r} is unknown; expected some of {sorted(values)}"
            )
        values[name] = value or True
    return values


def shrink(config: Config) -> Config:
    """The same run in under a minute on a CPU: tiny student, quickstart's teacher and pictures.

    Everything else, loss, target, optimiser and code path, stays as the experiment has it.
    `make quickstart` prepares the teacher and the pictures.
    """
    tiny = {"patch_size": 14, "width": 64, "depth": 2, "heads": 2, "mlp_width": 128}
    config.student.arch.update({**tiny, "image_size": 56})
    config.teacher.update(path="teachers/dinov2_vits14_onnx", source="", image_size=56)
    config.data.update(name="photos", eval_split="test", data_dir="data", image_size=56, threads=2)
    config.update(batch_size=8, steps=20, log_every=5)
    config.eval.update(every=20, batches=2)
    config.checkpoint.every = 10
    config.optim.warmup_epochs = 0.05
    return config
