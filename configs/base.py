"""The fields that every run has, and the values that the paper's runs share.

An experiment's file starts from one of these functions, such as `distillation()`, and changes what
differs. Any field can be set on the command line: `--config.batch_size=1024 --config.mesh.fsdp=4`.
"""

from collections.abc import Sequence
from typing import Any

import ml_collections

from fd_jax.errors import ConfigError
from fd_jax.typing import Config

# Student shapes of the paper (docs/reference.md#table-6).
VIT_B16 = {"patch_size": 16, "width": 768, "depth": 12, "heads": 12, "mlp_width": 3072}
VIT_L14 = {"patch_size": 14, "width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096}


# Swin shapes: EsViT's teacher and its student (docs/reference.md#student-swin), and SwinV2-G
# (docs/reference.md#swin-v2-giant). The authors of SwinV2-G give channels, depths and the norm
# after every sixth block; 32 channels per head are assumed.
SWIN_B_W14 = {
    "embed_width": 128,
    "depths": (2, 2, 18, 2),
    "heads": (4, 8, 16, 32),
    "window": 14,
}
# Shapes of ConvNeXt V2 (arXiv 2301.00808, table of appendix A) and of ResNet-50 (arXiv 1512.03385).
CONVNEXT_V2_T = {"widths": (96, 192, 384, 768), "depths": (3, 3, 9, 3)}
CONVNEXT_V2_B = {"widths": (128, 256, 512, 1024), "depths": (3, 3, 27, 3)}
RESNET_50 = {
    "widths": (256, 512, 1024, 2048),
    "inner_widths": (64, 128, 256, 512),
    "depths": (3, 4, 6, 3),
}
SWIN_G = {
    "embed_width": 512,
    "depths": (2, 2, 42, 4),
    "heads": (16, 32, 64, 128),
    "window": 16,
    "extra_norm_every": 6,
}


def common() -> Config:
    """The fields that the loop reads, whatever the task."""
    config: Config = ml_collections.ConfigDict()
    config.seed = 0
    config.epochs = 300.0
    config.steps = 0  # > 0: this many updates instead of `epochs`
    config.batch_size = 2048  # global
    config.accumulation = 1  # micro-batches per update
    config.dtype = "auto"  # matmuls and activations; auto: bfloat16 on accelerators, float32 on CPU
    config.grad_reduce_dtype = "float32"  # gradients, while they are summed over devices
    config.attention = "auto"  # or "xla", "cudnn", "pallas_tpu"; see docs/running.md#attention
    config.remat = ""  # "full" or "dots": what blocks recompute in the backward pass
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}  # -1: all devices that remain
    config.ema_decay = 0.0  # > 0: keep a moving average of the weights and evaluate it
    config.init_from = ""  # model folder to start from
    config.max_nonfinite = 10  # skipped updates in a row before the run stops
    config.log_every = 50  # steps
    config.profile_steps = 0  # > 0: trace this many steps into workdir/profile
    config.checkpoint = {"every": 1000, "keep": 2, "keep_every": 0}  # steps
    config.eval = {
        "every": 5000,  # steps; 0: every `epochs` epochs
        "epochs": 0.0,
        "batches": 20,  # 0: the whole split
        "knn": 0,  # > 0: also the accuracy with this many nearest neighbours
        "keep_best": "",  # figure whose best weights are kept in workdir/best, such as "top1"
    }
    config.data = {
        "name": "imagenet2012",  # TFDS name, or folder:/path
        "split": "train",
        "eval_split": "validation",  # "" for none
        "data_dir": "",  # "": TFDS's own default
        "image_size": 224,
        "min_area": 0.08,  # smallest share of the picture that a random crop covers
        "interpolation": "bilinear",
        "crop": "retried",  # until it fits; "single": drawn once and clipped (linear probe)
        "flip": True,
        "rand_augment": "",  # policy in timm's notation, such as "rand-m9-mstd0.5-inc1"
        "exif": False,  # True: turn pictures as their EXIF orientation says
        "eval_resize": 256 / 224,  # short side of a held-out picture / side of its centre crop
        "eval_crop": True,  # False: the whole picture is squeezed into the square
        "match_classes": "name",  # "number": the k-th class is class k; see docs/data.md
        "skip_official": False,  # leave out the 27 files that the original skips
        "threads": 16,  # decoding threads per worker process
        "workers": 0,  # worker processes; 0 decodes in this one
        "max_broken": 100,  # unreadable images that a process replaces before the run stops
    }
    config.optim = {
        "name": "adamw",  # or "lars"
        "peak_lr": 3e-4,  # rates are per `lr_batch` images, scaled to the batch size
        "start_lr": 5e-7,
        "min_lr": 5e-6,
        "lr_batch": 512,
        "warmup_epochs": 10.0,
        "lag": 1,  # the original's schedule is one step late
        "scale_floors": False,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "momentum": 0.9,  # for LARS
        "weight_decay": 0.05,
        "decay_vectors": False,  # decay biases and norms too
        "layer_decay": 1.0,  # factor of the learning rate from one layer to the one below
        "clip_norm": 3.0,  # 0: no clipping
        "moments": "float32",  # or "bfloat16", "factored"
    }
    return config


