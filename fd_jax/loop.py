"""The one training loop: `fit(task, config, workdir)`."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import json
import signal
import time
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import ml_collections
import numpy as np

from fd_jax import evaluation, files, metrics, model_folder, program, sharding
from fd_jax.checkpoint import Checkpoints
from fd_jax.console import say
from fd_jax.data import place
from fd_jax.data.feed import Feed
from fd_jax.errors import CheckpointError, ConfigError, UserError, differences
from fd_jax.step import TrainState
from fd_jax.tasks.base import Task
from fd_jax.typing import Config
from fd_jax.utilization import Utilization

PREEMPTED = 75  # exit status: stopped by SIGTERM after saving; run the same command again
PROFILE_AFTER = 5  # steps that a trace waits, so that it shows none of the start-up


class NonFiniteError(UserError):
    """Loss or gradients were not finite for too many steps in a row."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: the step it reached, whether it was told to stop, and its last figures."""

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
    # From here on, since restoring and compiling take minutes, and since jax.distributed leaves a
    # handler that would take the signal and do nothing.
    with _on_sigterm() as stop_asked:
        return _fit(task, config, epath.Path(workdir), accept_config, stop_asked)


def _fit(
    task: Task,
    config: Config,
    workdir: epath.Path,
    accept_config: bool,
    stop_asked: Callable[[], bool],
) -> Result:
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch(config.batch_size, config.accumulation, mesh)
    _check_seed(config.seed)
    feed = Feed(**config.data)
    task.check_data(feed)
    steps_per_epoch = feed.steps_per_epoch(config.batch_size)
    total_steps = config.steps or round(config.epochs * steps_per_epoch)
    claim_workdir(workdir, _settled(config, task), accept=accept_config)
    say("attention: " + ", ".join(f"{k} {v}" for k, v in task.attention.items()))

    run = program.build(
        task, config, mesh, steps_per_epoch=steps_per_epoch, total_steps=total_steps
    )
    with contextlib.ExitStack() as resources:
        checkpoints = Checkpoints(
            workdir / "checkpoints",
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every or None,
        )
        resources.callback(checkpoints.close)
        state, start, record = initial_state(task, run, checkpoints, config.seed)
        trainer = _Trainer(
            task, config, workdir, run, feed, checkpoints, start, total_steps, record, resources
        )
        return trainer.run(state, stop_asked)


def initial_state(
    task: Task, run: program.Program, checkpoints: Checkpoints, seed: int
) -> tuple[TrainState, int, dict[str, Any]]:
    """The state a run starts from, its step and its record; the order is that of `fit`."""
    latest = checkpoints.latest_step()
    if latest is not None:
        tree, record = checkpoints.restore(latest, _as_dict(run.state))
        logging.info("resuming at step %d", latest)
        return TrainState(**{"ema": None, **tree}), latest, record
    return run.create(jax.random.key(seed), task.load_initial()), 0, {}


def _settled(config: Config, task: Task) -> Config:
    """The config with the implementation of attention that this run uses in place of "auto".

    So a workdir says what ran, and a later version that would choose another shows a difference.
    """
    if config.attention != "auto":
        return config
    settled = ml_collections.ConfigDict(config.to_dict())
    settled.attention = next(iter(task.attention.values()))
    return settled


def claim_workdir(workdir: epath.Path, config: Config, *, accept: bool) -> None:
    """Writes config.json, or refuses a workdir that another config began.

    Raises:
      CheckpointError: config.json differs and `accept` is not set; the message lists each field.
    """
    path = workdir / "config.json"
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
    there = path.read_text() if path.exists() else None
    if there is not None and not accept:
        changed = differences(_flat(json.loads(there)), _flat(json.loads(text)))
        if changed:
            raise CheckpointError(
                f"{workdir} was begun with another config:\n"
                + "\n".join(changed)
                + "\nUse another workdir, or --accept_config to go on with the new values."
            )
    sharding.barrier("workdir_checked")
    if jax.process_index() == 0 and there != text:
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_text(path, text)


