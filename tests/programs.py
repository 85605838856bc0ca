"""The train steps of distillations, as programs whose texts can be compared."""

import jax

from fd_jax import sharding
from fd_jax.tasks.distill import DistillTask
from fd_jax.training import program


def built(config, **given):
    """The program of a run on one device, and its task."""
    task = DistillTask(config, **given)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return program.build(task, config, mesh, steps_per_epoch=10, total_steps=100), task


def text(run):
    """The StableHLO of its step."""
    return run.train_step.lower(run.state, run.frozen, run.batch, run.seed).as_text()


def lowered(config, **given):
    """The StableHLO of the step of a run on one device."""
    return text(built(config, **given)[0])