def _starts(config: Config) -> None:
    """Adds the fields by which an encoder trains in part, or at several sizes."""
    config.lora = {  # low-rank updates of an encoder that itself is held
        "rank": 0,  # 0: off
        "alpha": 16.0,  # the updates are scaled by alpha / rank
        "targets": ("qkv", "proj", "fc1", "fc2"),  # layers; "gate" where the MLPs have one
    }
    config.data.sizes = ()  # sides of training images, of which every step draws one
    config.data.phases = ()  # or ((0, 112), (1000, 224)): steps, and the side from each on


def student(shape: dict, *, image_size: int, position: str = "shared_rpb") -> dict:
    """Architecture of a distilled student (docs/reference.md#student-vit)."""
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


def swin_v1(shape: dict, *, image_size: int, norm_eps: float = 1e-5) -> dict:
    """Architecture of a Swin V1 network (docs/reference.md#esvit-teacher)."""
    return {
        "image_size": image_size,
        "patch_size": 4,
        "mlp_ratio": 4,
        "activation": "gelu_erf",
        "norm_eps": norm_eps,
        "final_norm": True,
        **_with_lists(shape),
    }


def swin_v2(shape: dict, *, image_size: int, position: str = "rpb") -> dict:
    """Architecture of a distilled Swin V2 student (docs/reference.md#student-swin)."""
    return {
        "position": position,
        "pretrained_windows": [0] * len(shape["depths"]),
        "residual_scale": 1e-5,
        "extra_norm_every": 0,
        **swin_v1(shape, image_size=image_size),
    }


def convnext_v2(shape: dict, *, image_size: int) -> dict:
    """Architecture of a ConvNeXt V2 student: that of its authors, with features as they are."""
    return {
        "image_size": image_size,
        "patch_size": 4,
        "kernel_size": 7,
        "grn": True,
        "layer_scale": None,
        "activation": "gelu_erf",
        "norm_eps": 1e-6,
        "final_norm": False,
        "final_norm_eps": None,
        **_with_lists(shape),
    }


def resnet(shape: dict, *, image_size: int) -> dict:
    """Architecture of a ResNet student: torchvision's (v1.5), of bottlenecks."""
    return {
        "image_size": image_size,
        "patch_size": 4,
        "stem_widths": [64],
        "bottleneck": True,
        "stride_at": "second",
        "shortcut": "strided",
        "activation": "relu",
        "norm_eps": 1e-5,
        **_with_lists(shape),
    }


def _with_lists(shape: dict) -> dict:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in shape.items()}


# The function and the usual shape of each family of students.
FAMILIES = {
    "vit": (student, VIT_B16),
    "swin_v2": (swin_v2, SWIN_B_W14),
    "convnext": (convnext_v2, CONVNEXT_V2_T),
    "resnet": (resnet, RESNET_50),
}


