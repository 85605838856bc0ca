"""Every experiment config: values, schedule and decay against docs/reference.md."""

import importlib
import pathlib
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest

from configs import ablations, base, finetune_teacher
from fd_jax import optimizer, sharding
from fd_jax.errors import ConfigError
from fd_jax.models import spec as specs
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.tasks.distill import DistillTask
from fd_jax.tasks.segment import SegmentTask
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent
STEPS_PER_EPOCH = 625  # 1,281,167 images in full batches of 2,048

# name: source, patch, drop path, epochs, minimum crop area (docs/reference.md#pretrain-configs)
PAPER = {
    "distill_clip_vit_b16": ("openai_clip_vit_b16", 16, 0.2, 300, 0.08),
    "distill_clip_vit_b16_100ep": ("openai_clip_vit_b16", 16, 0.1, 100, 0.67),
    "distill_clip_vit_l14": ("openai_clip_vit_l14", 14, 0.3, 300, 0.08),
    "distill_dino_vit_b16": ("dino_vitb16", 16, 0.3, 300, 0.08),
    "distill_deit_vit_b16": ("deit_base_patch16_224", 16, 0.3, 300, 0.08),
    "distill_mae_vit_b16": ("mae_vit_base_pretrain", 16, 0.3, 300, 0.08),
}


# Networks of the Swin experiments (docs/reference.md#pretrain-configs).
SWIN_TEACHER = specs.ModelSpec(
    "swin", base.swin_v1(base.SWIN_B_W14, image_size=224), source="esvit_swin_base_w14"
)
SWIN_STUDENT = specs.ModelSpec(
    "swin_v2", base.swin_v2(base.SWIN_B_W14, image_size=224), source="distilled"
)
GIANT = specs.ModelSpec("swin_v2", base.swin_v2(base.SWIN_G, image_size=256), source="swinv2_giant")


def load(name, arg=""):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def task_for(config):
    """The task, with a teacher of the right shape and without weights."""
    shape = base.VIT_L14 if "l14" in config.teacher.source else base.VIT_B16
    arch = {**tiny.TEACHER, **shape, "image_size": 224}
    spec = specs.ModelSpec("vit", arch, source=config.teacher.source, classes=1000)
    return DistillTask(config, teacher_spec=spec)


# Shapes of student and projector: tracing the initialisation of a ViT-L takes seconds.
ABSTRACT_PARAMS = {}


def schedule_of(config):
    task = task_for(config)
    key = (config.student.arch.to_json(), task.goal.teacher.width)
    if key not in ABSTRACT_PARAMS:
        ABSTRACT_PARAMS[key] = jax.eval_shape(task.init, jax.random.key(0))[0]
    params = ABSTRACT_PARAMS[key]
    total = round(config.epochs * STEPS_PER_EPOCH)
    _, schedule = task.optimizer(params, steps_per_epoch=STEPS_PER_EPOCH, total_steps=total)
    return schedule, total


@pytest.mark.parametrize("name", PAPER)
def test_distillation_values_equal_the_papers(name):
    source, patch, drop_path, epochs, min_area = PAPER[name]
    config = load(name)
    assert config.teacher.source == source
    assert config.student.arch.patch_size == patch
    assert config.student.drop_path == drop_path
    assert config.teacher.drop_path == 0
    assert config.epochs == epochs
    assert config.data.min_area == min_area
    assert config.data.interpolation == "bilinear"
    assert config.batch_size == 2048
    assert config.student.arch.position == "shared_rpb"
    assert config.student.mask.keep == 1
    assert config.target.to_dict() == {
        "kind": "full",
        "normalize": "whiten",
        "after_norm": True,
        "resample": "none",
        "blocks": (),
    }
    assert config.loss_beta == 2.0
    optim = config.optim
    assert (optim.betas, optim.eps, optim.weight_decay) == ((0.9, 0.999), 1e-8, 0.05)
    assert optim.clip_norm == 3.0


