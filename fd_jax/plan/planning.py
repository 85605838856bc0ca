"""Plans an experiment on a slice."""

import functools
from typing import Any

from etils import epath

from fd_jax import sharding
from fd_jax.console import say
from fd_jax.plan import advice, bounds, bundles, compiled, experiment, table, topology


def plan_run(
    planned: experiment.Experiment,
    target: topology.Slice,
    *,
    effort: float = 0.0,
    windowed_einsum: bool = False,
    advise: bool = True,
    start: str = "",
    examples: int | None = None,
    hlo_file: epath.Path | None = None,
) -> dict[str, Any]:
    """The plan of an experiment on a slice, as plain values.

    Args:
      planned: experiment to plan.
      target: slice to plan it for.
      effort: compiler effort, see `compiled.compile_step`.
      windowed_einsum: see `compiled.compile_step`.
      advise: whether to try changes if the experiment does not fit.
      start: the argument with which `planned` was defined.
      examples: the argument with which `planned` was defined.
      hlo_file: file to write the text of the compiled program to.
    """
    mesh = sharding.make_mesh(**planned.config.mesh, devices=target.devices)
    facts = table.run_facts(planned, target, dict(mesh.shape))
    compile_one = functools.partial(
        compiled.compile_step, target=target, effort=effort, windowed_einsum=windowed_einsum
    )
    try:
        step = compile_one(planned)
    except compiled.DoesNotFitError as error:
        attempts = []
        if advise:
            attempts = advice.try_candidates(
                planned,
                len(target.devices),
                lambda config: compile_one(
                    experiment.define(config, start=start, examples=examples)
                ),
                report=lambda attempt: say(f"tried {table.attempt_line(attempt)}"),
            )
        return facts | table.not_fitting_facts(error, attempts)
    if hlo_file is not None:
        hlo_file.write_text(step.executable.as_text() or "")
    kernel_cycles = 0 if effort else bundles.cycles(step.module, target.name)
    limits = bounds.step_bounds(planned, target, step, kernel_cycles)
    return facts | table.fitting_facts(planned, target, step, limits, kernel_cycles)