def distillation(
    *,
    teacher: str,
    shape: dict | None = None,
    family: str = "vit",
    image_size: int = 224,
    drop_path: float,
    epochs: float = 300,
    init_from: str = "",
    position: str = "",
) -> Config:
    """A feature-distillation run with the paper's defaults (docs/reference.md#table-6).

    Args:
      teacher: converter source name; the weights are expected in teachers/<name>.
      shape: the student's shape, by default that of FAMILIES.
      family: the student's family, a key of FAMILIES.
      image_size: pixels on a side, for both networks.
      drop_path: rate of the student's last block.
      epochs: epochs of distillation.
      init_from: model folder whose network is the student, in place of `shape` and `family`.
      position: positions of that student, "" for its own.
    """
    config = common()
    config.epochs = float(epochs)
    made, usual = FAMILIES[family]
    arch = made(shape or usual, image_size=image_size)
    if init_from:
        family, arch = "", {"position": position} if position else {}
    config.student = {
        "family": family,  # "": that of the network in init_from, whose architecture it has
        "arch": arch,
        "init_from": init_from,  # model folder of a trained network, which becomes the student
        "freeze_blocks": 0,  # > 0: so many first blocks stay as they are, and the embedding
        "drop_path": drop_path,
        "mask": {  # patches of a training image that the student sees
            "keep": 1.0,  # share of them; 1: all
            "by": "random",  # or "attention", by that of the teacher's class token
            "teacher": "",  # whose attention, where there are several teachers
        },
        "keep_projector": False,  # True: the exported network has the teacher's width
    }
    _starts(config)
    config.data.image_size = image_size
    config.teacher = {
        "path": f"teachers/{teacher}",
        "source": teacher,  # the source that the folder must come from; "" accepts any
        "image_size": 0,  # 0: the size at which it was converted
        "follow": False,  # True: its input changes with the student's (data.sizes, data.phases)
        "drop_path": 0.0,
        "stages": 0,  # > 0: only the first stages of a Swin teacher; 3 give a ViT's grid
        "targets": "",  # folder of python -m fd_jax.targets: stored maps, and no teacher runs
        "eval_targets": "",  # the same of held-out pictures, made with --held_out
        "matmuls": "",  # "int8" or "float8_e4m3fn": numbers that its linear layers multiply
    }
    config.target = {
        "kind": "full",
        "normalize": "whiten",
        "after_norm": True,
        "resample": "none",  # or "bilinear": the teacher's map to the student's grid; "student"
        "blocks": (),  # or the teacher's blocks whose maps are all targets, counted from 0
    }
    config.loss_beta = 2.0
    return config


def teacher(source: str, *, path: str = "", **fields: Any) -> dict[str, Any]:
    """The section of one of several teachers (docs/several_teachers.md).

    Args:
      source: converter source that its folder must come from; "" accepts any.
      path: its model folder, teachers/<source> by default.
      **fields: values that differ, with __ for a dot: target__normalize="phi_s".

    Raises:
      ConfigError: there is no such field.
    """
    section: dict[str, Any] = {
        "path": path or f"teachers/{source}",
        "source": source,
        "image_size": 0,  # 0: the size at which it was converted
        "follow": False,  # True: its input changes with the student's (data.sizes, data.phases)
        "drop_path": 0.0,
        "stages": 0,  # > 0: only the first stages of a Swin teacher; 3 give a ViT's grid
        "targets": "",  # folder of python -m fd_jax.targets: stored maps, and no teacher runs
        "eval_targets": "",  # the same of held-out pictures, made with --held_out
        "matmuls": "",  # "int8" or "float8_e4m3fn": numbers that its linear layers multiply
        "weight": 1.0,  # of its loss in the sum over the teachers
        "parts": 1,  # of a batch, one after another: more need less memory
        "target": {
            "kind": "full",
            "normalize": "whiten",
            "after_norm": True,
            "resample": "none",  # "bilinear": its map to the student's grid; "student": reverse
            "statistics": "",  # file of python -m fd_jax.target_stats, for a fitted normalisation
            "freeze_after": 1000,  # steps after which "standardize" keeps its statistics
            "blocks": (),  # or its blocks whose maps are all targets, counted from 0
        },
        "loss": {  # weights of the distances; 0: off
            "smooth_l1": 1.0,
            "mse": 0.0,
            "cosine": 0.0,
            "relation": 0.0,  # of the similarities between tokens
            "beta": 2.0,  # of smooth_l1
            "class_share": 0.0,  # of the class token; 0: the mean over all tokens
        },
        "projector": {
            "kind": "linear",  # or "mlp"
            "hidden": 0,  # channels of the "mlp"; 0: the teacher's width
            "separate": False,  # True: the class token has its own
        },
    }
    for name, value in fields.items():
        *outer, field = name.split("__")
        place = section
        for part in outer:
            place = place.get(part, {})
        if field not in place:
            raise ConfigError(f"a teacher has no field {name.replace('__', '.')}")
        place[field] = value
    return section


