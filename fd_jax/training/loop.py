"""The one training loop: `fit(task, config, workdir)`."""

from collections.abc import Callable
import contextlib
import dataclasses
import time
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import ml_collections
import numpy as np

from fd_jax import model_folder, sharding
from fd_jax.checkpoint import Checkpoints
from fd_jax.console import say
from fd_jax.cost.utilization import Utilization
from fd_jax.data.feed import Feed
from fd_jax.data.global_batch import Placement
from fd_jax.data.pipeline import TrainLoader
from fd_jax.errors import ConfigError
from fd_jax.evaluation.evaluators import Weights
from fd_jax.tasks.base import Task
from fd_jax.training import metric_writer, signals
from fd_jax.training import workdir as workdirs
from fd_jax.training.clock import Clock
from fd_jax.training.program import STOP, Program, build
from fd_jax.training.progress import NonFiniteError, Progress
from fd_jax.training.step import TrainState
from fd_jax.training.trace import Trace
from fd_jax.typing import Batch, Config, Metrics, PyTree

PREEMPTED = 75  # exit status: stopped by SIGTERM after saving; run the same command again


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: the step it reached, whether SIGTERM stopped it, its last evaluation."""

    step: int
    preempted: bool
    evaluation: dict[str, float]


def fit(
    task: Task,
    config: Config,
    workdir: epath.PathLike,
    *,
    accept_config: bool = False,
) -> Result:
    """Trains `task` to the end of its schedule, from wherever `workdir` left off.

    Where the state comes from, in this order:
      1. A complete checkpoint in `workdir`: the run goes on, its data and randomness with it.
      2. `task.load_initial()`: parts of a model folder, the rest fresh.
      3. Fresh parameters.

    Args:
      task: what to train.
      config: of the run; its fields are described in configs/base.py.
      workdir: receives config.json, checkpoints/, metrics.jsonl, tensorboard/ and model/.
      accept_config: go on although the config differs from the one that `workdir` began with.

    Raises:
      UserError: the input is at fault; the message says how.
    """
    workdir = epath.Path(workdir)
    with contextlib.ExitStack() as resources:
        # From here on, since restoring and compiling take minutes, and since jax.distributed leaves
        # a handler that would take the signal and do nothing.
        stop_asked = resources.enter_context(signals.on_sigterm())
        mesh = sharding.make_mesh(**config.mesh)
        sharding.check_batch(config.batch_size, config.accumulation, mesh)
        _check_seed(config.seed)
        feed = Feed(**config.data)
        task.check_data(feed)
        steps_per_epoch = feed.steps_per_epoch(config.batch_size)
        total_steps = config.steps or round(config.epochs * steps_per_epoch)
        workdirs.claim(workdir, _settled(config, task), accept=accept_config)
        say("attention: " + ", ".join(f"{k} {v}" for k, v in task.attention.items()))

        program = build(
            task,
            config,
            mesh,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            elements=feed.elements,
        )
        checkpoints = Checkpoints(
            workdir / workdirs.CHECKPOINTS,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every or None,
        )
        resources.callback(checkpoints.close)
        state, start, record = initial_state(task, program, checkpoints, config.seed)
        writer = metric_writer.Writer(workdir, resume_step=start)
        resources.callback(writer.close)
        frozen = program.place_frozen(task.load_frozen())
        placement = Placement(mesh, config.batch_size)
        # Last, since it starts threads and fills devices: nothing after it may fail.
        loader = feed.train(
            batch_size=config.batch_size,
            seed=config.seed,
            rows=placement.rows,
            start_step=start,
            put_on_devices=placement.put,
        )
        resources.callback(loader.close)
        return Run(
            task=task,
            config=config,
            workdir=workdir,
            program=program,
            feed=feed,
            checkpoints=checkpoints,
            writer=writer,
            frozen=frozen,
            placement=placement,
            loader=loader,
            progress=Progress(record),
            clock=Clock(batch_size=config.batch_size, start=start, total=total_steps),
            start=start,
            total_steps=total_steps,
            eval_every=config.eval.every or round(config.eval.epochs * steps_per_epoch),
        ).train(state, stop_asked)


def initial_state(
    task: Task, program: Program, checkpoints: Checkpoints, seed: int
) -> tuple[TrainState, int, dict[str, Any]]:
    """The state a run starts from, its step and its record; the order is that of `fit`."""
    latest = checkpoints.latest_step()
    if latest is not None:
        tree, record = checkpoints.restore(latest, program.state.to_dict())
        logging.info("resuming at step %d", latest)
        return TrainState.from_dict(tree), latest, record
    return program.create(jax.random.key(seed), task.load_initial()), 0, {}


@dataclasses.dataclass(kw_only=True)
class Run:
    """What `fit` has put together, and the steps over it.

    Attributes:
      task, config, workdir: as `fit` got them.
      program: the task on its mesh.
      feed: the data; `loader` takes its training batches, `placement` puts them onto the devices.
      checkpoints, writer: where state and metrics go.
      frozen: the frozen weights, on the mesh.
      progress, clock: what was measured since the last line of the log.
      start, total_steps: where the run begins and ends.
      eval_every: steps from one evaluation to the next; 0 for none.
    """

    task: Task
    config: Config
    workdir: epath.Path
    program: Program
    feed: Feed
    checkpoints: Checkpoints
    writer: metric_writer.Writer
    frozen: PyTree
    placement: Placement
    loader: TrainLoader
    progress: Progress
    clock: Clock
    start: int
    total_steps: int
    eval_every: int

    def __post_init__(self):
        mesh = self.program.mesh
        devices = list(mesh.devices.flat)
        self.utilization = Utilization(self.task.flops(), devices, mesh.local_devices)

    def train(self, state: TrainState, stop_asked: Callable[[], bool]) -> Result:
        """Every step from `start` on, with what falls due between them."""
        began = time.monotonic()
        train_step = self.program.compile_train_step()
        seed = self.program.place_seed(self.config.seed)
        say(f"compiled the step in {time.monotonic() - began:.1f} s")
        evaluation = self._overdue_evaluation(state)
        pending = None  # metrics are read one step late, while the device works on the next
        stop = False
        self.clock.start()
        with contextlib.closing(self._trace()) as trace:
            for step in range(self.start, self.total_steps):
                trace.before(step, state)
                batch = self._next_batch(stop_asked())
                state, metrics = train_step(state, self.frozen, batch, seed)
                trace.after(step, metrics)
                if pending is not None:
                    stop = self._read(step - 1, pending)
                pending = metrics
                if self._due(step + 1, self.config.log_every):
                    stop = self._read(step, pending) or stop
                    pending = None
                    self._log(step + 1)
                # Saved before it is evaluated, which may take longer than a preemption leaves.
                if stop or self._due(step + 1, self.config.checkpoint.every):
                    if pending is not None:
                        stop = self._read(step, pending) or stop
                        pending = None
                    self._save(step + 1, state)
                if stop:
                    break
                if self._due(step + 1, self.eval_every):
                    evaluation = self._evaluate(step + 1, state)
        reached = int(state.step)
        if not stop:
            self._export(state)
        self.checkpoints.wait()
        return Result(step=reached, preempted=stop, evaluation=evaluation)

    def _due(self, step: int, every: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.total_steps)

    def _trace(self) -> Trace:
        steps, folder = self.config.profile_steps, self.workdir / workdirs.PROFILE
        return Trace(folder, steps=steps, start=self.start, total=self.total_steps)

    def _next_batch(self, stop: bool) -> Batch:
        with self.clock.waiting():
            batch = next(self.loader)
        # A host that was told to stop says so in its rows: every host then reads the same sum
        # from the same step, with no extra communication.
        flags = np.full(len(self.placement.rows), stop, STOP.dtype)
        return batch | self.placement.put({"stop": flags})

    def _read(self, step: int, metrics: Metrics) -> bool:
        """Takes in the metrics of one step; returns whether some host was told to stop."""
        stop = self.progress.add(metrics)
        in_a_row = self.progress.nonfinite_in_a_row
        if in_a_row >= self.config.max_nonfinite:
            rate, indices = float(self.program.schedule(step)), self.loader.indices(step)
            raise NonFiniteError(
                f"loss or gradients were not finite for {in_a_row} steps in a row, "
                f"the last at step {step} with learning rate {rate:.3g}; "
                f"its examples are {indices.tolist()}. Lower optim.peak_lr, set dtype=float32, or "
                "look at these examples; the last checkpoint in the workdir is from before."
            )
        return stop

    def _log(self, step: int) -> None:
        scalars = self.progress.means()
        scalars["learning_rate"] = float(self.program.schedule(step - 1))
        scalars |= self.clock.lap(step)
        scalars |= self.utilization.metrics(scalars["images_per_second"])
        self.writer.write(step, scalars)
        say(
            f"step {step}/{self.total_steps}  loss {scalars.get('loss', float('nan')):.5f}  "
            f"lr {scalars['learning_rate']:.3g}  {scalars['images_per_second']:.1f} images/s  "
            f"ETA {self.clock.remaining(step)}"
        )

    def _save(self, step: int, state: TrainState) -> None:
        record = {
            "data": self.loader.state(step),
            "config": self.config.to_dict(),
            **self.progress.record(),
        }
        self.checkpoints.save(step, state.to_dict(), record)

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        """What the task's evaluators measure on the held-out split, by name."""
        if self.feed.eval_dataset is None:
            return {}
        weights = Weights(state.params, state.extra, self.frozen, state.ema)
        result = {}
        with self.clock.paused():
            for evaluator in self.task.evaluators():
                found = evaluator(self.program, weights, self.feed)
                result |= {f"eval_{name}": value for name, value in found.items()}
        self.writer.write(step, result)
        say(f"step {step}: " + "  ".join(f"{k} {v:.5f}" for k, v in result.items()))
        return result

    def _overdue_evaluation(self, state: TrainState) -> dict[str, float]:
        """That of the step the run goes on from: as recorded, or made now if it was cut short."""
        if not self.start or not self._due(self.start, self.eval_every):
            return {}
        recorded = metric_writer.read_evaluation(self.workdir, self.start)
        missing = np.int32(not recorded)
        if multihost_utils.broadcast_one_to_all(missing):  # or hosts could differ in what they see
            return self._evaluate(self.start, state)
        return recorded

    def _export(self, state: TrainState) -> None:
        params = state.params if state.ema is None else state.ema
        spec, parts = self.task.export(params, state.extra)
        model_folder.save(self.workdir / workdirs.MODEL, spec, parts, overwrite=True)


def _settled(config: Config, task: Task) -> Config:
    """The config with the implementation of attention that this run uses in place of "auto".

    So a workdir says what ran, and a later version that would choose another shows a difference.
    """
    if config.attention != "auto":
        return config
    settled = ml_collections.ConfigDict(config.to_dict())
    settled.attention = next(iter(task.attention.values()))
    return settled


def _check_seed(seed: int) -> None:
    """Refuses what is no uint32, as the step takes it."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed}: a whole number from 0 to {2**32 - 1} is expected")