@pytest.mark.parametrize("name", PAPER)
def test_schedule_equals_the_closed_form_at_its_milestones(name):
    """Against the closed form of docs/reference.md#lr-schedule, written out in float64."""
    schedule, total = schedule_of(load(name))
    warmup = 10 * STEPS_PER_EPOCH
    start, peak, minimum = 2e-6, 1.2e-3, 2e-5

    def expected(step):
        u = max(step - 1, 0)
        if u < warmup:
            return start + u * (peak - start) / warmup
        if u >= total:
            return minimum
        cosine = 1 + np.cos(np.pi * (u - warmup) / (total - warmup))
        return minimum + (peak - minimum) / 2 * cosine

    for step in (0, 1, 2, 625, warmup, warmup + 1, total // 2, total - 1, total, total + 1):
        np.testing.assert_allclose(schedule(step), expected(step), rtol=2e-6, atol=0)


def test_schedule_has_the_documented_spot_values():
    schedule, _ = schedule_of(load("distill_clip_vit_b16"))
    spots = {
        0: 2e-6,
        1: 2e-6,
        2: 2.19168e-6,
        625: 1.2160832e-4,
        6250: 1.19980832e-3,
        6251: 1.2e-3,
        93750: 6.419521674884e-4,
        187499: 2.00000003545e-5,
    }
    for step, value in spots.items():
        np.testing.assert_allclose(schedule(step), value, rtol=1e-6)


def test_weight_decay_applies_to_the_documented_parameters():
    """docs/reference.md#weight-decay: it applies to bias tables, but not to position embeddings."""
    config = load("distill_clip_vit_b16")
    params, _ = jax.eval_shape(task_for(config).init, jax.random.key(0))
    mask = optimizer.decay_mask(params, specs.FAMILIES["vit"].NO_DECAY)
    flat = {
        optimizer.path_name(path): decays
        for path, decays in jax.tree_util.tree_leaves_with_path(mask)
    }
    assert len(flat) == 188
    expected = {"encoder/patch_embed/kernel", "encoder/rel_pos_bias/table", "projector/kernel"}
    for block in range(12):
        at = f"encoder/blocks/{block}"
        expected |= {f"{at}/attn/qkv/kernel", f"{at}/attn/proj/kernel"}
        expected |= {f"{at}/mlp/fc1/kernel", f"{at}/mlp/fc2/kernel"}
    assert {name for name, decays in flat.items() if decays} == expected


def test_large_student_has_the_published_number_of_tensors():
    params, _ = jax.eval_shape(task_for(load("distill_clip_vit_l14")).init, jax.random.key(0))
    assert len(jax.tree.leaves(params)) == 368


# name: patch, epochs, warm-up, drop path, layer decay, peak and floor at 2048
# (docs/reference.md#fine-tune-configs)
FINE_TUNING = {
    "finetune_clip_vit_b16_100ep": (16, 100, 20, 0.1, 0.65, 5e-3, 1e-6),
    "finetune_clip_vit_b16": (16, 100, 20, 0.3, 0.60, 5e-3, 1e-6),
    "finetune_dino_vit_b16": (16, 100, 20, 0.2, 0.60, 6e-3, 1e-6),
    "finetune_deit_vit_b16": (16, 100, 20, 0.3, 0.65, 5e-3, 1e-6),
    "finetune_clip_vit_l14": (14, 50, 5, 0.4, 0.75, 1e-3, 2e-6),
}
# name: image size, batch, epochs, warm-up, layer decay, absolute peak (docs/reference.md#ft-clip)
FT_CLIP = {
    "ft_clip_vit_b16": (224, 2048, 50, 10, 0.6, 6e-4),
    "ft_clip_vit_b16_384": (384, 2048, 50, 10, 0.6, 7e-4),
    "ft_clip_vit_l14": (224, 2048, 30, 5, 0.65, 4e-4),
    "ft_clip_vit_l14_336": (336, 640, 30, 5, 0.65, 6e-4),
}


def classifier_for(config, patch=16):
    """(task, schedule, total steps), with a network of the right shape and without weights."""
    shape = base.VIT_L14 if patch == 14 else base.VIT_B16
    arch = base.student(shape, image_size=224)
    task = ClassifyTask(config, init_spec=specs.ModelSpec("vit", arch, source="distilled"))
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    total = round(config.epochs * STEPS_PER_EPOCH)
    _, schedule = task.optimizer(params, steps_per_epoch=STEPS_PER_EPOCH, total_steps=total)
    return task, schedule, total


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_values_equal_the_originals(name):
    patch, epochs, warmup, drop_path, decay, peak, floor = FINE_TUNING[name]
    config = load(name)
    task, schedule, total = classifier_for(config, patch)
    assert (config.epochs, config.model.drop_path) == (epochs, drop_path)
    assert (config.optim.layer_decay, config.optim.weight_decay) == (decay, 0.05)
    assert (config.optim.clip_norm, config.batch_size) == (5.0, 2048)
    assert config.mixing.to_dict() == {
        "mixup": 0.8,
        "cutmix": 1.0,
        "switch": 0.5,
        "smoothing": 0.1,
        "erasing": 0.25,
    }
    assert config.data.rand_augment == "rand-m9-mstd0.5-inc1"
    assert (config.data.interpolation, config.data.min_area) == ("bicubic", 0.08)
    assert not config.reference_quirks
    assert task.spec.arch["position"] == "rpb"
    assert not task.spec.arch["final_norm"]
    steps = warmup * STEPS_PER_EPOCH
    for step, rate in ((0, floor), (1, floor), (steps + 1, peak), (total + 1, floor)):
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-6)


