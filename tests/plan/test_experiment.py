"""Defining tasks without weights or data, slices by name, bounds and command errors."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from configs import base, distill_clip_dinov2_vit_b16
from fd_jax import sharding
from fd_jax.cost import hardware
from fd_jax.errors import ConfigError, ConversionError
from fd_jax.plan import bounds, compiled, duration, experiment, table, topology
from fd_jax.tasks import registry
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_a_distillation_is_defined_without_its_teachers_weights():
    config = base.distillation(teacher="openai_clip_vit_l14", shape=base.VIT_L14, drop_path=0.1)
    planned = experiment.define(config)
    assert planned.networks == (("teacher", "converter source openai_clip_vit_l14"),)
    assert planned.task.goal.teacher.width == 1024
    assert planned.config.dtype == "bfloat16"
    # 1,281,167 images in full batches of 2,048, for 300 epochs
    assert (planned.steps_per_epoch, planned.total_steps) == (625, 187_500)


def test_the_spec_of_an_existing_teacher_folder_is_read(teacher):
    config = tiny.config(teacher, **{"teacher.source": "tiny"})
    planned = experiment.define(config)
    assert planned.networks == (("teacher", teacher),)
    assert planned.task.goal.teacher.width == tiny.TEACHER["width"]
    assert (planned.total_steps, planned.examples) == (6, None)


def test_two_teachers_are_defined_without_their_weights():
    config = distill_clip_dinov2_vit_b16.get_config()
    planned = experiment.define(config)
    assert planned.networks == (
        ("teacher clip", "converter source openai_clip_vit_b16"),
        ("teacher dinov2", "converter source dinov2_vitb14"),
    )
    grids = {name: goal.teacher.grid for name, goal in planned.task.goals.each.items()}
    assert grids == {"clip": (14, 14), "dinov2": (16, 16)}
    with config.unlocked():
        config.teachers.dinov2.update(source="", path="nowhere")
    with pytest.raises(ConfigError, match="no teacher dinov2 at nowhere.*teachers.dinov2.source"):
        experiment.define(config)


def test_fine_tuning_starts_from_a_config_a_source_or_random_weights():
    config = base.fine_tuning(drop_path=0.2, layer_decay=0.65, peak_lr=1e-3, floor_lr=1e-6)
    student = experiment.define(config, start=str(ROOT / "configs/distill_clip_vit_l14.py"))
    assert student.task.spec.arch["width"] == 1024
    assert student.task.spec.arch["position"] == "rpb"  # untied, as fine-tuning does
    public = experiment.define(config, start="openai_clip_vit_b16")
    assert public.task.spec.arch["activation"] == "quick_gelu"
    config.model.family = "vit"
    config.model.arch = base.student(base.VIT_B16, image_size=224)
    assert experiment.define(config).networks == (("starts from", "random weights"),)


def test_the_largest_of_several_sizes_is_planned():
    fields = {"data.sizes": (112, 224), "teacher.follow": True, "steps": 100}
    fields["optim.warmup_epochs"] = 0.01
    config = base.distillation(teacher="openai_clip_vit_b16", drop_path=0.1)
    whole = experiment.define(config)
    config.update_from_flattened_dict(fields)
    planned = experiment.define(config)
    assert planned.work == whole.work == planned.task.flops_at(224)
    half = planned.task.flops_at(112).executed / planned.work.executed
    assert half < 0.25 and planned.mean_share == pytest.approx((1 + half) / 2)
    assert registry.kind_of(config).elements(config)["image"].shape == (224, 224, 3)
    target = types.SimpleNamespace(name="v5e:1x1", chips=1, devices=[None])
    facts = table.run_facts(planned, target, {"data": 1})
    text = table.facts(facts)
    assert "224 px, the largest size, is planned; steps of 112 px take less" in text
    assert "224 px" not in table.facts({**facts, "image_sizes": [224]})
    config.data.update(sizes=(), phases=((0, 112), (25, 224)))
    assert experiment.define(config).mean_share == pytest.approx(0.25 * half + 0.75)


def test_a_student_and_the_part_of_it_that_trains_are_planned_without_its_folder():
    config = base.distillation(
        teacher="openai_clip_vit_b16", drop_path=0.1, init_from="teachers/not_there"
    )
    config.lora.rank = 8
    planned = experiment.define(config, start="dino_vitb16")
    assert dict(planned.networks)["starts from"] == "converter source dino_vitb16"
    shapes, _ = jax.eval_shape(planned.task.init, jax.random.key(0))
    held = planned.task.abstract_frozen()["student"]
    count = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (shapes, held)]
    # A and B of qkv, proj, fc1 and fc2, of widths 768 and 3072, and the projector.
    rows = (768 + 3 * 768) + (768 + 768) + 2 * (768 + 3072)
    assert count[0] == 12 * 8 * rows + 768 * 768 + 768
    assert 85e6 < count[1] < 87e6
    moments = planned.task.optimizer(shapes, steps_per_epoch=10, total_steps=100)[0].init
    state = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(moments, shapes)))
    assert 2 * count[0] <= state <= 2 * count[0] + 4


@pytest.mark.parametrize(
    "fields,arguments,error,message",
    [
        ({}, {}, ConfigError, "--start=configs"),
        ({}, {"start": "resnet"}, ConversionError, "no source is named 'resnet'"),
        ({}, {"start": "nowhere.py"}, ConfigError, "no such config file"),
        ({"data.name": "folder:/x"}, {}, ConfigError, "--examples=N"),
        ({"batch_size": 4096}, {"examples": 1000}, ConfigError, "more than the 1000 images"),
    ],
)
def test_missing_networks_and_image_counts_are_asked_for(fields, arguments, error, message):
    config = base.fine_tuning(drop_path=0.2, layer_decay=0.65, peak_lr=1e-3, floor_lr=1e-6)
    config.update_from_flattened_dict(fields)
    with pytest.raises(error, match=message):
        experiment.define(config, **arguments)


def test_start_refuses_a_config_that_is_no_distillation(tmp_path):
    config = base.fine_tuning(drop_path=0.2, layer_decay=0.65, peak_lr=1e-3, floor_lr=1e-6)
    with pytest.raises(ConfigError, match="has no student"):
        experiment.define(config, start=str(ROOT / "configs/finetune_clip_vit_b16.py"))


@pytest.mark.parametrize("name", ["v5e:4x4", "v5e:1x1", "v4:2x2x4", "v5p:4x4x4", "v6e:16x16"])
def test_topology_names_are_parsed(name):
    chip, shape = hardware.parse_topology(name)
    assert name == f"{chip.name}:{'x'.join(map(str, shape))}"


@pytest.mark.parametrize(
    "name",
    ["v5e", "v5e:4", "v5e:4x4x4", "v4:4x4", "v5e:32x32", "H100:2x2", "v9:2x2", "v5e:0x4", ""],
)
def test_unknown_topologies_are_refused_with_a_list_of_known_ones(name):
    with pytest.raises(ConfigError, match="v5e:4x4.*v6e:16x16"):
        hardware.parse_topology(name)


def test_every_listed_topology_can_be_parsed():
    for name in hardware.topologies():
        hardware.parse_topology(name)


def test_chips_by_device_kind():
    assert hardware.find_chip("TPU v5 lite") is hardware.CHIPS["v5e"]
    assert hardware.find_chip("NVIDIA H200") is hardware.CHIPS["H200"]
    assert hardware.find_chip(jax.devices()[0].device_kind) is None
    # Peak compute follows from 4 matrix units of 128 x 128 at 1.5 GHz.
    np.testing.assert_allclose(hardware.CHIPS["v5e"].clock_hz, 1.5e9, rtol=0.01)


@pytest.mark.parametrize(
    "installed,message", [(None, "missing"), ("0.0.41", "0.0.41 is installed")]
)
def test_a_missing_or_wrong_libtpu_is_refused(monkeypatch, installed, message):
    def version(name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match=f"{message}.*pip install 'libtpu==0[.]0[.]\\d+"):
        topology.describe("v5e:2x2")


def test_the_installed_libtpu_is_accepted():
    topology.check_libtpu()


def command(*flags):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "fd_jax.plan", *flags],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "flags,message",
    [
        ([], "--config is missing"),
        (["--config=configs/distill_clip_vit_b16.py", "--topology=v5e:3"], "is unknown"),
        *(
            pytest.param(
                [f"--config=configs/{config}.py", "--topology=v5e:2x2", *flags],
                message,
                marks=pytest.mark.slow,
            )
            for config, flags, message in (
                ("distill_clip_vit_b16", ["--output=/no/x"], "there is no folder /no"),
                ("distill_clip_vit_b16", ["--output=docs"], "--output=docs is a folder"),
                ("nope", [], "--config: cannot read the config"),
                ("base", [], "a file without get_config()"),
                ("finetune_clip_vit_b16", ["--start=configs/base.py"], "it has no student"),
            )
        ),
    ],
)
def test_wrong_flags_give_one_clear_error(flags, message):
    done = command(*flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name,devices", [("v4:2x2x1", 8), ("v5p:2x2x1", 4), ("v5e:1x1", 1)])
def test_libtpu_describes_the_expected_number_of_devices(name, devices):
    code = (
        f"from fd_jax.plan import topology; s = topology.describe({name!r}); print(len(s.devices))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=120
    )
    assert done.stdout.split()[-1] == str(devices), done.stderr


TINY_CONFIG = """
from tests import tiny

