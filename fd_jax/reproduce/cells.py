"""Cells of result tables, and the commands that measure them."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from typing import Any

from etils import epath

TRAIN, FINETUNE = ("train.py",), ("finetune.py",)
DATA_DIR = "--config.data.data_dir="


@dataclasses.dataclass(frozen=True)
class Command:
    """One run of a training script, in a workdir of its own. It ends with a model folder there.

    Attributes:
      where: its workdir, relative to that of the reproduction.
      script: arguments of the Python interpreter that start the script.
      config: value of the flag --config.
      fields: (dotted name, value) of config fields to set. A `Command` as the value means the model
        folder that this command writes.
      source: converter source of the network that it reads from teachers/<source>; "" for none.
    """

    where: str
    script: tuple[str, ...]
    config: str
    fields: tuple[tuple[str, Any], ...] = ()
    source: str = ""

    @property
    def needs(self) -> "tuple[Command, ...]":
        """The commands whose model folders it reads."""
        return tuple(value for _, value in self.fields if isinstance(value, Command))

    def workdir(self, root: epath.PathLike) -> epath.Path:
        """Its workdir, below the workdir `root` of the reproduction."""
        return epath.Path(root) / self.where

    def model(self, root: epath.PathLike) -> epath.Path:
        """The model folder that it writes."""
        return self.workdir(root) / "model"

    def finished(self, root: epath.PathLike) -> bool:
        """Whether it has written its model folder, which is the last thing that a run does."""
        return (self.model(root) / "model.json").exists()

    def config_flags(self, root: epath.PathLike, extra: Sequence[str] = ()) -> list[str]:
        """The flags that describe the config.

        Args:
          root: workdir of the reproduction.
          extra: flags of the user that follow ours, so that they have the last word.
        """
        shown = [
            (name, value.model(root) if isinstance(value, Command) else value)
            for name, value in self.fields
        ]
        flags = [f"--config.{name}={value}" for name, value in shown]
        return [f"--config={self.config}", *flags, *extra]

    def arguments(self, root: epath.PathLike, extra: Sequence[str] = ()) -> list[str]:
        """All arguments of the Python interpreter; see `config_flags`."""
        flags = self.config_flags(root, extra)
        return [*self.script, *flags, f"--workdir={self.workdir(root)}"]


@dataclasses.dataclass(frozen=True)
class Diagnosis(Command):
    """One run of `python -m fd_jax.diagnose` on the model of another command.

    It measures attention distances, on the device or devices that training used.

    Attributes:
      data: dataset and split, as that command names them.
      images: number of images.
    """

    data: str = ""
    images: int = 0

    def figures(self, root: epath.PathLike) -> epath.Path:
        """The file with all numbers. Its folder is not the workdir, where the log is."""
        return self.workdir(root) / "figures" / "figures.json"

    def finished(self, root: epath.PathLike) -> bool:
        """Whether it has written its figures."""
        return self.figures(root).exists()

    def arguments(self, root: epath.PathLike, extra: Sequence[str] = ()) -> list[str]:
        """All arguments of the Python interpreter; of the user's flags, the data's folder."""
        (diagnosed,) = self.needs
        given = [flag for flag in extra if flag.startswith(DATA_DIR)]
        return [
            *self.script,
            f"--model=network={diagnosed.model(root)}",
            f"--data={self.data}",
            f"--data_dir={given[-1].removeprefix(DATA_DIR) if given else 'data'}",
            f"--num_images={self.images}",
            "--figures=distance",
            f"--output={self.figures(root).parent}",
        ]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One figure of a table, for each seed.

    Attributes:
      table: number of the paper's table, or the name of another one.
      row: name of the row.
      teacher: name of the teacher, or of the setting at CPU scale.
      change: what distinguishes the row, in words.
      default: row of the same table and teacher that it is compared with; may be itself.
      paper: (teacher, figure) of the paper for this row.
      seeds: seeds of the runs.
      runs: for each seed, the command that measures the figure.
      measure: "top1", the last top-1 accuracy in percent, or "spread", see `results.head_spread`.
    """

    table: str
    row: str
    teacher: str
    change: str
    default: str
    paper: tuple[tuple[str, float], ...]
    seeds: tuple[int, ...]
    runs: tuple[Command, ...]
    measure: str = "top1"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the paper's Tables 2 to 5 (docs/reference.md#ablations).

    Attributes:
      table: number of the table.
      name: name of the row, as configs/ablations.py has it.
      change: what distinguishes the row, in words.
      fields: config fields of the distillation that differ from the default.
      paper: the paper's top-1 after fine-tuning by teacher, where it has one.
    """

    table: str
    name: str
    change: str
    fields: Mapping[str, Any]
    paper: Mapping[str, float]


ROWS = (
    Row(
        "2",
        "logits",
        "class distribution of the teacher's head",
        {"target.kind": "logits"},
        {"deit": 81.9},
    ),
    Row(
        "2",
        "cls",
        "class token only",
        {"target.kind": "cls"},
        {"clip": 81.7, "dino": 82.2, "deit": 78.0},
    ),
    Row(
        "2",
        "gap",
        "mean patch token",
        {"target.kind": "gap"},
        {"clip": 83.4, "dino": 82.8, "deit": 82.0},
    ),
    Row("2", "full", "full map", {}, {"clip": 84.3, "dino": 83.6, "deit": 82.7}),
    Row(
        "3",
        "none",
        "target as it is",
        {"target.normalize": "none"},
        {"clip": 83.5, "dino": 83.4, "deit": 81.7},
    ),
    Row(
        "3",
        "l2",
        "tokens scaled to length 1",
        {"target.normalize": "l2"},
        {"clip": 83.9, "dino": 83.6, "deit": 81.6},
    ),
    Row("3", "whiten", "tokens whitened", {}, {"clip": 84.3, "dino": 83.6, "deit": 82.7}),
    Row(
        "4",
        "ape",
        "absolute positions",
        {"student.arch.position": "ape"},
        {"clip": 84.0, "dino": 83.4, "deit": 82.3},
    ),
    Row(
        "4",
        "rpb",
        "position bias in each block",
        {"student.arch.position": "rpb"},
        {"clip": 83.9, "dino": 83.6, "deit": 82.6},
    ),
    Row("4", "shared_rpb", "shared position bias", {}, {"clip": 84.3, "dino": 83.6, "deit": 82.7}),
    Row(
        "5",
        "0.1",
        "student's drop path 0.1",
        {"student.drop_path": 0.1},
        {"clip": 84.3, "dino": 83.2, "deit": 82.4},
    ),
    Row(
        "5",
        "0.2",
        "student's drop path 0.2",
        {"student.drop_path": 0.2},
        {"clip": 84.0, "dino": 83.6, "deit": 82.7},
    ),
    Row(
        "5",
        "0.3",
        "student's drop path 0.3",
        {"student.drop_path": 0.3},
        {"dino": 83.6, "deit": 81.9},
    ),
    Row(
        "5",
        "teacher",
        "teacher's drop path 0.1",
        {"teacher.drop_path": 0.1},
        {"clip": 84.0, "dino": 83.6},
    ),
)
# The default rows of Tables 2 to 4. That of Table 5 depends on the teacher.
DEFAULTS = {"2": "full", "3": "whiten", "4": "shared_rpb"}


def commands(cells: Iterable[Cell]) -> list[Command]:
    """Every command that the cells need, once and after those whose models it reads."""
    ordered: dict[Command, None] = {}

    def add(command: Command) -> None:
        for needed in command.needs:
            add(needed)
        ordered[command] = None

    for cell in cells:
        for run in cell.runs:
            add(run)
    return list(ordered)