class _Trainer:
    """One run: the pieces of `fit` that share its readers, writers and clocks."""

    def __init__(
        self,
        task: Task,
        config: Config,
        workdir: epath.Path,
        run: program.Program,
        feed: Feed,
        checkpoints: Checkpoints,
        start: int,
        total_steps: int,
        record: dict[str, Any],
        resources: contextlib.ExitStack,
    ):
        self.task, self.config, self.workdir = task, config, workdir
        self.program, self.feed, self.checkpoints = run, feed, checkpoints
        self.start, self.total_steps = start, total_steps
        steps_per_epoch = feed.steps_per_epoch(config.batch_size)
        self.eval_every = config.eval.every or round(config.eval.epochs * steps_per_epoch)
        batch_sharding = sharding.batch_sharding(run.mesh)
        self.rows = place.local_rows(batch_sharding, config.batch_size)
        self.place = functools.partial(
            place.to_global, sharding=batch_sharding, rows=self.rows, batch_size=config.batch_size
        )
        self.writer = metrics.Writer(workdir, resume_step=start)
        resources.callback(self.writer.close)
        self.frozen = run.place_frozen(task.load_frozen())
        self.window = metrics.Mean(record.get("window"))  # since the last line of the log
        self.nonfinite_in_a_row = record.get("nonfinite_in_a_row", 0)
        self.clock = _Clock(config.batch_size, start, total_steps)
        self.utilization = Utilization(task, list(run.mesh.devices.flat), run.mesh.local_devices)
        # Last, since it starts threads and fills devices: nothing after it may fail.
        self.loader = feed.train(
            batch_size=config.batch_size,
            seed=config.seed,
            rows=self.rows,
            start_step=start,
            place=self.place,
        )
        resources.callback(self.loader.close)

    def run(self, state: TrainState, stop_asked: Callable[[], bool]) -> Result:
        began = time.monotonic()
        train_step = self.program.compile_train_step()
        seed = self.program.place_seed(self.config.seed)
        say(f"compiled the step in {time.monotonic() - began:.1f} s")
        evaluation = self._overdue_evaluation(state)
        pending = None  # metrics are read one step late, while the device works on the next
        stop = False
        self.clock.start()
        trace = _Trace(
            self.workdir / "profile", self.config.profile_steps, self.start, self.total_steps
        )
        with contextlib.closing(trace):
            for step in range(self.start, self.total_steps):
                trace.before(step, state)
                batch = self._next_batch(stop_asked())
                state, figures = train_step(state, self.frozen, batch, seed)
                trace.after(step, figures)
                if pending is not None:
                    stop = self._read(step - 1, pending)
                pending = figures
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

    def _next_batch(self, stop: bool) -> dict[str, Any]:
        with self.clock.waiting():
            batch = next(self.loader)
        # A host that was told to stop says so in its rows: every host then reads the same sum
        # from the same step, with no extra communication.
        return batch | self.place({"stop": np.full(len(self.rows), stop, np.int32)})

    def _read(self, step: int, figures: Any) -> bool:
        """Takes in the metrics of one step; returns whether some host was told to stop."""
        figures = jax.device_get(figures)
        bad = figures["nonfinite"][0] > 0
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if bad else 0
        if bad:
            figures = {"nonfinite": figures["nonfinite"], "stop": figures["stop"]}
        if self.nonfinite_in_a_row >= self.config.max_nonfinite:
            rate, indices = float(self.program.schedule(step)), self.loader.indices(step)
            raise NonFiniteError(
                f"loss or gradients were not finite for {self.nonfinite_in_a_row} steps in a row, "
                f"the last at step {step} with learning rate {rate:.3g}; "
                f"its examples are {indices.tolist()}. Lower optim.peak_lr, set dtype=float32, or "
                "look at these examples; the last checkpoint in the workdir is from before."
            )
        self.window.add(figures)
        return bool(figures["stop"][0] > 0)

    def _log(self, step: int) -> None:
        scalars = self.window.result()
        self.window = metrics.Mean()
        scalars.pop("stop", None)
        scalars["learning_rate"] = float(self.program.schedule(step - 1))
        scalars |= self.clock.lap(step)
        scalars |= self.utilization.figures(scalars["images_per_second"])
        self.writer.write(step, scalars)
        say(
            f"step {step}/{self.total_steps}  loss {scalars.get('loss', float('nan')):.5f}  "
            f"lr {scalars['learning_rate']:.3g}  {scalars['images_per_second']:.1f} images/s  "
            f"ETA {metrics.duration(self.clock.remaining(step))}"
        )

    def _overdue_evaluation(self, state: TrainState) -> dict[str, float]:
        """That of the step the run goes on from: as recorded, or made now if it was cut short."""
        if not self.start or not self._due(self.start, self.eval_every):
            return {}
        missing = np.int32(not self._recorded_evaluation(self.start))
        if multihost_utils.broadcast_one_to_all(missing):  # or hosts could differ in what they see
            return self._evaluate(self.start, state)
        return self._recorded_evaluation(self.start)

    def _recorded_evaluation(self, step: int) -> dict[str, float]:
        rows = [row for row in metrics.read(self.workdir) if row["step"] == step]
        return {k: v for row in rows for k, v in row.items() if k.startswith("eval_")}

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        if self.feed.eval_source is None:
            return {}
        run, feed, config = self.program, self.feed, self.config
        result = {}
        with self.clock.paused():
            versions = {"eval": state.params}
            if state.ema is not None:
                versions["eval_ema"] = state.ema
            for prefix, params in versions.items():
                figures = evaluation.evaluate(
                    run, feed, config, params, state.extra, self.frozen, limit=config.eval.batches
                )
                if config.eval.knn:
                    figures |= evaluation.neighbours(run, feed, config, params, self.frozen)
                result |= {f"{prefix}_{name}": value for name, value in figures.items()}
        self.writer.write(step, result)
        say(f"step {step}: " + "  ".join(f"{k} {v:.5f}" for k, v in result.items()))
        return result

    def _save(self, step: int, state: TrainState) -> None:
        record = {
            "data": self.loader.state(step),
            "config": self.config.to_dict(),
            "window": self.window.totals(),
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
        }
        self.checkpoints.save(step, _as_dict(state), record)

    def _export(self, state: TrainState) -> None:
        params = state.params if state.ema is None else state.ema
        spec, parts = self.task.export(params, state.extra)
        model_folder.save(self.workdir / "model", spec, parts, overwrite=True)

    def _due(self, step: int, every: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.total_steps)


