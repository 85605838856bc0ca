"""(sum, count) arithmetic, and where figures go: the only file that knows clu."""

import collections
from collections.abc import Mapping
import datetime
import json
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp

from fd_jax import files

FILE_NAME = "metrics.jsonl"


def weighted(values: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum, count) of per-example values [B] under the weights [B]."""
    return jnp.sum(values * weight), jnp.sum(weight)


class Mean:
    """Adds up (sum, count) pairs by name and divides once.

    Args:
      totals: of another one, to go on from.
    """

    def __init__(self, totals: Mapping[str, list[float]] | None = None):
        self._totals = collections.defaultdict(lambda: [0.0, 0.0], totals or {})

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Adds the metrics of one step; reads them from the device."""
        for name, (total, count) in jax.device_get(dict(metrics)).items():
            self._totals[name][0] += float(total)
            self._totals[name][1] += float(count)

    def totals(self) -> dict[str, list[float]]:
        """[sum, count] by name, JSON-able."""
        return dict(self._totals)

    def result(self) -> dict[str, float]:
        """The weighted mean of everything added; names without any weight are left out."""
        return {name: total / count for name, (total, count) in self._totals.items() if count}


class Writer:
    """Writes scalars to `metrics.jsonl` and TensorBoard; only the first process writes.

    Args:
      workdir: both stand in it.
      resume_step: figures of later steps, left by a run that was cut off, are removed.
    """

    def __init__(self, workdir: epath.Path, *, resume_step: int):
        self._path = workdir / FILE_NAME
        self._board = None
        if jax.process_index() != 0:
            return
        from clu import metric_writers  # imports TensorFlow; wanted only where something is written

        self._board = metric_writers.AsyncWriter(
            metric_writers.SummaryWriter(str(workdir / "tensorboard"))
        )
        kept = [row for row in read(workdir) if row["step"] <= resume_step]
        files.write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records named figures of one step (1 = after the first update)."""
        if self._board is None:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._board.write_scalars(step, dict(scalars))

    def close(self) -> None:
        """Flushes what is still on its way to TensorBoard."""
        if self._board is not None:
            self._board.close()


def read(workdir: epath.PathLike) -> list[dict[str, float]]:
    """Every complete row of a workdir's `metrics.jsonl`, oldest first; [] where there is none."""
    path = epath.Path(workdir) / FILE_NAME
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # a row that was cut off with its run
    return rows


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))
