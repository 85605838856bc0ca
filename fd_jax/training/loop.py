"""The training loop of all tasks: `fit(task, config, workdir)`."""

from collections.abc import Callable
import contextlib
import dataclasses
import errno
import time
from typing import Any

from etils import epath
import jax
import ml_collections
import numpy as np

from fd_jax import digests, model_folder, settings, sharding, storage
from fd_jax.checkpoint import Checkpoints
from fd_jax.console import Bar, bar, say
from fd_jax.cost.utilization import Utilization
from fd_jax.data.global_batch import Placement
from fd_jax.data.pipeline import TrainLoader
from fd_jax.data.resolutions import Resolutions
from fd_jax.errors import CheckpointError, DamagedCheckpointError, StorageError, first_few
from fd_jax.evaluation.evaluators import Weights
from fd_jax.models import kernels
from fd_jax.tasks.base import Resizes, Task
from fd_jax.training import account, metric_writer, signals, tracking
from fd_jax.training import lock as locks
from fd_jax.training import workdir as workdirs
from fd_jax.training.clock import Clock
from fd_jax.training.feeds import AnyFeed, open_data
from fd_jax.training.program import STOP, Program, build
from fd_jax.training.progress import NonFiniteError, Progress
from fd_jax.training.step import TrainState
from fd_jax.training.trace import Trace
from fd_jax.training.watch import Best, Watch, check_figure
from fd_jax.typing import Batch, Config, Metrics, PyTree