def get_config(arg=""):
    return tiny.config({teacher!r}, **{{"batch_size": 64, "teacher.source": "tiny"}})
"""


SLICES = """
from jax.experimental import topologies
from fd_jax import sharding
from fd_jax.plan import topology

topology.describe("v5e:2x2")  # sets the environment of libtpu
description = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2)
mesh = sharding.make_mesh(fsdp=2, devices=description.devices[::-1])
print([[device.slice_index for device in row] for row in mesh.devices[:, :, 0]])
try:
    sharding.make_mesh(fsdp=8, devices=description.devices)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_the_data_axis_spans_slices():
    """All other axes stay within one slice."""
    done = subprocess.run(
        [sys.executable, "-c", SLICES], cwd=ROOT, text=True, capture_output=True, timeout=120
    )
    *_, grid, refusal = done.stdout.splitlines()
    assert grid in (str(2 * [[0, 0]] + 2 * [[1, 1]]), str(2 * [[1, 1]] + 2 * [[0, 0]])), done.stderr
    assert refusal == "mesh.data=1 is not divisible by the 2 slices it has to span"


@pytest.mark.slow
def test_the_command_from_end_to_end(teacher, tmp_path):
    config = tmp_path / "tiny_plan.py"
    config.write_text(TINY_CONFIG.format(teacher=teacher))
    flags = [f"--config={config}", "--topology=v5e:4x4", "--effort=-1"]
    done = command(*flags, f"--output={tmp_path / 'plan.json'}", "--config.mesh.fsdp=4")
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["mesh"] == {"data": 4, "fsdp": 4, "tensor": 1}
    assert {c["axis"] for c in plan["collectives"]} <= {"fsdp", "data", "data+fsdp"}
    assert plan["estimate"]["step_seconds"] is None
    assert "does not fit" not in done.stdout and "at most" in done.stdout


