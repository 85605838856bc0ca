"""Teachers run one after another: the memory of their activations is that of the largest."""

import jax
import numpy as np
import pytest

from configs import base
from fd_jax import sharding
from fd_jax.models import kernels
from fd_jax.models.spec import ModelSpec
from fd_jax.plan import topology
from fd_jax.tasks.distill import DistillTask

SHAPE = {"patch_size": 16, "width": 256, "depth": 1, "heads": 4, "mlp_width": 1024}
ROWS = 128


@pytest.fixture(autouse=True)
def quick():
    """The lowest compiler effort, which is a global setting."""
    name = "jax_exec_time_optimization_effort"
    before = getattr(jax.config, name)
    jax.config.update(name, -1.0)
    yield
    jax.config.update(name, before)


@pytest.mark.slow
def test_the_temporaries_of_two_teachers_are_those_of_the_larger_one():
    """By the TPU compiler. The target is a class token, so that no map is kept meanwhile."""
    mesh = sharding.make_mesh(devices=topology.describe("v5e:2x2").devices)
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    sections = {n: base.teacher("", path=n, target__kind="cls") for n in ("coarse", "fine")}
    config = base.several_teachers(list(sections.items()), shape=SHAPE, drop_path=0.0)
    config.dtype = "bfloat16"
    arch = {**base.student(SHAPE, image_size=224, position="ape"), "layer_scale": None}
    specs = {"coarse": ModelSpec("vit", arch), "fine": ModelSpec("vit", {**arch, "patch_size": 14})}

    def temporaries(function, frozen):
        def traced(*arguments):
            with kernels.split_over(mesh, batch=sharding.BATCH_AXES, heads="tensor"):
                return function(*arguments)

        def struct(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

        image = jax.ShapeDtypeStruct((ROWS, 224, 224, 3), np.uint8, sharding=split)
        lowered = jax.jit(traced).lower(jax.tree.map(struct, frozen), {"image": image})
        return lowered.compile().memory_analysis().temp_size_in_bytes

    with kernels.compiling_for("tpu"):
        task = DistillTask(config, teacher_specs=specs)
        shapes = task.abstract_frozen()
        each = {n: temporaries(task.of_teacher(n).teacher_target, shapes[n]) for n in sections}
        both = temporaries(task.targets, shapes)
    assert each["coarse"] > 0.4 * each["fine"] > 1e6
    assert both < 1.05 * each["fine"]