FIRST_STEPS = 10  # after which the time of all steps is estimated
PREEMPTED = 75  # exit status after SIGTERM: the state is saved, and the same command resumes


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of a run.

    Attributes:
      step: step that the run reached.
      preempted: whether SIGTERM stopped it.
      evaluation: its last evaluation, by name.
    """

    step: int
    preempted: bool
    evaluation: dict[str, float]


def fit(
    task: Task,
    config: Config,
    workdir: epath.PathLike,
    *,
    accept_config: bool = False,
    accept_data: bool = False,
    fall_back: bool = False,
    wandb: bool = False,
) -> Result:
    """Trains `task` to the end of its schedule, resuming from `workdir` if it has a checkpoint.

    The state comes from the first of these that exists:
      1. The latest complete checkpoint in `workdir`. Order of data and random numbers also resume.
      2. `task.load_initial()`: parts of a model folder; all other parameters are initialised.
      3. Initialised parameters.

    Args:
      task: task to train.
      config: config of the run; configs/base.py describes its fields.
      workdir: folder that receives config.json, data.json, checkpoints/, metrics.jsonl,
        tensorboard/ and model/.
      accept_config: whether to continue if the config differs from the one in `workdir`.
      accept_data: whether to continue if files of the data were added, removed or changed.
      fall_back: whether to continue from an earlier checkpoint if the latest is damaged.
      wandb: whether to log the run to Weights & Biases as well.

    Raises:
      UserError: the config, the data, the workdir or a model folder is invalid.
    """
    workdir = epath.Path(workdir)
    if wandb:
        tracking.check()
    with storage.one_message(workdir), contextlib.ExitStack() as resources:
        # This comes first because restoring and compiling take minutes, and because
        # jax.distributed installs a handler that would swallow the signal.
        stop_requested = resources.enter_context(signals.on_sigterm())
        settings.check(config)
        mesh = sharding.make_mesh(**config.mesh)
        feed = open_data(config, task)
        sharding.check_examples(feed.examples("train"), mesh)
        sharding.check_batch(config.batch_size, config.accumulation, mesh)
        task.check_data(feed)
        steps_per_epoch = feed.steps_per_epoch(config.batch_size)
        total_steps = settings.total_steps(config, steps_per_epoch)
        settings.check_neighbours(config, feed.examples("train"))
        if config.data.eval_split == config.data.split:
            say("note: data.eval_split is the training split, so its figures are not held out")
        recorded = _with_chosen_attention(config, task)
        workdirs.check(workdir, recorded, accept=accept_config)
        workdirs.check_checkpoints(workdir)
        contents = feed.contents()
        workdirs.check_data(workdir, contents, accept=accept_data)
        keep_best = config.eval.get("keep_best", "")
        for written in (workdirs.MODEL, *([workdirs.BEST] if keep_best else [])):
            model_folder.check_free(workdir / written, overwrite=True)
        lock = resources.enter_context(locks.held(workdir))
        program = build(
            task,
            config,
            mesh,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            elements=feed.elements,
            train_elements=feed.train_elements,
        )
        if keep_best:
            check_figure(keep_best, _figures(task, program, feed))
        peak = account.peak(program)
        say(
            account.at_start(
                config, program, feed, attention=task.attention, workdir=workdir, peak=peak
            )
        )
        for note in account.doubts(config, program, peak=peak):
            say(note)
        frozen = program.place_frozen(task.load_frozen())
        initial = None if workdirs.has_checkpoint(workdir) else task.load_initial()
        checkpoints = Checkpoints(
            workdir / workdirs.CHECKPOINTS,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every or None,
        )
        resources.enter_context(checkpoints)
        state, start, record = initial_state(
            task, program, checkpoints, config.seed, initial, fall_back=fall_back
        )
        del initial  # host memory that the run does not need
        # Comes after all that a user can get wrong, so a refused command claims no workdir.
        workdirs.claim(workdir, recorded, accept=accept_config)
        workdirs.claim_data(workdir, contents)
        rows = [row for row in metric_writer.read(workdir) if row["step"] <= start]
        tracker = tracking.start(workdir, recorded.to_dict()) if wandb else None
        writer = resources.enter_context(
            metric_writer.Writer(workdir, resume_step=start, tracker=tracker)
        )
        placement = Placement(mesh, config.batch_size)
        # This comes last because it starts threads and fills devices: nothing after it may fail.
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
            lock=lock,
            program=program,
            feed=feed,
            checkpoints=checkpoints,
            writer=writer,
            frozen=frozen,
            placement=placement,
            loader=loader,
            progress=Progress(record),
            watch=Watch(config, rows, total_steps),
            best=Best(keep_best, rows, workdir / workdirs.BEST),
            clock=Clock(batch_size=config.batch_size, start=start, total=total_steps),
            start=start,
            total_steps=total_steps,
            eval_every=settings.eval_every(config, steps_per_epoch),
        ).train(state, stop_requested)


def _figures(task: Task, program: Program, feed: AnyFeed) -> list[str]:
    """The names of what the evaluators of a run measure."""
    state = program.state
    weights = Weights(state.params, state.extra, program.frozen, state.ema)
    return [n for each in task.evaluators() for n in each.names(program, weights, feed)]


def initial_state(
    task: Task,
    program: Program,
    checkpoints: Checkpoints,
    seed: int,
    initial: PyTree | None = None,
    *,
    fall_back: bool = False,
) -> tuple[TrainState, int, dict[str, Any]]:
    """Returns the state that a run starts from, its step and the record of its checkpoint.

    The docstring of `fit` lists where the state comes from. `initial` is the result of
    `task.load_initial`, which is called if it is None and needed.
    """
    if checkpoints.steps():
        return _newest(program, checkpoints, fall_back=fall_back)
    initial = task.load_initial() if initial is None else initial
    return program.create(jax.random.key(seed), initial), 0, {}


def _newest(
    program: Program, checkpoints: Checkpoints, *, fall_back: bool
) -> tuple[TrainState, int, dict[str, Any]]:
    """The newest checkpoint; with `fall_back` the newest whole one, and damaged ones set aside."""
    damaged = []
    for step in reversed(checkpoints.steps()):
        try:
            tree, record = checkpoints.restore(step, program.state.to_dict())
        except DamagedCheckpointError as error:
            if not fall_back:
                raise
            say(f"note: {str(error).splitlines()[0]}; falling back")
            damaged.append(step)
            continue
        checkpoints.set_aside(damaged)
        say(f"resuming at step {step}")
        return TrainState.from_dict(tree), step, record
    raise CheckpointError(
        f"none of the checkpoints of steps {sorted(damaged)} is whole; use another workdir to "
        "start from the beginning"
    )


@dataclasses.dataclass(kw_only=True)
class Run:
    """The parts of a run, set up by `fit`, and the loop over its steps.

    Attributes:
      task, config, workdir: arguments of `fit`.
      lock: of the workdir, in the first process; None in the others.
      program: compiled functions of the task on its mesh.
      feed: data of the run.
      loader, placement: the training batches, and their placement onto the devices.
      checkpoints, writer: destinations of the state and of the metrics.
      frozen: frozen weights, on the mesh.
      progress, clock: measurements since the last line of the log.
      watch, best: what the log so far says about the run.
      start, total_steps: first step, and number of steps of the whole schedule.
      eval_every: number of steps between evaluations; 0 for none.
      resolutions: side of the training images at each step.
      logged: step of the last line of the log, or the first step.
    """

    task: Task
    config: Config
    workdir: epath.Path
    lock: locks.Lock | None
    program: Program
    feed: AnyFeed
    checkpoints: Checkpoints
    writer: metric_writer.Writer
    frozen: PyTree
    placement: Placement
    loader: TrainLoader
    progress: Progress
    watch: Watch
    best: Best
    clock: Clock
    start: int
    total_steps: int
    eval_every: int

    def __post_init__(self):
        mesh = self.program.mesh
        devices = list(mesh.devices.flat)
        self.utilization = Utilization(self.task.flops(), devices, mesh.local_devices)
        self.resolutions = Resolutions.of(self.config)
        self.logged = self.start

    def train(self, state: TrainState, stop_requested: Callable[[], bool]) -> Result:
        """Runs the remaining steps, and logs, saves and evaluates when these are due.

        Args:
          state: state at step `start`; its buffers are donated.
          stop_requested: returns whether this process received SIGTERM.
        """
        train_steps = self._compile()
        seed = self.program.place_seed(self.config.seed)
        evaluation = self._evaluation_at_start(state)
        pending = None  # metrics are read one step late, while the device runs the next step
        stop = False
        self.clock.start()
        with (
            contextlib.closing(self._trace()) as trace,
            bar(start=self.start, total=self.total_steps) as shown,
        ):
            for step in range(self.start, self.total_steps):
                trace.before(step, state)
                batch = self._next_batch(stop_requested())
                train_step = train_steps[self.resolutions.at(step)]
                state, metrics = train_step(state, self.frozen, batch, seed)
                trace.after(step, metrics)
                if pending is not None:
                    stop = self._read(step - 1, pending)
                pending = metrics
                if self._due(step + 1, self.config.log_every):
                    stop = self._read(step, pending) or stop
                    pending = None
                    self._log(step + 1, shown)
                shown.step()
                if step + 1 == self.start + FIRST_STEPS:
                    expected = self.clock.expected(step + 1)
                    say(f"all steps take about {expected}, and evaluations come on top")
                # Save before evaluating, which may take longer than a preemption allows.
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
        if stop:
            self.writer.preempted = True
        else:
            self._export(state)
        self.checkpoints.wait()
        return Result(step=reached, preempted=stop, evaluation=evaluation)

    def _compile(self) -> dict[int, Any]:
        """The compiled step for each side of the images of the steps that remain.

        All are compiled now: a size that does not fit into memory fails before the first step.
        """
        began = time.monotonic()
        say("compiling the step")
        if not self.resolutions.varies:
            native = self.resolutions.native
            steps = {native: self.program.compile_train_step(native)}
            what = "the step"
        else:
            sides = self.resolutions.between(self.start, self.total_steps)
            steps = {side: self.program.compile_train_step(side) for side in sides}
            what = f"the steps of {', '.join(map(str, sides))} px"
        say(f"compiled {what} in {time.monotonic() - began:.1f} s")
        return steps

    def _due(self, step: int, every: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.total_steps)

    def _trace(self) -> Trace:
        steps, folder = self.config.profile_steps, self.workdir / workdirs.PROFILE
        return Trace(folder, steps=steps, start=self.start, total=self.total_steps)

    def _next_batch(self, stop: bool) -> Batch:
        with self.clock.waiting():
            batch = next(self.loader)
        # A host that received SIGTERM sets a flag in its rows. Every host then reads the same sum
        # from the metrics of the same step, without extra communication.
        flags = np.full(len(self.placement.rows), stop, STOP.dtype)
        return batch | self.placement.put({"stop": flags})

    def _read(self, step: int, metrics: Metrics) -> bool:
        """Reads the metrics of one step; returns whether any host has to stop."""
        if self.resolutions.varies:
            side: Any = (float(self.resolutions.at(step)), 1.0)
            metrics = {**metrics, "image_size": side}
        stop = self.progress.add(metrics)
        in_a_row = self.progress.nonfinite_in_a_row
        if in_a_row >= self.config.max_nonfinite:
            rate, indices = float(self.program.schedule(step)), self.loader.indices(step)
            raise NonFiniteError(
                f"loss or gradients were not finite for {in_a_row} steps in a row, "
                f"the last at step {step} with learning rate {rate:.3g}; "
                f"its examples are {indices.tolist()}. Lower optim.peak_lr, set dtype=float32, or "
                "inspect these examples. The last checkpoint in the workdir is of an earlier step."
            )
        return stop

    def _log(self, step: int, shown: Bar) -> None:
        scalars = self.progress.means()
        scalars["learning_rate"] = float(self.program.schedule(step - 1))
        scalars |= self.clock.lap(step)
        scalars |= self.utilization.metrics(
            scalars["images_per_second"], self._mean_work(self.logged, step)
        )
        self.logged = step
        self.writer.write(step, scalars)
        state = (
            f"loss {scalars.get('loss', float('nan')):.5f}  lr {scalars['learning_rate']:.3g}  "
            f"{scalars['images_per_second']:.1f} images/s"
        )
        ahead = f"ETA {self.clock.remaining(step)}"
        shown.log(f"step {step}/{self.total_steps}  {state}  {ahead}", short=state)
        for note in self.watch.logged(step, scalars):
            say(note)

    def _mean_work(self, start: int, stop: int) -> float:
        """FLOPs of a mean image of these steps, over those of an image of the network's size."""
        if not self.resolutions.varies or not isinstance(self.task, Resizes):
            return 1.0
        sides = [self.resolutions.at(step) for step in range(start, stop)]
        work = {side: self.task.flops_at(side).model for side in set(sides)}
        native = self.task.flops_at(self.resolutions.native).model
        return sum(work[side] for side in sides) / len(sides) / native

    def _save(self, step: int, state: TrainState) -> None:
        self._check_workdir()
        saved = state.to_dict()
        known, wrong = digests.examine(saved)
        self._refuse_nonfinite(wrong)
        record = {
            "data": self.loader.state(step),
            "config": self.config.to_dict(),
            **self.progress.record(),
        }
        self.checkpoints.save(step, saved, record, known=known)

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        """Runs the evaluators of the task on the held-out split; returns their figures by name."""
        if self.feed.eval_dataset is None or not self.task.evaluators():
            return {}
        weights = Weights(state.params, state.extra, self.frozen, state.ema)
        evaluation = {}
        with self.clock.paused():
            for evaluator in self.task.evaluators():
                figures = evaluator(self.program, weights, self.feed)
                evaluation |= {f"eval_{name}": value for name, value in figures.items()}
        # Before the figures are written: a run that is killed here evaluates this step again.
        # The first process decides, because hosts may have read different versions of the log.
        if sharding.first_decides(self.best.improved_by(step, evaluation)):
            self._export_best(step, state)
        self.writer.write(step, evaluation)
        say(f"step {step}: " + "  ".join(f"{k} {v:.5f}" for k, v in evaluation.items()))
        for note in self.watch.evaluated(step, evaluation):
            say(note)
        return evaluation

    def _evaluation_at_start(self, state: TrainState) -> dict[str, float]:
        """Returns the evaluation of the step that the run resumes from, {} if none was due.

        It is read from the metrics, or done now if the run was interrupted before it finished.
        """
        if not self.start or not self._due(self.start, self.eval_every):
            return {}
        recorded = metric_writer.read_evaluation(self.workdir, self.start)
        # Hosts may read different versions of the file.
        if sharding.first_decides(not recorded):
            return self._evaluate(self.start, state)
        return recorded

    def _refuse_nonfinite(self, wrong: list[str]) -> None:
        """Nothing that holds NaNs is written: neither checkpoints nor models."""
        if wrong:
            kept = self.checkpoints.steps()
            last = (
                f"the last checkpoint, of step {kept[-1]}, is finite" if kept else "none is saved"
            )
            raise NonFiniteError(
                f"{len(wrong)} arrays of the training state hold NaNs or infinities "
                f"({first_few(wrong)}), "
                f"although loss and gradients were finite; nothing of it is saved, and {last}. "
                "Lower optim.peak_lr, raise optim.eps, or set dtype=float32"
            )

    def _check_workdir(self) -> None:
        """Refuses to write where the workdir is another run's, or no longer there.

        Orbax would make a new folder in the place of one that was moved away or unmounted.
        """
        if self.lock is None:
            return
        self.lock.check()
        if not (self.workdir / workdirs.CONFIG).exists():
            raise StorageError(storage.message(errno.ENOENT, str(self.workdir / workdirs.CONFIG)))

    def _export(self, state: TrainState) -> None:
        notes = ""
        if self.best.step is not None:
            notes = (
                f"step {self.total_steps}, the last one; by {self.best.name}, step "
                f"{self.best.step} was the best"
            )
        params = state.params if state.ema is None else state.ema
        self._write_model(workdirs.MODEL, params, state, notes)

    def _export_best(self, step: int, state: TrainState) -> None:
        params = state.ema if self.best.averaged else state.params
        notes = f"step {step}, the best one by {self.best.name}: {self.best.value:.5f}"
        self._write_model(workdirs.BEST, params, state, notes)

    def _write_model(self, name: str, params: PyTree, state: TrainState, notes: str) -> None:
        self._check_workdir()
        spec, parts = self.task.export(params, state.extra)
        self._refuse_nonfinite(digests.not_finite(parts))
        spec = dataclasses.replace(spec, notes=notes or spec.notes)
        model_folder.save(self.workdir / name, spec, parts, overwrite=True)


def _with_chosen_attention(config: Config, task: Task) -> Config:
    """Returns the config with "auto" attention replaced by the implementation in use.

    The workdir then records which one ran, and resuming it with a version that chooses another one
    is refused as a different config. "auto" stays for a network without attention.
    """
    chosen = next(iter(task.attention.values()))
    if config.attention != "auto" or chosen == kernels.NONE:
        return config
    resolved = ml_collections.ConfigDict(config.to_dict())
    resolved.attention = chosen
    return resolved