def test_rates_of_the_lowest_layers_of_the_large_model_fall_in_warm_up():
    """Their scaled peak is below the unscaled floor (docs/reference.md#quirk-lr-floors)."""
    _, schedule, _ = classifier_for(load("finetune_clip_vit_l14"), 14)
    scale = 0.75**25
    np.testing.assert_allclose(1e-3 * scale, 7.53e-7, rtol=1e-3)
    assert schedule(3000, scale) < schedule(0, scale)


@pytest.mark.parametrize("name", FT_CLIP)
def test_ft_clip_values_equal_its_authors(name):
    size, batch, epochs, warmup, decay, peak = FT_CLIP[name]
    config = load(name)
    _, schedule, total = classifier_for(config, 14 if "l14" in name else 16)
    assert (config.data.image_size, config.batch_size, config.epochs) == (size, batch, epochs)
    assert (config.optim.layer_decay, config.optim.clip_norm) == (decay, 0)
    assert (config.ema_decay, config.model.drop_path) == (0.9998, 0)
    assert (config.mixing.mixup, config.mixing.cutmix) == (0, 0)
    assert (config.mixing.smoothing, config.mixing.erasing) == (0.1, 0.25)
    assert (config.data.eval_resize, config.model.pooling) == (1.0, "norm_mean")
    steps = warmup * STEPS_PER_EPOCH
    for step, rate in ((0, 1e-6), (steps + 1, peak), (total + 1, 1e-6)):
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-6)


@pytest.mark.parametrize("name,epochs", [("linear_vit_b16", 90), ("linear_vit_l14", 50)])
def test_probe_values_equal_those_of_mae(name, epochs):
    config = load(name)
    _, schedule, total = classifier_for(config)
    assert (config.batch_size, config.epochs, config.model.trains) == (16384, epochs, "head")
    assert (config.optim.name, config.optim.momentum) == ("lars", 0.9)
    assert (config.optim.weight_decay, config.optim.clip_norm) == (0, 0)
    assert (config.model.pooling, config.data.rand_augment) == ("cls", "")
    for step, rate in ((0, 0.0), (10 * STEPS_PER_EPOCH, 6.4), (total, 0.0)):
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-6, atol=1e-12)
    official = load(name, "official")
    _, schedule, _ = classifier_for(official)
    np.testing.assert_allclose(schedule(10 * STEPS_PER_EPOCH + 1), 0.4, rtol=1e-6)
    assert (official.optim.weight_decay, official.optim.clip_norm) == (0.05, 5.0)


@pytest.mark.parametrize(
    "name,arg",
    [
        ("finetune_mae_vit_b16", ""),
        *(("finetune_teacher", f"teacher={name}") for name in finetune_teacher.TEACHERS),
        ("finetune_clip_vit_l14_336", "stage=22k"),
        ("finetune_clip_vit_l14_336", "stage=1k"),
    ],
)
def test_other_fine_tuning_configs_define_a_task(name, arg):
    config = load(name, arg)
    task, _, _ = classifier_for(config, 14 if "_l" in name + arg else 16)
    assert task.spec.classes == (21841 if "22k" in arg else 1000)
    assert task.spec.arch["image_size"] == (336 if arg == "stage=1k" else 224)


@pytest.mark.parametrize("name", [*FINE_TUNING, *FT_CLIP, "linear_vit_b16", "finetune_teacher"])
def test_fine_tuning_configs_have_a_smoke_version(name):
    config = load(name, "smoke")
    assert (config.data.name, config.model.classes, config.steps) == ("digits", 10, 20)


