"""What a run says about itself before its first step, and what in its settings trains nothing."""

from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from fd_jax import settings
from fd_jax.data import datasets
from fd_jax.data.resolutions import Resolutions
from fd_jax.data.stored import description
from fd_jax.tasks import registry, stored
from fd_jax.training.feeds import AnyFeed
from fd_jax.training.program import Program
from fd_jax.typing import Config, PyTree

# Share of optim.peak_lr below which the scaled rate is doubtful, and share of the run above which
# the warm-up is.
LITTLE_RATE = 0.1
LONG_WARMUP = 0.5
FEW = 200  # held-out pictures below which one of them is half a point of accuracy or more


def at_start(
    config: Config,
    program: Program,
    feed: AnyFeed,
    *,
    attention: dict[str, str],
    workdir: epath.Path,
    peak: tuple[float, int],
) -> str:
    """The block of lines with which a run begins.

    Args:
      config: of the run.
      program: of the run.
      feed: its data.
      attention: attention implementation by network.
      workdir: its folder.
      peak: see the function of that name.
    """
    rate, warmup = peak
    frozen = count(program.frozen)
    steps_per_epoch = feed.steps_per_epoch(config.batch_size)
    epochs = program.total_steps / steps_per_epoch
    facts = {
        "task": f"{registry.kind_of(config).name}: {_millions(count(program.state.params))} "
        f"parameters are trained{f', {_millions(frozen)} are frozen' if frozen else ''}",
        "devices": _devices(program),
        "data": found(feed),
        **_targets(config),
        "batch": f"{config.batch_size} pictures of {Resolutions.of(config).describe()}, "
        f"{steps_per_epoch} steps an epoch",
        "peak rate": f"{rate:.3g} after {warmup} steps of warm-up{_scaled_from(config)}",
        "steps": f"{program.total_steps} ({epochs:.4g} epochs)",
        "intervals": _intervals(config, steps_per_epoch),
        "attention": ", ".join(f"{network} {name}" for network, name in attention.items()),
        "workdir": str(workdir),
    }
    return "\n".join(f"  {name:<10} {text}" for name, text in facts.items())


def _scaled_from(config: Config) -> str:
    """What the peak rate is scaled from, where the batch is another one."""
    if config.batch_size == config.optim.lr_batch:
        return ""
    return f" ({config.optim.peak_lr:g} for {config.optim.lr_batch} pictures)"


def _targets(config: Config) -> dict[str, str]:
    """The stored targets of a run; {} if all of its teachers run."""
    if registry.kind_of(config) is not registry.DISTILLATION:
        return {}
    named = [(f, description.read(f)) for f in stored.folders(config).values()]
    lines = [
        f"{folder}: {made.codec.kind} maps of {made.teacher['source']}, {made.views.number} "
        f"view{'s' if made.views.number > 1 else ''} of each picture"
        for folder, made in named
    ]
    return {"targets": "; ".join(lines)} if lines else {}


def _intervals(config: Config, steps_per_epoch: int) -> str:
    """How often the run evaluates, saves and logs."""
    every = settings.eval_every(config, steps_per_epoch)
    evaluated = f"evaluated every {every} steps" if config.data.eval_split and every else ""
    saved = f"saved every {config.checkpoint.every}" if config.checkpoint.every else ""
    logged = f"logged every {config.log_every}"
    return ", ".join(filter(None, (evaluated, saved, logged)))


def found(feed: AnyFeed) -> str:
    """What each split holds; of folders also what is not read in them."""
    splits = [_split(feed.train_dataset)]
    if feed.eval_dataset is not None:
        splits.append(held_out(feed))
    return "; ".join(splits)


def held_out(feed: AnyFeed) -> str:
    """What the held-out split holds; of a few pictures also what one of them counts."""
    dataset = feed.eval_dataset
    assert dataset is not None
    one = f" (one is {100 / len(dataset):.2g} points)" if len(dataset) < FEW else ""
    return f"held out: {_split(dataset)}{one}"


def _split(dataset: Any) -> str:
    source = datasets.original(dataset)
    if isinstance(source, datasets.FolderDataset):
        return str(source.contents)
    classes = getattr(dataset, "num_classes", None)
    labelled = f"; {classes:,} classes" if classes else ""
    return f"{dataset.name}: {len(dataset):,} pictures{labelled}"


def doubts(config: Config, program: Program, *, peak: tuple[float, int]) -> list[str]:
    """Notes on settings with which a run is allowed, but hardly trains anything."""
    rate, warmup = peak
    notes = []
    if rate < LITTLE_RATE * config.optim.peak_lr:
        notes.append(
            f"note: the learning rate reaches only {rate:.3g}, because optim.peak_lr="
            f"{config.optim.peak_lr:g} is for {config.optim.lr_batch} pictures and a batch has "
            f"{config.batch_size}; for few pictures, set optim.lr_batch to the batch size and "
            "choose optim.peak_lr for it"
        )
    if warmup > LONG_WARMUP * program.total_steps:
        field = "warmup_steps" if "warmup_steps" in config.optim else "warmup_epochs"
        notes.append(
            f"note: the warm-up takes {warmup} of {program.total_steps} steps; lower "
            f"optim.{field}={config.optim[field]:g}, or train longer"
        )
    return [*notes, *_without_teacher(config)]


def _without_teacher(config: Config) -> list[str]:
    """What is not measured where a teacher does not run."""
    if registry.kind_of(config) is not registry.DISTILLATION or not config.data.eval_split:
        return []
    held_out = stored.folders(config, stored.HELD_OUT)
    folders = [f for name, f in stored.folders(config).items() if name not in held_out]
    if not folders:
        return []
    return [
        "note: loss and similarity on held-out pictures are left out: the targets in "
        f"{' and '.join(folders)} are of training pictures, and their teacher does not run. Set "
        "eval_targets to a folder of python -m fd_jax.targets --held_out, or eval.knn, which needs "
        "no teacher"
    ]


def count(tree: PyTree) -> int:
    """Number of values in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def peak(program: Program) -> tuple[float, int]:
    """The highest learning rate of the run, and its first step that has it."""
    rates = np.asarray(program.schedule(jnp.arange(program.total_steps)))
    return float(rates.max()), int(rates.argmax())


def _devices(program: Program) -> str:
    devices = list(program.mesh.devices.flat)
    axes = ", ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{len(devices)} x {devices[0].device_kind}{processes}, mesh {axes}"


def _millions(number: int) -> str:
    return f"{number / 1e6:.3g} M"