def several_teachers(teachers: Sequence[tuple[str, dict[str, Any]]], **student: Any) -> Config:
    """A run that distils several teachers into one student (docs/several_teachers.md).

    Args:
      teachers: the name and the section of each, see `teacher`.
      **student: the arguments of `distillation` that do not name its teacher.

    Raises:
      ConfigError: two teachers have one name.
    """
    names = [name for name, _ in teachers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"teachers {names}: {', '.join(twice)} occurs more than once; rename one")
    config = distillation(teacher="", **student)
    del config.teacher, config.target, config.loss_beta
    config.teachers = dict(teachers)
    config.dropping = {
        "rate": 0.0,  # > 0: probability that an image leaves out a teacher that is not the furthest
        "by": "image",  # or "running": which one is the furthest, by its loss there or on average
        "decay": 0.99,  # of the running losses
    }
    return config


def fine_tuning(
    *,
    drop_path: float,
    layer_decay: float,
    peak_lr: float,
    floor_lr: float,
    epochs: float = 100,
    warmup_epochs: float = 20,
    image_size: int = 224,
) -> Config:
    """Supervised fine-tuning of `init_from` with the original's recipe.

    See docs/reference.md#fine-tune-configs and docs/reference.md#table-7.

    Args:
      drop_path: rate of the last block.
      layer_decay: factor of the learning rate from one layer to the one below.
      peak_lr: highest learning rate, per 512 images.
      floor_lr: learning rate at the start of the warm-up and at the end, per 512 images.
      epochs: epochs of training, including the warm-up.
      warmup_epochs: epochs of warm-up.
      image_size: pixels on a side, in training and evaluation; position tables are resized.
    """
    config = common()
    config.epochs = float(epochs)
    config.model = {
        "family": "",  # and `arch`: a network with random weights; init_from has its own
        "arch": {},
        "classes": 1000,
        "trains": "all",  # or "head": a linear probe of a frozen encoder
        "head": "fresh",  # or "keep": the head of init_from
        "head_scale": 0.001,  # factor of a fresh head's initial weights
        "pooling": "mean_norm",  # or "norm_mean", "mean", "cls"
        "final_norm": False,  # True: keep the encoder's own final norm
        "untie_positions": True,  # copy a shared position bias into every block
        "freeze_blocks": 0,  # > 0: so many first blocks stay as they are, and the embedding
        "drop_path": drop_path,
    }
    _starts(config)
    config.mixing = {
        "mixup": 0.8,  # alpha of the Beta distribution; 0: off
        "cutmix": 1.0,
        "switch": 0.5,  # probability of cutmix if both are on
        "smoothing": 0.1,
        "erasing": 0.25,  # probability
    }
    config.reference_quirks = False  # True: evaluate as in docs/reference.md#quirk-eval-statistics
    config.eval.update(every=0, epochs=1.0, batches=0)
    config.data.update(
        image_size=image_size, interpolation="bicubic", rand_augment="rand-m9-mstd0.5-inc1"
    )
    config.optim.update(
        peak_lr=peak_lr,
        start_lr=floor_lr,
        min_lr=floor_lr,
        warmup_epochs=float(warmup_epochs),
        layer_decay=layer_decay,
        clip_norm=5.0,
    )
    return config


