"""Residuals for the backward pass: only the teacher's target, and few activations of a block."""

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from fd_jax.models import layers, vit
from fd_jax.models.kernels import xla
from fd_jax.tasks.distill import DistillTask
from tests import tiny

ROWS = 8
TEACHER = {"width": 72, "heads": 3, "mlp_width": 150}  # no other array has these sizes


@pytest.fixture(scope="module")
def task():
    return DistillTask(tiny.config(), teacher_spec=tiny.teacher_spec(**TEACHER))


def kept(task, *, with_teacher):
    """Shapes of the loss's residuals for gradients of the student, or of student and teacher."""
    params, extra = jax.eval_shape(task.init, jax.random.key(0))
    batch = {
        "image": jax.ShapeDtypeStruct((ROWS, 32, 32, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((ROWS,), jnp.int32),
        "weight": jax.ShapeDtypeStruct((ROWS,), jnp.float32),
    }
    batch = jax.eval_shape(task.prepare, batch, jax.random.key(0))

    def residuals(params, extra, frozen, batch):
        if with_teacher:
            return jax.vjp(lambda p, f: task.loss(p, extra, f, batch)[0], params, frozen)[1]
        return jax.vjp(lambda p: task.loss(p, extra, frozen, batch)[0], params)[1]

    shapes = jax.eval_shape(residuals, params, extra, task.abstract_frozen(), batch)
    return [leaf.shape for leaf in jax.tree.leaves(shapes)]


def teacher_activations(shapes):
    """Shapes of the teacher's activations: those with one of its sizes and a row per image."""
    return [
        s
        for s in shapes
        if (TEACHER["mlp_width"] in s or TEACHER["width"] in s or TEACHER["heads"] in s)
        and (ROWS in s or ROWS * 17 in s)
    ]


def test_activations_of_the_teacher_are_not_kept(task):
    # The only arrays of its width are differences of prediction and target, which the gradient of
    # the smooth L1 loss needs.
    shapes = teacher_activations(kept(task, with_teacher=False))
    assert set(shapes) <= {(ROWS, 17, TEACHER["width"])}
    assert len(shapes) <= 4


def test_control_activations_of_the_teacher_are_kept_without_stop_gradient(task, monkeypatch):
    """Negative control: no stop_gradient, and a gradient with respect to the teacher."""
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)
    shapes = teacher_activations(kept(task, with_teacher=True))
    assert any(TEACHER["mlp_width"] in shape for shape in shapes)
    assert len(shapes) > 20


ARCH = {**tiny.TEACHER, "depth": 1}
TOKENS = 17


def block_residuals():
    """Distinct residuals of a ViT with one block that computes in bfloat16."""
    model = nnx.eval_shape(lambda: vit.ViT(**ARCH, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)

    def residuals(params, images):
        return jax.vjp(lambda p: nnx.merge(graph, p)(images).tokens, params)[1]

    images = jax.ShapeDtypeStruct((ROWS, 32, 32, 3), jnp.float32)
    closed = jax.make_jaxpr(residuals)(params, images)
    return {id(variable): variable.aval for variable in closed.jaxpr.outvars}.values()


def test_a_block_keeps_hidden_units_and_probabilities_only_in_bfloat16():
    kept = list(block_residuals())
    hidden = [a for a in kept if a.shape == (ROWS * TOKENS, ARCH["mlp_width"])]
    probabilities = [a for a in kept if a.shape == (ROWS, ARCH["heads"], TOKENS, TOKENS)]
    # Input and output of the activation; the probabilities that multiply the values.
    assert [a.dtype for a in hidden] == 2 * [jnp.bfloat16]
    assert [a.dtype for a in probabilities] == [jnp.bfloat16]


def plain_average(logits, v):
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits).astype(v.dtype), v)


def test_control_a_block_keeps_float32_without_the_custom_gradients(monkeypatch):
    """Negative control: the plain functions, without their custom gradients."""
    monkeypatch.setattr(layers, "activate", lambda x, name: layers.ACTIVATIONS[name](x))
    monkeypatch.setattr(xla, "softmax_average", plain_average)
    kept = list(block_residuals())
    assert sum(a.shape == (ROWS * TOKENS, ARCH["mlp_width"]) for a in kept) > 2
    wide = [a for a in kept if a.shape[-2:] == (TOKENS, TOKENS) and a.dtype == jnp.float32]
    assert wide
