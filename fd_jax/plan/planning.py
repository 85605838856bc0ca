"""Plans an experiment on a slice, and looks for settings that fit if it does not."""

import dataclasses
import json
from typing import Any

from etils import epath

from fd_jax import files, settings, sharding
from fd_jax.console import say
from fd_jax.plan import advice, bounds, bundles, compiled, duration, experiment, stopping, table
from fd_jax.plan.topology import Slice
from fd_jax.typing import Config

Plan = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planner:
    """Plans experiments on one slice, in the same way.

    Attributes:
      target: slice to plan for.
      effort: compiler effort, see `compiled.compile_step`.
      windowed_einsum: see `compiled.compile_step`.
      start, examples: arguments of `experiment.define`.
      output: JSON file that receives the plan of the config as soon as it is known, and again with
        every attempt to make it fit; None for none.
    """

    target: Slice
    effort: float = 0.0
    windowed_einsum: bool = False
    start: str = ""
    examples: int | None = None
    output: epath.Path | None = None

    def plan(self, config: Config, *, advise: bool, hlo_file: epath.Path | None = None) -> Plan:
        """Prints and saves the plan of a config, then looks for settings that fit if it does not.

        Args:
          config: config of any task.
          advise: whether to try changes if the run does not fit.
          hlo_file: file to write the text of the compiled program to.

        Returns:
          The plan as plain values.
        """
        planned = self._define(config)
        facts = self._facts(planned)
        say(table.facts(facts))
        say(f"compiling {duration.of(planned, self.target, self.effort)}")
        try:
            step = self._compile(planned)
        except compiled.DoesNotFitError as lacking:
            plan = facts | table.not_fitting_facts(lacking)
            self._publish(plan)
            return self._advised(plan, planned, lacking) if advise else plan
        if hlo_file is not None:
            hlo_file.write_text(step.executable.as_text() or "")
        plan = facts | self._measured(planned, step)
        self._publish(plan)
        return plan

    def _publish(self, plan: Plan) -> None:
        say(table.outcome(plan))
        self._save(plan)
        if self.output is not None:
            say(f"written to {self.output}")

    def _save(self, plan: Plan) -> None:
        if self.output is not None:
            files.write_text(self.output, json.dumps(plan, indent=2) + "\n")

    def _define(self, config: Config) -> experiment.Experiment:
        planned = experiment.define(config, start=self.start, examples=self.examples)
        planned.work.seconds(self.target.chip)  # refuses matmuls for which it has no units
        return planned

    def _facts(self, planned: experiment.Experiment) -> Plan:
        mesh = sharding.make_mesh(**planned.config.mesh, devices=self.target.devices)
        return table.run_facts(planned, self.target, dict(mesh.shape))

    def _compile(self, planned: experiment.Experiment) -> compiled.Compiled:
        def work() -> compiled.Compiled:
            return compiled.compile_step(
                planned,
                self.target,
                effort=self.effort,
                windowed_einsum=self.windowed_einsum,
            )

        return stopping.in_thread(work, "compiling")

    def _measured(self, planned: experiment.Experiment, step: compiled.Compiled) -> Plan:
        cycles = 0 if self.effort else bundles.cycles(step.module, self.target.name)
        limits = bounds.step_bounds(planned, self.target, step, cycles)
        return table.fitting_facts(planned, self.target, step, limits, cycles)

    def _advised(
        self, plan: Plan, planned: experiment.Experiment, lacking: compiled.DoesNotFitError
    ) -> Plan:
        """The plan with what was tried, and with the plan of the first settings that fit."""

        def compile_with(config: Config) -> advice.Fit:
            settings.check(config)
            changed = self._define(config)
            return changed, self._compile(changed)

        devices = len(self.target.devices)
        say(
            "looking for settings that fit, each on top of those that helped: at most "
            f"{len(advice.proposals(planned, devices))} compilations like the first"
        )
        for attempt in advice.search(planned, devices, compile_with, lacking=lacking):
            tried = attempt.to_json()
            say(f"  {table.attempt(tried)}")
            plan = {**plan, "tried": [*plan["tried"], tried]}
            if attempt.fit is not None:
                plan["remedy"] = self._facts(attempt.fit[0]) | self._measured(*attempt.fit)
                say(f"with {table.flags(attempt.changes)}")
                say(table.facts(plan["remedy"]))
                say(table.outcome(plan["remedy"]))
            self._save(plan)
        return plan
