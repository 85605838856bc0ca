"""Writing and reading the metrics of a run; the only module that uses clu."""

from collections.abc import Mapping
import json
from typing import Self

from etils import epath
import jax
import numpy as np

from fd_jax import console, files
from fd_jax.errors import CheckpointError
from fd_jax.training import tracking

FILE_NAME = "metrics.jsonl"


class Writer:
    """Writes scalars to `metrics.jsonl`, TensorBoard and a tracker; only the first process writes.

    Args:
      workdir: folder that receives the first two.
      resume_step: step from which the run resumes; rows of later steps, which an interrupted run
        left, are removed.
      tracker: also receives each row, and is finished with the run; None for none.

    Attributes:
      preempted: whether the run was asked to stop; set before its end.
    """

    def __init__(
        self, workdir: epath.Path, *, resume_step: int, tracker: tracking.Tracker | None = None
    ):
        self._path = workdir / FILE_NAME
        self.preempted = False
        self._tracker = tracker
        self._board = None
        if jax.process_index() != 0:
            return
        with console.quiet():  # it imports TensorFlow, so only the writing process does this
            from clu import metric_writers

        self._board = metric_writers.AsyncWriter(
            metric_writers.SummaryWriter(str(workdir / "tensorboard"))
        )
        kept = [row for row in read(workdir) if row["step"] <= resume_step]
        files.write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes named numbers of one step (1 = after the first update)."""
        if self._board is None:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        # TensorFlow keeps every Python number that becomes a tensor: a megabyte for 80 rows.
        numbers = {name: np.float32(value) for name, value in scalars.items()}
        self._board.write_scalars(np.int64(step), numbers)  # type: ignore[arg-type]
        if self._tracker is not None:
            self._tracker.log({"step": step, **scalars})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *details: object) -> None:
        """Flushes what TensorBoard has not written yet, and finishes the tracker."""
        if self._board is not None:
            self._board.close()
        if self._tracker is not None:
            self._tracker.finish(failed=error is not None, preempted=self.preempted)


def read(workdir: epath.PathLike) -> list[dict[str, float]]:
    """Reads all complete rows of `metrics.jsonl`, oldest first; [] if the file does not exist.

    Raises:
      CheckpointError: a row is damaged; the message names its line.
    """
    path = epath.Path(workdir) / FILE_NAME
    if not path.exists():
        return []
    try:
        # A run of a million steps may log each of them.
        lines = files.read_text(path, any_size=True).splitlines(keepends=True)
        # An interrupted run left the last row incomplete, which has no end of line then.
        complete = [line for line in lines if line.endswith("\n")]
        return [_row(line, number) for number, line in enumerate(complete, start=1)]
    except ValueError as error:
        raise CheckpointError(
            f"{path} {error}: it is damaged. Delete what is wrong with an editor, or move the file "
            "away; the run then resumes without its earlier figures"
        ) from error


def _row(line: str, number: int) -> dict[str, float]:
    try:
        row = files.parse_object(line)
    except ValueError as error:
        raise ValueError(f"line {number} {error}") from error
    if type(row.get("step")) is not int:
        raise ValueError(f"line {number} has no step")
    for name, value in row.items():
        if type(value) not in (int, float):
            raise ValueError(f"line {number} has {name}={value!r:.40}, which is no number")
    return row


def read_evaluation(workdir: epath.PathLike, step: int) -> dict[str, float]:
    """Reads the evaluation after `step` updates, by name; {} if there was none."""
    rows = [row for row in read(workdir) if row["step"] == step]
    return {k: v for row in rows for k, v in row.items() if k.startswith("eval_")}