class FakeStep:
    """The attributes of a compiled step that the arithmetic of bounds reads."""

    effort = 0.0
    collectives = ()
    hbm_traffic = 0

    class module:
        @staticmethod
        def cycles():
            return 1.5e9 * 0.01


@pytest.fixture
def planned():
    config = tiny.config(**{"teacher.source": "openai_clip_vit_b16", "teacher.path": "/nowhere"})
    config.student.arch.update(base.student(base.VIT_B16, image_size=224))
    config.data.image_size = 224
    return experiment.define(config)


def test_bounds_are_work_over_peak(planned):
    target = topology.Slice("v5e:2x2", hardware.CHIPS["v5e"], 4, [None] * 4)
    limits = bounds.step_bounds(planned, target, FakeStep())
    work = planned.task.flops().executed * planned.config.batch_size
    np.testing.assert_allclose(limits.compute, work / (4 * 197e12))
    assert (limits.mfu, limits.limit) == (1.0, "compute")
    np.testing.assert_allclose(limits.images_per_second, planned.config.batch_size / limits.compute)
    np.testing.assert_allclose(limits.chip_hours, planned.total_steps * limits.compute * 4 / 3600)
    np.testing.assert_allclose(limits.estimated_seconds, 0.01, rtol=0.01)

    slow = FakeStep()
    slow.hbm_traffic = 819e9  # one second of one device's HBM bandwidth
    limits = bounds.step_bounds(planned, target, slow)
    np.testing.assert_allclose((limits.hbm, limits.seconds), 1.0)
    assert limits.limit == "HBM"
    # On v4, two devices share the memory of a chip.
    halves = topology.Slice("v4:2x2x1", hardware.CHIPS["v4"], 4, [None] * 8)
    np.testing.assert_allclose(bounds.step_bounds(planned, halves, slow).hbm, 2 * 819e9 / 1228e9)
    slow.effort = -1.0
    assert bounds.step_bounds(planned, target, slow).estimated_seconds is None


def test_the_announced_time_is_near_that_of_a_recorded_plan(planned):
    recorded = json.loads((ROOT / "benchmarks/scale/distill_b_v5e.json").read_text())
    expected = duration.seconds(planned, 0.0)
    assert 1 / 3 < expected / recorded["compile"]["seconds"] < 3
    assert duration.seconds(planned, -1.0) < duration.seconds(planned, -0.5) < expected
    target = topology.Slice("v5e:4x4", hardware.CHIPS["v5e"], 16, [None] * 16)
    said = duration.of(planned, target, 0.0)
    assert said == (
        f"the step for 16 devices of v5e:4x4 at effort 0, roughly {expected / 60:.0f} min on two "
        "idle cores"
    )


def test_out_of_memory_messages_are_parsed():
    used = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
    used += "hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    error = compiled._memory_excess(used)
    assert (error.needed, error.available) == (20.5 * 2**30, 15.75 * 2**30)
    assert not error.temporaries_only
    temporaries = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    temporaries += "temporaries (256.00G) exceeds available HBM (15.75G)."
    error = compiled._memory_excess(temporaries)
    assert (error.needed, error.available) == (256 * 2**30, 15.75 * 2**30)
    assert error.temporaries_only
    assert compiled._memory_excess("INTERNAL: something else") is None


def test_a_mesh_axis_can_be_part_of_a_torus_dimension():
    @dataclasses.dataclass(frozen=True)
    class Device:
        id: int
        coords: tuple
        platform: str = "tpu"
        device_kind: str = "TPU v5 lite"
        process_index: int = 0
        core_on_chip: int = 0

    devices = [Device(8 * y + x, (x, y, 0)) for y in range(8) for x in range(8)]
    mesh = sharding.make_mesh(data=-1, fsdp=16, devices=devices)
    assert mesh.shape == {"data": 4, "fsdp": 16, "tensor": 1}
    assert sorted(device.id for device in mesh.devices.flat) == list(range(64))