@pytest.mark.parametrize("table", ablations.TABLES)
def test_ablation_rows_change_only_what_they_list(table):
    default = {"2": "full", "3": "whiten", "4": "shared_rpb", "5": "0.1"}[table]
    reference = load("ablations", f"table={table},row={default},teacher=clip")
    for row, changes in ablations.TABLES[table].items():
        config = load("ablations", f"table={table},row={row},teacher=clip")
        for field, value in changes.items():
            assert ml_collections.ConfigDict(config.to_dict())[field.split(".")[0]]
            node = config
            for part in field.split("."):
                node = node[part]
            assert node == value
        assert (config.to_dict() == reference.to_dict()) == (row == default)
        task_for(config)


@pytest.mark.parametrize("teacher,source,rate", [("dino", "dino_vitb16", 0.2)])
def test_ablations_use_the_best_drop_path_of_their_teacher(teacher, source, rate):
    config = load("ablations", f"table=2,row=cls,teacher={teacher}")
    assert (config.teacher.source, config.student.drop_path) == (source, rate)


@pytest.mark.parametrize(
    "name,arg", [("finetune_teacher", "teacher=vgg"), ("finetune_clip_vit_l14_336", "stage=21k")]
)
def test_unknown_config_arguments_are_refused(name, arg):
    with pytest.raises(ValueError, match="expected one of"):
        load(name, arg)


@pytest.mark.parametrize("arg", ["table=9,row=x", "table=2,row=x", "teacher=vgg", "colour=red"])
def test_unknown_ablations_are_refused(arg):
    with pytest.raises(ValueError, match="expected"):
        load("ablations", arg)


def rates(task, config, steps_per_epoch):
    """Learning rates at the start, the peak and the end of the schedule."""
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    total = round(config.epochs * steps_per_epoch)
    _, schedule = task.optimizer(params, steps_per_epoch=steps_per_epoch, total_steps=total)
    peak = round(config.optim.warmup_epochs) * steps_per_epoch + 1
    return [float(schedule(step)) for step in (0, peak, total + 1)]


def test_esvit_distillation_values_equal_the_originals():
    config = load("distill_esvit_swin_b")
    task = DistillTask(config, teacher_spec=SWIN_TEACHER)
    assert (config.epochs, config.student.drop_path, config.data.min_area) == (300, 0.3, 0.08)
    assert (task.student.grid, task.student.width) == ((7, 7), 1024)
    assert (task.goal.teacher.grid, task.goal.teacher.width, task.cls) == ((7, 7), 1024, False)
    assert (task.goal.teacher.spec.arch["norm_eps"], task.student_spec.arch["norm_eps"]) == (
        1e-5,
        1e-5,
    )
    np.testing.assert_allclose(rates(task, config, STEPS_PER_EPOCH), [4e-6, 8e-4, 4e-5], rtol=1e-6)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    assert len(jax.tree.leaves(params)) == 425
    encoder = sum(leaf.size for leaf in jax.tree.leaves(params["encoder"]))
    assert encoder == 86_893_816  # docs/reference.md#parameter-counts


def test_a_vit_student_predicts_the_third_stage_of_esvit():
    config = load("distill_esvit_vit_b16")
    task = DistillTask(config, teacher_spec=SWIN_TEACHER)
    assert (task.goal.teacher.grid, task.goal.teacher.width) == ((14, 14), 512)
    assert (task.student.grid, task.student.cls, task.cls) == ((14, 14), 1, False)
    shape = jax.eval_shape(
        task.predict, jax.eval_shape(task.init, jax.random.key(0))[0], tiny.batch(2, side=224)
    ).shape
    assert shape == (2, 196, 512)


def test_esvit_fine_tuning_values_equal_the_originals():
    """Learning rates for the original's batch of 1024, with 1251 steps per epoch."""
    config = load("finetune_esvit_swin_b")
    task = ClassifyTask(config, init_spec=SWIN_STUDENT)
    assert (config.batch_size, config.epochs, config.optim.warmup_epochs) == (1024, 100, 20)
    assert (config.model.drop_path, config.optim.layer_decay) == (0.4, 0.8)
    assert (config.model.head_scale, config.model.pooling) == (1.0, "mean")
    assert task.spec.arch["final_norm"]
    np.testing.assert_allclose(rates(task, config, 1251), [5e-7, 2.5e-3, 5e-7], rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["distill_esvit_swin_b", "distill_esvit_vit_b16", "distill_swinv2_g"]
)
def test_swin_distillations_have_a_smoke_version(name):
    """The smoke version uses the quickstart's teacher: 4 x 4 patches at 56 pixels."""
    arch = {**tiny.TEACHER, "image_size": 56, "patch_size": 14}
    config = load(name, "smoke")
    task = DistillTask(config, teacher_spec=specs.ModelSpec("vit", arch, source="quickstart"))
    assert task.student.grid == task.goal.teacher.grid == (4, 4)
    assert config.steps == 20


