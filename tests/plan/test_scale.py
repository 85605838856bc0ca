"""Which runs of docs/scale.md share a step, by comparing the programs."""

import importlib
import re

import jax
import pytest

from benchmarks import scale
from fd_jax import sharding
from fd_jax.plan import experiment
from fd_jax.training import program


def lowered(run):
    """The step of a run as it goes to the compiler, without the numbers in it."""
    path, start, _ = scale.RUNS[run]
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    planned = experiment.define(module.get_config(), start=start)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    made = program.build(
        planned.task,
        planned.config,
        mesh,
        steps_per_epoch=planned.steps_per_epoch,
        total_steps=planned.total_steps,
    )
    text = made.train_step.lower(made.state, made.frozen, made.batch, made.seed).as_text()
    return re.sub(r"dense<[^>]*>", "dense<>", text)


@pytest.mark.slow
def test_runs_that_are_not_compiled_have_the_step_of_one_that_is():
    steps = {run: lowered(run) for run in {*scale.SAME_STEP, *scale.SAME_STEP.values()}}
    assert all(steps[run] == steps[other] for run, other in scale.SAME_STEP.items())
    # Control: CLIP's teacher has a norm before its blocks, DINO's has none.
    assert steps["distill_b"] != steps["distill_dino_b"] != steps["finetune_b"]
    assert "dense<>" in steps["distill_b"] and len(steps["distill_b"]) > 100_000