def swin_fine_tuning(
    *, drop_path: float, layer_decay: float, peak_lr: float, floor_lr: float, image_size: int = 224
) -> Config:
    """`fine_tuning` for a Swin: the final norm is kept, and the head reads the mean token after it.

    The head starts at the full scale of its initial weights (docs/reference.md#swin-init).
    The arguments are those of `fine_tuning`.
    """
    config = fine_tuning(
        drop_path=drop_path,
        layer_decay=layer_decay,
        peak_lr=peak_lr,
        floor_lr=floor_lr,
        image_size=image_size,
    )
    config.model.update(pooling="mean", final_norm=True, head_scale=1.0)
    return config


def clip_recipe(
    *,
    peak_lr: float,
    layer_decay: float,
    epochs: float,
    warmup_epochs: float,
    image_size: int = 224,
    batch_size: int = 2048,
) -> Config:
    """FT-CLIP: the direct fine-tuning recipe of Dong et al. 2022 (arXiv 2212.06138).

    Learning rates are absolute, whatever the batch, as its authors give them
    (docs/reference.md#ft-clip).
    """
    config = fine_tuning(
        drop_path=0.0,
        layer_decay=layer_decay,
        peak_lr=peak_lr,
        floor_lr=1e-6,
        epochs=epochs,
        warmup_epochs=warmup_epochs,
        image_size=image_size,
    )
    config.batch_size = batch_size
    config.ema_decay = 0.9998
    config.model.pooling = "norm_mean"
    config.mixing.update(mixup=0.0, cutmix=0.0)
    config.optim.update(lr_batch=config.batch_size, clip_norm=0.0)
    config.data.eval_resize = 1.0
    return config


def linear_probe(*, epochs: float, pooling: str = "cls", final_norm: bool = True) -> Config:
    """MAE's linear probe on a frozen encoder, which the paper follows.

    See docs/reference.md#linear-probe.

    Args:
      epochs: epochs of training; 90 for B, 50 for L.
      pooling: "cls" as in MAE, "mean_norm" as in the official code.
      final_norm: whether to apply the encoder's trained final norm; the official code drops it.
    """
    config = fine_tuning(drop_path=0.0, layer_decay=1.0, peak_lr=0.1, floor_lr=0.0, epochs=epochs)
    config.batch_size = 16384
    config.model.update(trains="head", pooling=pooling, final_norm=final_norm, head_scale=1.0)
    config.model.untie_positions = False
    config.mixing.update(mixup=0.0, cutmix=0.0, smoothing=0.0, erasing=0.0)
    config.data.update(rand_augment="", crop="single")
    config.optim.update(
        name="lars", lr_batch=256, weight_decay=0.0, clip_norm=0.0, warmup_epochs=10.0, lag=0
    )
    return config


def official_probe(config: Config) -> Config:
    """The probe that the official code runs by default (docs/reference.md#quirk-linear-probe)."""
    config.batch_size = 2048
    config.model.update(pooling="mean_norm", final_norm=False)
    config.optim.update(lr_batch=512, weight_decay=0.05, clip_norm=5.0, lag=1)
    return config