@pytest.mark.parametrize(
    ("name", "grid"), [("distill_resnet50", (2, 2)), ("distill_convnextv2_tiny", (4, 4))]
)
def test_students_of_convolutions_meet_the_map_of_their_teacher(name, grid):
    """At 224 pixels the student has 7 x 7 tokens, to which the teacher's 16 x 16 are resized."""
    arch = {**tiny.TEACHER, **base.VIT_B16, "patch_size": 14}
    teacher = specs.ModelSpec("vit", {**arch, "image_size": 518}, source="dinov2_vitb14")
    task = DistillTask(load(name), teacher_spec=teacher)
    assert (task.student.grid, task.goal.teacher.grid) == ((7, 7), (16, 16))
    assert (task.goal.grid, task.cls) == ((7, 7), False)
    small = {**tiny.TEACHER, "image_size": 56, "patch_size": 14}
    spec = specs.ModelSpec("vit", small, source="quickstart")
    task = DistillTask(load(name, "smoke"), teacher_spec=spec)
    assert (task.student.grid, task.goal.teacher.grid) == (grid, (4, 4))


def test_a_linear_probe_of_a_swin_pools_the_mean_after_its_norm():
    task = ClassifyTask(load("linear_swin_b"), init_spec=SWIN_STUDENT)
    assert task.spec.arch["final_norm"] and task.spec.pooling == "mean"
    params, extra = jax.eval_shape(task.init, jax.random.key(0))
    assert set(params) == {"head"} and extra["mean"].shape == (1024,)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distill_swinv2_g", "finetune_swinv2_g"])
def test_giant_configs_have_the_published_size(name):
    """3.0 billion parameters, as published by its authors, from shapes alone."""
    config = load(name)
    if name.startswith("distill"):
        task = DistillTask(config, teacher_spec=GIANT)
        assert (task.goal.teacher.grid, task.goal.teacher.width) == ((8, 8), 4096)
    else:
        task = ClassifyTask(config, init_spec=GIANT)
        assert task.spec.arch["image_size"] == 256
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params["encoder"])) == 2_997_843_680
    mesh = jax.sharding.AbstractMesh((2, 16, 4), sharding.AXES)
    placed = sharding.param_shardings(params, mesh)
    sizes = [
        np.prod(place.shard_shape(leaf.shape))
        for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(placed), strict=True)
    ]
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))
    # Patch merging is split 16 ways, vectors and bias networks are replicated, the rest is split
    # 64 ways.
    assert sum(sizes) < 1.15 * whole / 64


# name: encoder's shape, rate, layer decay, drop path, weight decay, channels
# (docs/reference.md#ade20k-training)
SEGMENTATION = {
    "segment_clip_vit_b16": ("b", 4e-4, 0.65, 0.2, 0.05, 768),
    "segment_dino_vit_b16": ("b", 4e-4, 0.65, 0.2, 0.05, 768),
    "segment_deit_vit_b16": ("b", 4e-4, 0.65, 0.2, 0.05, 768),
    "segment_clip_vit_l14": ("l", 1e-4, 0.75, 0.4, 0.05, 1024),
    "segment_mae_vit_b16": ("b", 1e-4, 0.65, 0.1, 0.05, 768),
    "segment_beit_b16": ("b", 3e-5, 0.9, 0.1, 0.05, 768),
    "segment_esvit_swin_b": ("swin", 6e-5, 1.0, 0.3, 0.01, 512),
}
STUDENTS = {
    "b": specs.ModelSpec("vit", base.student(base.VIT_B16, image_size=224), source="distilled"),
    "l": specs.ModelSpec("vit", base.student(base.VIT_L14, image_size=224), source="distilled"),
    "swin": SWIN_STUDENT,
}


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation_values_equal_the_papers(name):
    shape, peak, layer_decay, drop_path, weight_decay, channels = SEGMENTATION[name]
    config = load(name)
    task = SegmentTask(config, init_spec=STUDENTS[shape])
    assert (config.steps, config.batch_size, config.data.image_size) == (160_000, 16, 512)
    assert (config.optim.layer_decay, config.segment.drop_path) == (layer_decay, drop_path)
    assert (config.optim.weight_decay, config.optim.clip_norm) == (weight_decay, 0)
    assert (config.segment.channels, config.segment.auxiliary_channels) == (channels, 256)
    assert (config.segment.dropout, config.segment.auxiliary_weight) == (0.1, 0.4)
    assert task.encoder.image_size == 512
    grids = task.encoder.grids if shape == "swin" else task.encoder.grid
    assert grids == ((128, 64, 32, 16) if shape == "swin" else (32, 32))
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    _, schedule = task.optimizer(params, steps_per_epoch=1263, total_steps=160_000)
    for number, rate in ((0, 1e-6 * peak), (1500, peak * (1 - 1500 / 160_000)), (160_000, 0)):
        np.testing.assert_allclose(schedule(number), rate, rtol=1e-6)


