"""Looks at the figures of a run as they come: whether it gets nowhere, and which step was best."""

from collections.abc import Mapping, Sequence
import math

from etils import epath

from fd_jax import model_folder
from fd_jax.errors import ConfigError
from fd_jax.typing import Config

ROUNDS = 3  # evaluations in a row, each worse than the one before
NEAR_CHANCE = 0.1  # share of log K
LOWER_IS_BETTER = "loss"  # ending of names; of other figures, a higher one is better
EVALUATION = "eval_"

Rows = Sequence[Mapping[str, float]]


class Watch:
    """Says once what is wrong with a run that goes on.

    Args:
      config: of the run.
      rows: what its log holds so far, see `metric_writer.read`.
      total_steps: number of its steps.
    """

    def __init__(self, config: Config, rows: Rows, total_steps: int):
        self._total, self._noted = total_steps, set[str]()
        self._losses = [row["loss"] for row in rows if "loss" in row]
        self._name = EVALUATION + (config.eval.get("keep_best", "") or _usual(config))
        self._points = [(int(r["step"]), r[self._name]) for r in rows if self._name in r]
        self._peak_lr = config.optim.peak_lr
        probe = "model" in config and config.model.trains == "head"
        self._chance = math.log(config.model.classes) if probe else None

    def logged(self, step: int, scalars: Mapping[str, float]) -> list[str]:
        """Notes on the losses so far; `scalars` are those of the step's line of the log."""
        if "loss" in scalars:
            self._losses.append(scalars["loss"])
        if self._chance is None or step < self._total / 2 or not self._losses:
            return []
        if any(abs(loss - self._chance) > NEAR_CHANCE * self._chance for loss in self._losses):
            return []
        return self._once(
            f"note: after {step} of {self._total} steps, the probe's loss is still near "
            f"{self._chance:.3f}, that of a guess; raise optim.peak_lr={self._peak_lr:g} (which is "
            "for optim.lr_batch pictures), train longer, or look at the labels",
            "chance",
        )

    def evaluated(self, step: int, evaluation: Mapping[str, float]) -> list[str]:
        """Notes on the evaluations so far; `evaluation` is that of the step."""
        if self._name not in evaluation:
            return []
        self._points.append((step, evaluation[self._name]))
        last = self._points[-ROUNDS - 1 :]
        worse = [better(self._name, a[1], b[1]) for a, b in zip(last[:-1], last[1:], strict=True)]
        if len(worse) < ROUNDS or not all(worse):
            return []
        return self._once(
            f"note: {self._name} has got worse {ROUNDS} times in a row, from {last[0][1]:.5f} at "
            f"step {last[0][0]} to {last[-1][1]:.5f}; a shorter run or a lower rate may be better, "
            f"and eval.keep_best={self._name.removeprefix(EVALUATION)} keeps the best weights",
            "worse",
        )

    def _once(self, note: str, kind: str) -> list[str]:
        if kind in self._noted:
            return []
        self._noted.add(kind)
        return [note]


class Best:
    """The best evaluation so far by the figure that `eval.keep_best` names.

    Of evaluations with the same figure, that with the lower loss is the better one: on few pictures
    an accuracy often stays the same while the network still improves.

    Args:
      name: of the figure, such as "top1"; "" for none.
      rows: what the log of the run holds so far.
      folder: model folder of the best evaluation. Rows count only if it was written by this figure,
        which may have been chosen later than they were. None counts them all.

    Attributes:
      step, value, loss: of the best evaluation; step is None before the first one. The loss is NaN
        if it is not measured.

    Raises:
      ModelFolderError: the folder is damaged.
    """

    def __init__(self, name: str, rows: Rows, folder: epath.Path | None = None):
        self.name = name
        self.step: int | None = None
        self.value = self.loss = math.nan
        for row in rows if folder is None or _is_by(name, folder) else ():
            if EVALUATION + name in row:
                self._keep_if_better(int(row["step"]), row)

    @property
    def averaged(self) -> bool:
        """Whether the figure is that of the moving average of the weights."""
        return self.name.startswith("ema_")

    def improved_by(self, step: int, evaluation: Mapping[str, float]) -> bool:
        """Whether an evaluation is the best one so far, which then is remembered.

        Raises:
          ConfigError: the run does not measure such a figure.
        """
        if not self.name:
            return False
        check_figure(self.name, [name.removeprefix(EVALUATION) for name in evaluation])
        return self._keep_if_better(step, evaluation)

    def _keep_if_better(self, step: int, evaluation: Mapping[str, float]) -> bool:
        value = evaluation[EVALUATION + self.name]
        loss = evaluation.get(EVALUATION + ("ema_loss" if self.averaged else "loss"), math.nan)
        first = self.step is None and not math.isnan(value)
        tie = value == self.value and better("loss", loss, self.loss)
        if first or tie or better(self.name, value, self.value):
            self.step, self.value, self.loss = step, value, loss
            return True
        return False


def check_figure(name: str, measured: Sequence[str]) -> None:
    """Refuses a figure of `eval.keep_best` that is not one of those that a run measures.

    Raises:
      ConfigError: it is not.
    """
    if name not in measured:
        raise ConfigError(
            f"eval.keep_best={name!r}, but this run measures {', '.join(measured) or 'nothing'}; "
            "choose one of them, or '' for none"
        )


def better(name: str, value: float, than: float) -> bool:
    """Whether a value of a figure is better than another one; NaN is not."""
    return value < than if lower_is_better(name) else value > than


def lower_is_better(name: str) -> bool:
    """Whether a figure is a loss. That of one of several teachers is called "loss/clip", say."""
    return name.partition("/")[0].endswith(LOWER_IS_BETTER)


def _is_by(name: str, folder: epath.Path) -> bool:
    """Whether a folder holds the best weights by a figure, according to its notes."""
    if not (folder / "model.json").exists():
        return False
    return f"the best one by {name}:" in model_folder.load_spec(folder).notes


def _usual(config: Config) -> str:
    return "miou" if "segment" in config else "loss"
