"""Every experiment file: its values against the reference tables, its schedule, its decay."""

import importlib
import pathlib
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest

from configs import ablations, base
from fd_jax import optimizer
from fd_jax.errors import ConfigError
from fd_jax.models import spec as specs
from fd_jax.tasks.distill import DistillTask
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent
STEPS_PER_EPOCH = 625  # 1,281,167 images in batches of 2,048, the rest dropped

# name: source, patch, drop path, epochs, minimum crop area (reference section 3)
PAPER = {
    "distill_clip_vit_b16": ("openai_clip_vit_b16", 16, 0.2, 300, 0.08),
    "distill_clip_vit_b16_100ep": ("openai_clip_vit_b16", 16, 0.1, 100, 0.67),
    "distill_clip_vit_l14": ("openai_clip_vit_l14", 14, 0.3, 300, 0.08),
    "distill_dino_vit_b16": ("dino_vitb16", 16, 0.3, 300, 0.08),
    "distill_deit_vit_b16": ("deit_base_patch16_224", 16, 0.3, 300, 0.08),
    "distill_mae_vit_b16": ("mae_vit_base_pretrain", 16, 0.3, 300, 0.08),
}


def load(name, arg=""):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def task_for(config):
    """The task with a teacher of the right shape, without its weights."""
    shape = base.VIT_L14 if "l14" in config.teacher.source else base.VIT_B16
    arch = {**tiny.TEACHER, **shape, "image_size": 224}
    spec = specs.ModelSpec("vit", arch, source=config.teacher.source, classes=1000)
    return DistillTask(config, teacher_spec=spec)


def schedule_of(config):
    task = task_for(config)
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    total = round(config.epochs * STEPS_PER_EPOCH)
    _, schedule = task.optimizer(params, steps_per_epoch=STEPS_PER_EPOCH, total_steps=total)
    return schedule, total


@pytest.mark.parametrize("name", PAPER)
def test_values_are_the_papers(name):
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
    assert config.target.to_dict() == {"kind": "full", "normalize": "whiten", "after_norm": True}
    assert config.loss_beta == 2.0
    optim = config.optim
    assert (optim.betas, optim.eps, optim.weight_decay) == ((0.9, 0.999), 1e-8, 0.05)
    assert optim.clip_norm == 3.0


@pytest.mark.parametrize("name", PAPER)
def test_schedule_at_its_milestones(name):
    """Against the closed form of reference section 3, written out in float64."""
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


def test_schedule_has_the_published_spot_values():
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


def test_weight_decay_of_every_parameter():
    """Reference section 3: vectors, class token and position table spared, bias tables decayed."""
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


@pytest.mark.parametrize("table", ablations.TABLES)
def test_ablation_rows_differ_where_they_say(table):
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
def test_ablations_take_the_best_drop_path_of_their_teacher(teacher, source, rate):
    config = load("ablations", f"table=2,row=cls,teacher={teacher}")
    assert (config.teacher.source, config.student.drop_path) == (source, rate)


@pytest.mark.parametrize("arg", ["table=9,row=x", "table=2,row=x", "teacher=vgg", "colour=red"])
def test_unknown_ablations_are_refused(arg):
    with pytest.raises(ValueError, match="expected"):
        load("ablations", arg)


def run_train(*flags):
    return subprocess.run(
        [sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--config.colour=red"], "colour"),
        (["--config.batch_size=many"], "batch_size"),
        (["--config.dtype=float16"], "dtype='float16' is unknown"),
        (["--config.teacher.path=nowhere"], "no model folder at nowhere"),
    ],
)
def test_a_wrong_flag_is_one_clear_message(flags, message):
    result = run_train("--config=configs/quickstart.py", "--workdir=/nonexistent/x", *flags)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_flags_are_named():
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
        ({"student.arch.activation": "relu"}, "activation='relu'"),
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


def test_logits_without_a_head_are_refused():
    config = load("ablations", "table=2,row=logits,teacher=clip")
    arch = {**tiny.TEACHER, "image_size": 224, **base.VIT_B16}
    with pytest.raises(ConfigError, match="needs a teacher with a classifier head"):
        DistillTask(config, teacher_spec=specs.ModelSpec("vit", arch, source="clip"))