@pytest.mark.parametrize("name", [*SEGMENTATION, "segment_linear_vit_b16", "segment_swinv2_g"])
def test_segmentation_configs_have_a_smoke_version(name):
    config = load(name, "smoke")
    assert (config.data.name, config.segment.classes, config.steps) == ("digit_scenes", 11, 20)
    shape = SEGMENTATION.get(name, ["b" if "vit" in name else "swin"])[0]
    if name != "segment_swinv2_g":
        side = 64 if shape == "swin" else 112
        assert SegmentTask(config, init_spec=STUDENTS[shape]).encoder.image_size == side


def run_train(*flags):
    return subprocess.run(
        [sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "flags,message",
    [
        pytest.param(
            ["--num_processes=2", "--process_id=0"],
            "add --coordinator=HOST:PORT",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--coordinator=localhost:1", "--num_processes=2"],
            "--process_id from 0 to N - 1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--distributed"],
            "jax.distributed cannot detect the other processes",
            marks=pytest.mark.slow,
        ),
        (["--config.colour=red"], "no field colour; configs/base.py"),
        (["--config.lr=1"], "no field lr; there is optim.lr_batch, optim.min_lr, optim.peak_lr"),
        pytest.param(
            ["--config.student.famly=vit"],
            "no field famly; did you mean family? configs/base.py",
            marks=pytest.mark.slow,
        ),
        pytest.param(["--config.batch_size=many"], "batch_size", marks=pytest.mark.slow),
        pytest.param(
            ["--config.dtype=float16"], "dtype='float16' is unknown", marks=pytest.mark.slow
        ),
        (["--config.teacher.path=nowhere"], "no model folder at nowhere"),
    ],
)
def test_a_wrong_flag_gives_one_clear_error(flags, message):
    result = run_train("--config=configs/quickstart.py", "--workdir=/nonexistent/x", *flags)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_workdir_flag_is_named():
    result = run_train("--config=configs/quickstart.py")
    assert result.returncode == 2
    assert "--workdir is missing" in result.stderr


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"student.arch.patch_size": 15}, "224 is not divisible by patch_size 15"),
        ({"student.arch.patch_size": 32}, r"grid \(14, 14\) != student grid \(7, 7\).*to 112"),
        ({"data.image_size": 192}, "data.image_size=192"),
        ({"target.kind": "pooled"}, "target.kind='pooled'"),
        ({"target.normalize": "batch"}, "target.normalize='batch'"),
        ({"target.resample": "cubic"}, "target.resample='cubic'"),
        ({"teacher.stages": 3}, "teacher.stages=3, but the teacher is a vit, without stages"),
        ({"student.arch.activation": "tanh"}, "activation='tanh'"),
        ({"student.arch.position": "sine"}, "position='sine'"),
        ({"student.arch.cls_token": False, "target.kind": "cls"}, "class token on both sides"),
        ({"remat": "all"}, "remat='all'"),
    ],
)
def test_impossible_combinations_are_refused_with_numbers(changes, message):
    config = load("distill_clip_vit_b16")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
        task_for(config)


def test_logits_of_a_teacher_without_a_head_are_refused():
    config = load("ablations", "table=2,row=logits,teacher=clip")
    arch = {**tiny.TEACHER, "image_size": 224, **base.VIT_B16}
    with pytest.raises(ConfigError, match="needs a teacher with a classifier head"):
        DistillTask(config, teacher_spec=specs.ModelSpec("vit", arch, source="clip"))
