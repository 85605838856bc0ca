"""A frozen teacher in int8 or float8: its program, its weights, its gradients and its refusals."""

import jax
import numpy as np
import pytest

from configs import base
from fd_jax import settings
from fd_jax.cost import hardware
from fd_jax.errors import ConfigError
from fd_jax.models.narrow import KINDS
from fd_jax.plan import bounds, planning, topology
from fd_jax.tasks.distill import DistillTask
from tests import programs, tiny
from tests.cost.test_flops import matmul_flops
from tests.models import resnets
from tests.plan.test_experiment import FakeStep

DOTS = "preferred_element_type=int32"


def make(teacher, **fields):
    """A task, random parameters and the frozen arrays."""
    config = tiny.config(teacher, **fields)
    settings.check(config)
    task = DistillTask(config)
    shapes, _ = jax.eval_shape(task.init, jax.random.key(1))
    params = tiny.randomize(jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes), 5, scale=0.1)
    return task, params, task.load_frozen()


def lowered(config):
    return programs.lowered(config, teacher_spec=tiny.teacher_spec())


def test_a_run_without_it_has_the_program_of_a_config_that_lacks_the_field():
    """Text for text; int8 shows that the texts would differ."""
    plain = lowered(tiny.config())
    older = tiny.config()
    del older.teacher["matmuls"]
    assert lowered(older) == plain
    quantized = lowered(tiny.config(**{"teacher.matmuls": "int8"}))
    assert "xi8>" in quantized and "xi8>" not in plain


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_close_to_that_in_float32_and_not_equal(kind, teacher):
    task, _, frozen = make(teacher, **{"teacher.matmuls": kind})
    exact, _, weights = make(teacher)
    batch = tiny.batch(4)
    got, want = (
        np.asarray(jax.jit(each.teacher_target)(held, batch))
        for each, held in ((task, frozen), (exact, weights))
    )
    apart = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 1e-3 < apart < {"int8": 0.03, "float8_e4m3fn": 0.1}[kind]
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (frozen, task.abstract_frozen()))
    assert shapes[0] == shapes[1]


def test_no_gradient_reaches_it_and_its_matmuls_are_in_no_backward_pass(teacher):
    task, params, frozen = make(teacher, **{"teacher.matmuls": "int8"})
    batch = tiny.batch(2)

    def loss(params, frozen):
        return task.loss(params, {}, frozen, batch)[0]

    grads = jax.jit(jax.grad(loss, argnums=1, allow_int=True))(params, frozen)
    floats = [leaf for leaf in jax.tree.leaves(grads) if leaf.dtype != jax.dtypes.float0]
    assert floats and not any(np.any(leaf) for leaf in floats)
    forward = str(jax.make_jaxpr(loss)(params, frozen)).count(DOTS)
    both = str(jax.make_jaxpr(jax.grad(loss))(params, frozen)).count(DOTS)
    assert forward == both == 2 * 6  # of two blocks: q, k, v, proj, fc1 and fc2


def test_other_maps_of_the_teacher_are_quantised_too(teacher):
    """Those of single blocks, by which several levels are made."""
    fields = {"target.blocks": (0, 1), "target.after_norm": False, "teacher.matmuls": "int8"}
    task, _, frozen = make(teacher, **fields)
    text = str(jax.make_jaxpr(task.targets)(frozen, {"image": tiny.batch(2)["image"]}))
    assert text.count(DOTS) == 2 * 6


def test_flops_of_narrow_numbers_are_those_of_the_traced_matmuls(teacher):
    """In the plan, they count at the chip's peak for them."""
    task, _, frozen = make(teacher, **{"teacher.matmuls": "int8"})
    images = {"image": tiny.batch(2)["image"]}
    traced = jax.make_jaxpr(task.teacher_target)(frozen, images).jaxpr
    every = matmul_flops(traced)
    rest = matmul_flops(traced, narrow=False)
    work, plain = task.flops(), make(teacher)[0].flops()
    assert work.narrow == {"int8": pytest.approx((every - rest) / 2)}
    assert (work.forward, work.backward) == (plain.forward, plain.backward)
    chip, narrow = hardware.CHIPS["v5e"], work.narrow["int8"]
    saved = narrow * (1 / 197e12 - 1 / 393e12)
    assert work.seconds(chip) == pytest.approx(plain.seconds(chip) - saved)
    assert (work + work).narrow == {"int8": 2 * narrow}


def planned(kind, chip):
    """The plan's view of ViT-B with a teacher in this kind of numbers, before it is compiled."""
    config = tiny.config(**{"teacher.source": "openai_clip_vit_b16", "teacher.path": "/nowhere"})
    config.student.arch.update(base.student(base.VIT_B16, image_size=224))
    config.data.image_size = 224
    config.teacher.matmuls = kind
    target = topology.Slice(f"{chip}:2x2", hardware.CHIPS[chip], 4, [None] * 4)
    return planning.Planner(target=target)._define(config), target


def test_a_plan_refuses_numbers_that_the_chip_does_not_multiply():
    for chip in ("v5e", "v6e"):
        with pytest.raises(ConfigError, match=f"matrix units of a {chip} .* 'int8' or ''"):
            planned("float8_e4m3fn", chip)
    limits = [bounds.step_bounds(*planned(kind, "v6e"), FakeStep()) for kind in ("", "int8")]
    assert 0.85 < limits[1].compute / limits[0].compute < 0.9
    assert hardware.check_matmuls("float8_e4m3fn", hardware.CHIPS["H100"]) is None
    assert hardware.check_matmuls("float8_e4m3fn", None) is None  # a CPU


def test_a_teacher_without_linear_layers_is_refused():
    spec, message = resnets.spec("D", image_size=37), "attention and MLPs, and a ResNet has none"
    config = tiny.config(**{"teacher.matmuls": "int8", "target.kind": "gap"})
    with pytest.raises(ConfigError, match=message):
        DistillTask(config, teacher_spec=spec)
    section = base.teacher("tiny", matmuls="int8", target__kind="gap")
    with pytest.raises(ConfigError, match=message):
        DistillTask(tiny.several([("a", section)]), teacher_specs={"": spec})
