"""The runs that share a step in docs/scale.md have equal programs."""

import importlib
import json
import re

import jax
import pytest

from benchmarks import scale
from fd_jax import sharding
from fd_jax.plan import experiment
from fd_jax.training import program


def lowered(run):
    """The lowered step of a run, without its constants."""
    path, start, _ = scale.RUNS[run]
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    planned = experiment.define(module.get_config(), start=start)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    built = program.build(
        planned.task,
        planned.config,
        mesh,
        steps_per_epoch=planned.steps_per_epoch,
        total_steps=planned.total_steps,
    )
    text = built.train_step.lower(built.state, built.frozen, built.batch, built.seed).as_text()
    return re.sub(r"dense<[^>]*>", "dense<>", text)


@pytest.mark.slow
def test_runs_that_share_a_step_have_the_same_program():
    steps = {run: lowered(run) for run in {*scale.SAME_STEP, *scale.SAME_STEP.values()}}
    assert all(steps[run] == steps[other] for run, other in scale.SAME_STEP.items())
    # Negative control: CLIP's teacher has a norm before its blocks, DINO's has none.
    assert steps["distill_b"] != steps["distill_dino_b"] != steps["finetune_b"]
    assert "dense<>" in steps["distill_b"] and len(steps["distill_b"]) > 100_000


def test_the_estimated_step_of_a_masked_student_takes_half_the_time():
    """Of the compiled programs in benchmarks/scale, with as many images on each chip."""
    rows = [scale.Row(run, "v5e") for run in ("distill_b", "distill_maskalign_b")]
    whole, masked = (json.loads(row.file.read_text()) for row in rows)
    assert whole["batch_size"] / whole["chips"] == masked["batch_size"] / masked["chips"]
    assert masked["estimate"]["step_seconds"] < 0.55 * whole["estimate"]["step_seconds"]
    assert masked["compiler"]["matmuls_over_closed_form"] == pytest.approx(1, abs=1e-4)
