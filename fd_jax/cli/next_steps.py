"""What a finished run leaves, and the commands to give next."""

from collections.abc import Sequence
import shlex

from etils import epath

from fd_jax import model_folder
from fd_jax.data import datasets
from fd_jax.errors import DataError
from fd_jax.tasks import registry
from fd_jax.training import metric_writer
from fd_jax.training import workdir as workdirs
from fd_jax.typing import Config


def at_end(config: Config, workdir: epath.PathLike, command: Sequence[str]) -> str:
    """The lines with which a run ends; every command in them works as it stands.

    Args:
      config: of the run.
      workdir: of the run.
      command: words of the command that trained, without that of the interpreter.
    """
    workdir = epath.Path(workdir)
    best = workdir / workdirs.BEST
    lines = [
        "finished",
        f"  model      {workdir / workdirs.MODEL}",
        *([f"  best       {best}, {_notes(best)}"] if best.exists() else []),
        f"  metrics    {workdir / metric_writer.FILE_NAME} and {workdir / 'tensorboard'}",
        f"  report     {workdir / 'report' / 'report.html'}, written by the first command below",
        "next",
    ]
    return "\n".join(lines + [f"  {text}" for text in commands(config, workdir, command)])


def _notes(folder: epath.Path) -> str:
    """Which step a model folder is of, and by which figure it was kept."""
    return model_folder.load_spec(folder).notes


def commands(config: Config, workdir: epath.Path, command: Sequence[str]) -> list[str]:
    """The commands of `at_end`."""
    kind = registry.kind_of(config)
    tracked = ["--wandb"] if "--wandb" in command else []
    found = [["-m", "fd_jax.report", f"--workdir={workdir}", *tracked]]
    if kind is registry.DISTILLATION and _labelled(config):
        found.append(_fine_tuning(config, workdir))
    if kind is not registry.SEGMENTATION:
        found.append(_features(config, workdir))
    if kind in (registry.CLASSIFICATION, registry.SEGMENTATION) and config.data.eval_split:
        untracked = [word for word in command if word not in tracked]
        found.append([*untracked, "--eval_only", "--per_class"])
    return [shlex.join(["python", *words]) for words in found]


def _labelled(config: Config) -> bool:
    """Whether a classifier can be trained and measured on the data of the run."""
    data = config.data
    try:
        dataset = datasets.open_dataset(data.name, data.split, data_dir=data.data_dir or None)
    except DataError:  # it vanished during the run, whose results are complete
        return False
    return bool(data.eval_split) and (dataset.num_classes or 0) > 1


def _fine_tuning(config: Config, workdir: epath.Path) -> list[str]:
    data = config.data
    given = {
        "data": data.name,
        "split": data.split,
        "eval_split": data.eval_split,
        **({"data_dir": data.data_dir} if data.data_dir else {}),
        "init_from": workdir / workdirs.MODEL,
    }
    listed = ",".join(f"{name}={value}" for name, value in given.items())
    return [
        "finetune.py",
        f"--config=configs/own_finetune.py:{listed}",
        f"--workdir={workdir.parent / f'{workdir.name}_finetuned'}",
    ]


def _features(config: Config, workdir: epath.Path) -> list[str]:
    data = config.data
    return [
        *("-m", "fd_jax.features"),
        f"--model={workdir / workdirs.MODEL}",
        f"--input={data.name}",
        f"--split={data.eval_split or data.split}",
        *([f"--data_dir={data.data_dir}"] if data.data_dir else []),
        *(["--exif"] if data.get("exif") else []),
        f"--output={workdir / 'features.npz'}",
    ]
