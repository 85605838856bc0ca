"""Compiles a small FD step for sixteen TPU chips ahead of time, and writes facts about it.

    python -m tests.plan.compile_step --output FOLDER [--depth 2] [--broken]
    python -m tests.plan.compile_step --renew      # writes tests/plan/figures.json

It runs in a process of its own, because the compiler's effort is a global setting, and the tests'
eight CPU devices are another backend.
"""

import argparse
import contextlib
import json
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp

from configs import base
from fd_jax import sharding
from fd_jax.models import kernels, layers
from fd_jax.models.kernels import xla
from fd_jax.models.spec import ModelSpec
from fd_jax.plan import compiled, experiment, topology
from fd_jax.tasks.distill import DistillTask
from fd_jax.training import program

FIGURES = pathlib.Path(__file__).parent / "figures.json"
TOPOLOGY = "v5e:4x4"
CHIPS = 16
IMAGES = 16  # per chip
STUDENT = {"patch_size": 16, "width": 256, "heads": 4, "mlp_width": 1024}
# Different from the student's in every size that appears in a shape.
TEACHER = {"width": 384, "heads": 6, "mlp_width": 1536}


def config(depth=2, **fields):
    result = base.distillation(teacher="", shape={**STUDENT, "depth": depth}, drop_path=0.2)
    result.batch_size = IMAGES * CHIPS
    result.mesh = {"data": 1, "fsdp": CHIPS, "tensor": 1}
    result.dtype = "bfloat16"
    result.update_from_flattened_dict(fields)
    return result


def define(settings):
    depth = settings.student.arch.depth
    arch = {
        **base.student({**STUDENT, **TEACHER, "depth": depth}, image_size=224),
        "position": "ape",
    }
    task = DistillTask(settings, teacher_spec=ModelSpec("vit", {**arch, "layer_scale": None}))
    return experiment.Experiment(task, settings, (), None, 625, 1000)


def breakage():
    """Patches in all the faults at once that the tests have to detect."""

    def bias_per_example(q, k, *, bias, scale, original=xla.attention_logits):
        logits = original(q, k, bias=None, scale=scale)
        if bias is None:
            return logits
        repeated = jnp.broadcast_to(bias, (len(q), *bias.shape))
        return logits + jax.lax.optimization_barrier(repeated)

    def activate_in_float32(x, activation):
        wide = jax.lax.optimization_barrier(x.astype(jnp.float32))
        return layers.ACTIVATIONS[activation](wide).astype(x.dtype)

    def replicated_moments(tx, opt_state, params, mesh):
        del tx, params
        return jax.tree.map(lambda _: sharding.replicated(mesh), opt_state)

    def replicated_teacher(tree, mesh, original=sharding.param_shardings):
        if "projector" in tree:
            return original(tree, mesh)
        return jax.tree.map(lambda _: sharding.replicated(mesh), tree)

    jit = jax.jit

    def without_donation(function, *, donate_argnums=(), **kwargs):
        del donate_argnums
        return jit(function, **kwargs)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(xla, "attention_logits", bias_per_example))
    stack.enter_context(mock.patch.object(layers, "activate", activate_in_float32))
    stack.enter_context(mock.patch.object(sharding, "optimizer_shardings", replicated_moments))
    stack.enter_context(mock.patch.object(sharding, "param_shardings", replicated_teacher))
    stack.enter_context(mock.patch.object(program.jax, "jit", without_donation))
    return stack


def measure(depth=2, *, broken=False, attention="xla"):
    """(the compiled step, facts about it as plain values)."""
    target = topology.describe(TOPOLOGY)
    with breakage() if broken else contextlib.nullcontext(), kernels.compiling_for("tpu"):
        fields = {"attention": attention}
        fields |= {"grad_reduce_dtype": "bfloat16"} if broken else {}
        planned = define(config(depth, **fields))
        step = compiled.compile_step(planned, target, effort=-1.0)
    (state, frozen, *_), _ = step.executable.input_shardings
    leaves = jax.tree_util.tree_leaves_with_path({"state": state, "frozen": frozen})
    shapes = jax.tree.leaves({"state": step.program.state, "frozen": step.program.frozen})
    state_leaves = len(jax.tree.leaves(step.program.state))
    facts = {
        "compile_seconds": step.seconds,
        "closed_form": planned.task.flops().executed,
        "state_leaves": state_leaves,
        "inputs": {
            jax.tree_util.keystr(path): {
                "shape": list(shape.shape),
                "whole": sharded.is_fully_replicated,
            }
            for (path, sharded), shape in zip(leaves, shapes, strict=True)
        },
        "figures": {
            "flops_per_image": step.flops / IMAGES,
            "bytes_per_image": step.bytes_accessed / IMAGES,
            "arguments": step.arguments,
            "temporaries": step.temporaries,
            "hbm": step.hbm - step.code,
        },
    }
    return step, facts


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--broken", action="store_true")
    parser.add_argument("--attention", default="xla")
    parser.add_argument("--renew", action="store_true")
    args = parser.parse_args()
    step, facts = measure(args.depth, broken=args.broken, attention=args.attention)
    if args.output is not None:
        (args.output / "step.txt").write_text(step.executable.as_text())
        (args.output / "facts.json").write_text(json.dumps(facts))
    if args.renew:
        FIGURES.write_text(json.dumps(facts["figures"], indent=2) + "\n")


if __name__ == "__main__":
    main()
