"""Toy-sized models, configs and batches: real ones, which take seconds on a CPU."""

from flax import nnx
import jax
import numpy as np

from configs import base
from fd_jax import model_folder
from fd_jax.data import elements
from fd_jax.models import spec as specs

TEACHER = {
    "image_size": 32,
    "patch_size": 8,
    "width": 48,
    "depth": 2,
    "heads": 4,
    "mlp_width": 96,
    "position": "ape",
    "cls_token": True,
    "registers": 0,
    "ln_pre": False,
    "final_norm": True,
    "activation": "gelu_erf",
    "norm_eps": 1e-6,
    "layer_scale": None,
    "qkv_bias": "qkv",
    "patch_bias": True,
}
# Grids of 8, 4 and 2 with windows of 4: the first stage shifts windows, the second has one window,
# and the third is smaller than a window.
SWIN = {"patch_size": 4, "embed_width": 16, "depths": (2, 1, 1), "heads": (2, 2, 4), "window": 4}
STUDENT = {"patch_size": 8, "width": 32, "depth": 2, "heads": 4, "mlp_width": 64}


def randomize(tree, seed, scale=0.3):
    """Adds noise to every array of a tree, so that no bias or scale keeps its neutral value."""
    rng = np.random.default_rng(seed)
    leaves, treedef = jax.tree.flatten(tree)
    drawn = [
        (np.asarray(leaf) + scale * rng.normal(size=leaf.shape)).astype(np.float32)
        for leaf in leaves
    ]
    return jax.tree.unflatten(treedef, drawn)


def teacher_spec(**arch):
    return specs.ModelSpec("vit", {**TEACHER, **arch}, source="tiny")


def save_teacher(folder, *, classes=0, **arch):
    """Writes a model folder with random weights, and with a classifier head if `classes` is set."""
    _, encoder = specs.split(teacher_spec(**arch).build(rngs=nnx.Rngs(7)))
    parts = {"encoder": randomize(encoder, 1)}
    spec = teacher_spec(**arch)
    if classes:
        rng = np.random.default_rng(2)
        parts["head"] = {
            "kernel": rng.normal(size=(spec.arch["width"], classes)).astype(np.float32),
            "bias": rng.normal(size=classes).astype(np.float32),
        }
        spec = specs.ModelSpec("vit", spec.arch, source="tiny", classes=classes)
    model_folder.save(folder, spec, parts)
    return str(folder)


def swin_spec(version=1, **arch):
    defaults = (base.swin_v1 if version == 1 else base.swin_v2)(SWIN, image_size=32)
    if version == 2:
        defaults["residual_scale"] = 0.5  # with the original's 1e-5, blocks would have no effect
    family = "swin" if version == 1 else "swin_v2"
    return specs.ModelSpec(family, {**defaults, **arch}, source="tiny")


def save_swin(folder, version=1, **arch):
    """Writes the model folder of a Swin network with random weights."""
    spec = swin_spec(version, **arch)
    encoder = jax.tree.map(lambda leaf: np.zeros(leaf.shape), spec.abstract()[1])
    model_folder.save(folder, spec, {"encoder": randomize(encoder, 1)})
    return str(folder)


def swin_config(teacher="", **fields):
    """`config` with a SwinV2 student."""
    result = config(teacher)
    result.student.family = "swin_v2"
    result.student.arch = swin_spec(2).arch
    result.update_from_flattened_dict(fields)
    return result


def config(teacher="", **fields):
    """A toy-sized distillation config; `fields` maps dotted names of fields to values."""
    result = base.distillation(teacher="tiny", drop_path=0.2)
    result.student.arch.update({**STUDENT, "image_size": 32})
    result.teacher.path = teacher
    result.data.update(name="photos", eval_split="test", image_size=32, threads=2)
    result.update(batch_size=16, steps=6, log_every=1)
    result.profile_steps = 1
    result.checkpoint.every = 2
    result.eval.update(every=6, batches=2)
    result.optim.update(peak_lr=1e-3, lr_batch=16, warmup_epochs=0.01)
    result.update_from_flattened_dict(fields)
    return result


def several(teachers, **fields):
    """A toy-sized config of several teachers: (name, section) pairs; `fields` as in `config`."""
    result = config()
    several = base.several_teachers(teachers, drop_path=0.2)
    del result.teacher, result.target, result.loss_beta
    result.teachers, result.dropping = several.teachers, several.dropping
    result.update_from_flattened_dict(fields)
    return result


def batch(size=16, side=32, seed=0):
    """A host batch of random images."""
    rng = np.random.default_rng(seed)
    specified = elements.of_batch(elements.labelled_image(side))
    result = elements.stack([elements.padding(specified)] * size, specified)
    result["image"][:] = rng.integers(0, 256, (size, side, side, 3), dtype=np.uint8)
    result["weight"][:] = 1
    result["index"][:] = np.arange(size)
    return result


def save_student(folder, seed=5, **arch):
    """Writes the model folder of a student and its projector, with random weights."""
    arch = {**base.student(STUDENT, image_size=32), **arch}
    spec = specs.ModelSpec("vit", arch, source="distilled")
    _, encoder = specs.split(spec.build(rngs=nnx.Rngs(seed)))
    width = STUDENT["width"]
    projector = {"kernel": np.ones((width, 48), np.float32), "bias": np.ones(48, np.float32)}
    parts = {"encoder": randomize(encoder, seed, scale=0.1), "projector": projector}
    model_folder.save(folder, spec, parts)
    return str(folder)


def fine_tuning(init_from="", **fields):
    """A toy-sized fine-tuning config on the digits; `fields` as in `config`."""
    result = base.fine_tuning(drop_path=0.2, layer_decay=0.65, peak_lr=1e-3, floor_lr=1e-5)
    result.init_from = init_from
    result.model.classes = 10
    result.data.update(name="digits", eval_split="test", image_size=32, threads=2)
    result.update(batch_size=16, steps=4, log_every=1)
    result.checkpoint.every = 2
    result.eval.update(every=4, batches=2)
    result.optim.update(lr_batch=16, warmup_epochs=0.01)
    result.update_from_flattened_dict(fields)
    return result


def labelled_batch(size=16, side=32, classes=10, seed=0):
    """A host batch of random images with random labels."""
    rng = np.random.default_rng(seed + 100)
    label = rng.integers(0, classes, size).astype(np.int32)
    return {**batch(size, side, seed), "label": label}


def segmentation(init_from="", **fields):
    """A toy-sized segmentation config without data; `fields` as in `config`."""
    result = base.segmentation(peak_lr=1e-3, layer_decay=0.65, drop_path=0.2, channels=8)
    result.init_from = init_from
    result.segment.update(classes=5, auxiliary_channels=6)
    result.data.update(name="folders", root="nowhere", image_size=32, scale=(64, 32), threads=2)
    result.update(batch_size=8, steps=4, log_every=1)
    result.checkpoint.every = 2
    result.eval.update(every=4, stride=21)
    result.optim.update(lr_batch=8, warmup_steps=2, warmup_factor=0.1)
    result.update_from_flattened_dict(fields)
    return result


def segmented_batch(size=8, side=32, classes=5, seed=0):
    """A host batch of random images with random masks, a quarter of whose pixels is ignored."""
    rng = np.random.default_rng(seed + 200)
    mask = rng.integers(0, classes, (size, side, side)).astype(np.uint8)
    mask[rng.random(mask.shape) < 0.25] = 255
    images = batch(size, side, seed)
    del images["label"]
    return {**images, "mask": mask}