def segmentation(
    *,
    peak_lr: float,
    layer_decay: float,
    drop_path: float,
    channels: int,
    weight_decay: float = 0.05,
) -> Config:
    """Semantic segmentation of ADE20K with a UPerNet on `init_from` (docs/reference.md#ade20k).

    Args:
      peak_lr: learning rate, for the batch of 16.
      layer_decay: factor of the learning rate from one layer to the one below.
      drop_path: rate of the last block.
      channels: of the UPerNet.
      weight_decay: weight decay.
    """
    config = common()
    config.steps = 160_000
    config.batch_size = 16
    config.segment = {
        "family": "",  # and `arch`: an encoder with random weights; init_from has its own
        "arch": {},
        "classes": 150,
        "patch_size": 0,  # > 0: the kernel of patches is resized to this side
        "window": 0,  # > 0: side of the windows of a Swin V2 encoder, in tokens
        "untie_positions": True,  # copy a shared position bias into every block
        "drop_path": drop_path,
        "decoder": "upernet",  # or "linear": BatchNorm and a 1x1 convolution on the last map
        "channels": channels,
        "auxiliary_channels": 256,  # 0: no auxiliary head
        "auxiliary_weight": 0.4,  # of its loss
        "dropout": 0.1,  # probability of dropping a channel before the last convolution
        "trains": "all",  # or "head": the encoder is frozen
    }
    config.data = {
        "name": "ade20k",  # or "folders", or the TFDS name of pictures with masks
        "root": "ADEChallengeData2016",  # or of "folders": what holds `images` and `labels`
        "images": "images/{split}",  # of "folders", below `root`
        "labels": "annotations/{split}",
        "class_names": "",  # of "folders": a file below `root`, a name per line from stored 0 on
        "ignore": 255,  # stored label that is neither trained on nor counted
        "reduce_zero_label": True,  # a stored 0 is ignored too, and a stored k is class k - 1
        "split": "training",
        "eval_split": "validation",  # "" for none
        "data_dir": "",  # of TFDS
        "image_size": 512,  # side of a training crop, and of a window in evaluation
        "scale": (2048, 512),  # long and short side within which pictures are resized
        "ratio": (0.5, 2.0),  # of random factors of `scale` in training
        "max_share": 0.75,  # of one class in a crop, tried ten times
        "flip": True,
        "distort": True,  # the colours
        "threads": 16,  # decoding threads per worker process
        "workers": 0,  # worker processes; 0 decodes in this one
        "max_broken": 100,  # unreadable pictures that a process replaces before the run stops
    }
    config.eval = {
        "every": 16_000,  # steps; 0: every `epochs` epochs
        "epochs": 0.0,
        "batches": 0,  # 0: the whole split
        "mode": "slide",  # windows over the picture
        "stride": 341,  # pixels between windows
        "keep_best": "",  # figure whose best weights are kept in workdir/best, such as "miou"
        "scales": (1.0,),  # several: probabilities are averaged
        "flip": False,  # True: and over the mirror image
    }
    config.optim = {
        "name": "adamw",
        "peak_lr": peak_lr,  # rates are per `lr_batch` images, scaled to the batch size
        "lr_batch": 16,
        "warmup_steps": 1500,
        "warmup_factor": 1e-6,  # share of the rate in the first step
        "polynomial": "mmcv",  # or "mmengine": the rate falls from the end of the warm-up on
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "momentum": 0.9,  # for LARS
        "weight_decay": weight_decay,
        "decay_vectors": False,  # decay biases and norms too
        "decay_positions": True,  # decay absolute positions and class tokens, as the sources do
        "layer_decay": layer_decay,
        "clip_norm": 0.0,  # 0: no clipping
        "moments": "float32",  # or "bfloat16", "factored"
    }
    return config


def linear_segmentation(*, peak_lr: float = 1e-3, weight_decay: float = 1e-4) -> Config:
    """`segmentation` with a linear decoder on a frozen encoder, as DINOv2 measures its features.

    Args:
      peak_lr: learning rate, for the batch of 16.
      weight_decay: weight decay.
    """
    config = segmentation(
        peak_lr=peak_lr, layer_decay=1.0, drop_path=0.0, channels=1, weight_decay=weight_decay
    )
    config.steps = 40_000
    config.segment.update(decoder="linear", auxiliary_channels=0, dropout=0.0, trains="head")
    config.segment.untie_positions = False
    return config


