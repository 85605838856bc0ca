"""Students with wider features: a projector that is kept, and a wide last block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from fd_jax import inference, model_folder, settings
from fd_jax.errors import ConfigError
from fd_jax.report import distillation as report
from fd_jax.tasks.distill import DistillTask
from tests import tiny

KEEPS = {"student.keep_projector": True}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.save_teacher(tmp_path_factory.mktemp("teacher") / "vit")


def test_a_kept_projector_is_part_of_the_exported_network(teacher, tmp_path):
    config = tiny.config(teacher, **KEEPS)
    settings.check(config)
    task, plain = DistillTask(config), DistillTask(tiny.config(teacher))
    params, extra = task.init(jax.random.key(0))
    params = tiny.randomize(params, 5, scale=0.1)
    batch = tiny.batch()
    frozen = jax.tree.map(jnp.asarray, task.load_frozen())
    # Training is that of a run which does not keep it.
    losses = [jax.jit(each.loss)(params, extra, frozen, batch)[0] for each in (task, plain)]
    assert losses[0] == losses[1]
    spec, parts = task.export(params, extra)
    assert set(parts) == {"encoder"} and spec.arch["lift"] == 48
    folder = tmp_path / "work" / "model"
    model_folder.save(folder, spec, parts)
    model = inference.load_model(folder)
    features = model(model.preprocess(batch["image"]))
    want = task.predict(params, batch)
    np.testing.assert_allclose(features.full, want, rtol=1e-4, atol=1e-4)
    vectors = task.features(params, extra, frozen, batch)
    np.testing.assert_allclose(np.mean(features.patches, axis=1), vectors, rtol=1e-4, atol=1e-4)
    # The report and a run that goes on find the projector again.
    again, _ = report.load_trained(task, tmp_path / "work")
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(params))
    onward = DistillTask(tiny.config(teacher, init_from=str(folder), **KEEPS)).load_initial()
    jax.tree.map(np.testing.assert_array_equal, onward, jax.device_get(params))
    with pytest.raises(ConfigError, match="init_from=.* holds vit .*'lift': 48"):
        DistillTask(tiny.config(teacher, init_from=str(folder))).load_initial()
    # It teaches as any other network of this width.
    taught = DistillTask(tiny.config(str(folder), **{"teacher.source": ""}))
    assert taught.goal.teacher.width == 48


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target.kind": "logits"}, "target.kind='logits' trains a head"),
        ({"student.arch.lift": 64}, "lifted to 64 channels already"),
    ],
)
def test_projectors_that_cannot_be_kept_are_refused(fields, message, tmp_path):
    folder = tiny.save_teacher(tmp_path / "vit", classes=7)
    with pytest.raises(ConfigError, match=f"keeps one linear map of all tokens, but .*{message}"):
        DistillTask(tiny.config(folder, **KEEPS, **fields))


def test_projectors_of_other_forms_are_refused(teacher):
    def task(*sections):
        return DistillTask(tiny.several(list(sections), **KEEPS))

    with pytest.raises(ConfigError, match="there are 2 teachers"):
        task(("a", base.teacher("", path=teacher)), ("b", base.teacher("", path=teacher)))
    with pytest.raises(ConfigError, match="projector.kind='mlp' has two layers"):
        task(("a", base.teacher("", path=teacher, projector__kind="mlp")))
    with pytest.raises(ConfigError, match="projector.separate=True"):
        task(("a", base.teacher("", path=teacher, projector__separate=True)))


def test_a_student_with_a_wide_last_block_has_the_width_of_its_teacher(teacher, tmp_path):
    fields = {"student.arch.last_width": 48, "student.arch.position": "rpb"}
    config = tiny.config(teacher, **fields)
    settings.check(config)
    task = DistillTask(config)
    assert task.student.width == task.goal.teacher.width == 48
    params, extra = task.init(jax.random.key(0))
    frozen = jax.tree.map(jnp.asarray, task.load_frozen())
    grads = jax.jit(jax.grad(lambda p: task.loss(p, extra, frozen, tiny.batch())[0]))(params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
    spec, parts = task.export(params, extra)
    model_folder.save(tmp_path / "m", spec, parts)
    assert inference.load_model(tmp_path / "m")(np.zeros((1, 32, 32, 3))).tokens.shape[-1] == 48