class _Trace:
    """JAX's profile of some whole steps, evaluation and saving left out."""

    def __init__(self, folder: epath.Path, steps: int, start: int, total: int):
        self._folder, self._running = folder, False
        self._steps = range(0)
        if steps:
            first = max(start, min(start + PROFILE_AFTER, total - steps))
            self._steps = range(first, min(first + steps, total))

    def before(self, step: int, state: TrainState) -> None:
        """Starts where the traced steps do, when the device is done with those before."""
        if self._steps and step == self._steps[0]:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            # Its tracer of Python walks the interpreter's threads without their lock: one that
            # Orbax's writer starts at that moment crashes the process.
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self._folder), profiler_options=options)
            self._running = True

    def after(self, step: int, figures: Any) -> None:
        """Stops where the traced steps do, when the device is done with them."""
        if self._running and step == self._steps[-1]:
            jax.block_until_ready(figures)
            self.close()

    def close(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


class _Clock:
    """Step time, throughput and time spent waiting for data, without evaluation."""

    def __init__(self, batch_size: int, start: int, total: int):
        self.batch_size, self.last_step, self.total = batch_size, start, total
        self.waited = self.excluded = 0.0
        self.began = self.step_time = 0.0

    def start(self) -> None:
        self.began = time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.excluded += time.monotonic() - began

    def lap(self, step: int) -> dict[str, float]:
        now = time.monotonic()
        spent = max(now - self.began - self.excluded, 1e-9)
        steps = step - self.last_step
        self.step_time = spent / steps
        figures = {
            "step_seconds": self.step_time,
            "images_per_second": steps * self.batch_size / spent,
            "input_wait": self.waited / spent,
        }
        self.began, self.last_step = now, step
        self.waited = self.excluded = 0.0
        return figures

    def remaining(self, step: int) -> float:
        return (self.total - step) * self.step_time


@contextlib.contextmanager
def _on_sigterm():
    """Yields a function that tells whether SIGTERM came since; the old handler comes back."""
    asked = False

    def handle(signum, frame):
        nonlocal asked
        asked = True

    try:
        previous = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not in the main thread: the process keeps its own handling
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGTERM, previous)


def _check_seed(seed: int) -> None:
    """Refuses what is no uint32, as the step takes it."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed}: a whole number from 0 to {2**32 - 1} is expected")


def _as_dict(state: TrainState) -> dict[str, Any]:
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if value is not None}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return flat
