"""From an experiment and a slice to its plan."""

import functools
from typing import Any

from etils import epath

from fd_jax import sharding
from fd_jax.console import say
from fd_jax.plan import advice, bounds, compiled, experiment, table, topology


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
      planned: the experiment.
      target: the slice.
      effort: of the compiler.
      windowed_einsum: see `compiled.compile_step`.
      advise: whether changes are tried where it does not fit.
      start: as the experiment was defined with.
      examples: as the experiment was defined with.
      hlo_file: receives the compiled text, for those who want to read more.
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
            attempts = advice.find(
                planned,
                len(target.devices),
                lambda config: compile_one(
                    experiment.define(config, start=start, examples=examples)
                ),
                report=lambda attempt: say(f"tried {table.attempt_line(attempt)}"),
            )
        return facts | table.not_fitting(error, attempts)
    if hlo_file is not None:
        hlo_file.write_text(step.executable.as_text() or "")
    limits = bounds.of_step(planned, target, step)
    return facts | table.fitting(planned, target, step, limits)