def arguments(text: str, **defaults: str) -> dict[str, Any]:
    """Parses the "name=value,flag" after the colon of `--config=file.py:...`.

    Returns:
      The defaults, updated by `text`. "smoke" is always accepted and is False unless given.

    Raises:
      ConfigError: an unknown name.
    """
    values: dict[str, Any] = {"smoke": False, **defaults}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in values:
            raise ConfigError(
                f"config argument {name!r} is unknown; expected some of "
                f"{', '.join(sorted(values))}. Fields of the config are set by flags of their own, "
                "such as --config.optim.peak_lr=0.001"
            )
        values[name] = value or True
    return values


# Students of two blocks or so for 56 pixels. Those of a ViT, Swin and ConvNeXt end on the 4 x 4
# patches of the quickstart's teacher; a ResNet's stages make 2 x 2 tokens.
_SMOKE: dict[str, dict[str, Any]] = {
    "vit": {"patch_size": 14, "width": 64, "depth": 2, "heads": 2, "mlp_width": 128},
    "swin_v2": {
        "patch_size": 7,
        "embed_width": 32,
        "depths": [2, 1],
        "heads": [1, 2],
        "window": 4,
        "pretrained_windows": [0, 0],
    },
    "convnext": {"patch_size": 7, "widths": [32, 48], "depths": [1, 1]},
    "resnet": {
        "stem_widths": [64],
        "widths": [32, 48, 64, 96],
        "inner_widths": [8, 12, 16, 24],
        "depths": [1, 1, 1, 1],
    },
}


def shrink(config: Config) -> Config:
    """Shrinks a run to under a minute on a CPU: tiny student, quickstart's teacher and pictures.

    Everything else (loss, target, optimiser and code path) stays as in the experiment.
    `make quickstart-data` prepares the teacher and the pictures.
    """
    tiny = _SMOKE.get(config.student.family, _SMOKE["vit"])
    config.student.arch.update({**tiny, "image_size": 56})
    quickstart = {
        "path": "teachers/dinov2_vits14_onnx",
        "source": "",
        "image_size": 56,
        "stages": 0,
    }
    for section in config.teachers.values() if "teachers" in config else [config.teacher]:
        section.update(quickstart)
    config.data.update(name="photos", eval_split="test", data_dir="data", image_size=56, threads=2)
    config.update(batch_size=8, steps=20, log_every=5)
    config.eval.update(every=20, batches=2)
    config.checkpoint.every = 10
    config.optim.warmup_epochs = 0.05
    return config


def shrink_fine_tuning(config: Config) -> Config:
    """Shrinks a recipe to under a minute on a CPU: `init_from` on the digits at 56 pixels."""
    config.data.update(name="digits", eval_split="test", data_dir="data", image_size=56, threads=2)
    config.model.classes = 10
    config.update(batch_size=16, steps=20, log_every=5)
    config.eval.update(every=20, batches=2)
    config.checkpoint.every = 10
    config.optim.warmup_epochs = 0.05
    return config


def shrink_segmentation(config: Config) -> Config:
    """Shrinks a recipe to a minute on a CPU: `init_from` on pictures of digits, narrow decoders.

    `python -m fd_jax.data.prepare --name=digit_scenes --data_dir=data` prepares the pictures.
    """
    side = 64 if config.segment.window else 112  # what patches of 14 and of 16 pixels divide
    config.segment.update(classes=11, channels=64)
    config.segment.auxiliary_channels = min(config.segment.auxiliary_channels, 32)
    config.data.update(name="digit_scenes", root="", split="train", eval_split="test")
    config.data.update(data_dir="data", reduce_zero_label=False)
    config.data.update(image_size=side, scale=(4 * side, side), threads=2)
    config.update(batch_size=8, steps=20, log_every=5)
    config.eval.update(every=20, stride=2 * side // 3, batches=4)
    config.checkpoint.every = 10
    config.optim.warmup_steps = 5
    return config
