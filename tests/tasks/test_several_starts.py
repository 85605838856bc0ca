"""Several teachers of a student that trains in part, at sizes that change from step to step."""

import jax
import numpy as np
import pytest

from configs import base
from fd_jax import settings, sharding
from fd_jax.errors import ConfigError
from fd_jax.tasks.distill import DistillTask
from fd_jax.tasks.encoder import HELD
from tests import tiny
from tests.cost.test_flops import traced

SIZES = {"data.sizes": (24, 32)}


@pytest.fixture(scope="module")
def folders(teacher, tmp_path_factory):
    """Two teachers, whose grids are 4 x 4 and 3 x 3 at their own sizes, and a student."""
    root = tmp_path_factory.mktemp("several_starts")
    return {
        "first": teacher,
        "second": tiny.save_teacher(root / "second", width=40, image_size=24),
        "student": tiny.save_student(root / "student"),
    }


def config(folders, names=("first", "second"), **fields):
    """The first teacher follows the student's size; the second stays, and the student's map is
    resized to its grid."""
    changes = {"first": {"follow": True}, "second": {"target__resample": "student"}}
    made = [(name, base.teacher("tiny", path=folders[name], **changes[name])) for name in names]
    result = tiny.several(made, **SIZES)
    result.student.init_from = folders["student"]
    result.update_from_flattened_dict(fields)
    settings.check(result)
    return result


def test_each_teacher_has_its_own_size_beside_a_student_of_which_a_part_trains(folders):
    """At 24 pixels, targets and predictions are those of runs with each teacher alone."""
    part = {"student.freeze_blocks": 1, "lora.rank": 2}
    task = DistillTask(config(folders, **part))
    frozen, batch = task.load_frozen(), tiny.batch(side=24)
    assert frozen.keys() == {"first", "second", HELD}
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), task.abstract_frozen())
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), frozen)
    sharding.param_shardings(task.abstract_frozen(), sharding.make_mesh())
    abstract, _ = jax.eval_shape(task.init, jax.random.key(0))
    params = tiny.randomize(jax.tree.map(lambda leaf: np.zeros(leaf.shape), abstract), 5, scale=0.1)

    def compared(task, params, frozen):
        return jax.jit(lambda p, f: (task.targets(f, batch), task.predictions(p, batch, f)))(
            params, frozen
        )

    targets, predictions = compared(task, params, frozen)
    assert targets["first"].shape == targets["second"].shape[:2] + (48,) == (16, 10, 48)
    one = DistillTask(config(folders, ["first"], **part))
    own = {"encoder": params["encoder"], "projector": params["projector"]["first"]}
    want = compared(one, own, {**frozen["first"], HELD: frozen[HELD]})
    for got, alone in zip((targets, predictions), want, strict=True):
        np.testing.assert_allclose(got["first"], alone[""], atol=1e-5)
    grads = jax.eval_shape(jax.grad(lambda p: task.loss(p, {}, frozen, batch)[0]), params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


@pytest.mark.parametrize("side", [24, 40])
def test_the_students_map_is_resized_to_the_grid_that_a_teacher_has_at_each_size(side):
    """A finer teacher, once as it is and once following: shapes agree, and so does the work."""
    for follow, grid in ((False, (8, 8)), (True, (side // 4, side // 4))):
        section = base.teacher("", path="a", target__resample="student", follow=follow)
        made = tiny.several([("a", section)], **{"data.sizes": (16, side)})
        task = DistillTask(made, teacher_spec=tiny.teacher_spec(patch_size=4))
        params, _ = jax.eval_shape(task.init, jax.random.key(0))
        shapes = [
            jax.eval_shape(function, arrays, tiny.batch(side=side)).shape
            for function, arrays in (
                (task.teacher_target, task.abstract_frozen()),
                (task.predict, params),
            )
        ]
        assert shapes == [(16, 1 + grid[0] * grid[1], 48)] * 2
        # `traced` takes the largest size, and resizes positions besides.
        if side == 40:
            assert 1 < traced(task) / task.flops_at(side).executed < 1.1


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"teachers.second.target.resample": "none"}, "set teachers.second.follow=True"),
        (
            {"teachers.first.follow": False},
            "but the teacher first has .*: set teachers.first",
        ),
        ({"data.sizes": (20, 32)}, "20 is not divisible by patch_size 8"),
    ],
)
def test_sizes_that_do_not_suit_one_of_the_teachers_are_refused_by_its_name(
    changes, message, folders
):
    changes = {"teachers.second.image_size": 32, **changes}
    with pytest.raises(ConfigError, match=message):
        DistillTask(config(folders, **changes))


def test_a_relation_needs_two_tokens_at_every_size():
    section = base.teacher("", path="a", loss__relation=1.0, loss__class_share=0.5, follow=True)
    made = tiny.several([("a", section)], **{"data.sizes": (8, 32)})
    with pytest.raises(ConfigError, match="loss.relation compares tokens .* has only 1"):
        DistillTask(made, teacher_spec=tiny.teacher_spec())
