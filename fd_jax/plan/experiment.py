"""From a config to the task it trains, with neither weights nor data at hand.

Networks that a run would read from model folders are named: the folder itself where it exists, else
a converter source ("openai_clip_vit_b16"), else the config file of the distillation that would make
it.
"""

import dataclasses
import importlib.util
import pathlib

from etils import epath
import ml_collections

from fd_jax import model_folder
from fd_jax.convert import families
from fd_jax.cost.flops import Flops
from fd_jax.errors import ConfigError, check_positive
from fd_jax.models import kernels
from fd_jax.models.spec import ModelSpec
from fd_jax.tasks import registry
from fd_jax.tasks.base import Task
from fd_jax.typing import Config

# Training images by dataset and split, for those that a config names.
EXAMPLES = {("imagenet2012", "train"): 1_281_167}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run as it would be.

    Attributes:
      task: what it trains.
      config: its settings, with the dtype of TPUs where it says "auto".
      networks: each network that would be read: (role, where its description came from).
      examples: images in an epoch, or None where the config counts steps.
      steps_per_epoch: full batches in an epoch.
      total_steps: updates.
    """

    task: Task
    config: Config
    networks: tuple[tuple[str, str], ...]
    examples: int | None
    steps_per_epoch: int
    total_steps: int

    @property
    def work(self) -> Flops:
        """FLOPs of a step, per image.

        Raises:
          ConfigError: no closed form is known, so that there is nothing to compare with.
        """
        work = self.task.flops()
        if work is None:
            raise ConfigError(
                f"{type(self.task).__name__}.flops() gives no closed form, which a plan needs"
            )
        return work


def define(config: Config, *, start: str = "", examples: int | None = None) -> Experiment:
    """The experiment of a config of `configs/`.

    Args:
      config: of any task in `tasks.registry`.
      start: replaces `config.init_from` where that folder does not exist: a converter source or
        the path of a distillation's config file.
      examples: images in an epoch, for data that is neither known nor here.

    Raises:
      UserError: a network or the number of images is not known, or the settings do not fit.
    """
    config = ml_collections.ConfigDict(config.to_dict())
    if config.dtype == "auto":
        config.dtype = "bfloat16"
    steps_per_epoch, total_steps, examples = _length(config, examples)
    config = ml_collections.FrozenConfigDict(config)
    specs, origins = {}, []
    for network in registry.kind_of(config).networks(config):
        spec, origin = _find(network, start)
        origins.append((network.role, origin))
        if spec is not None:
            specs[network.role] = spec
    with kernels.compiling_for("tpu"):
        task = registry.make(config, specs)
    return Experiment(task, config, tuple(origins), examples, steps_per_epoch, total_steps)


def _length(config: Config, examples: int | None) -> tuple[int, int, int | None]:
    """Steps per epoch, steps in all, images per epoch."""
    check_positive("batch_size", config.batch_size)
    if examples is None:
        examples = EXAMPLES.get((config.data.name, config.data.split))
    if examples is None and not config.steps:
        raise ConfigError(
            f"how many images the split {config.data.split!r} of {config.data.name} has is not "
            "known without the data: name it with --examples=N"
        )
    if examples is not None and examples < config.batch_size:
        raise ConfigError(
            f"batch_size {config.batch_size} is more than the {examples} images of an epoch"
        )
    per_epoch = 1 if examples is None else examples // config.batch_size
    return per_epoch, config.steps or round(config.epochs * per_epoch), examples


def _find(network: registry.Network, start: str) -> tuple[ModelSpec | None, str]:
    """The spec of a network and where it came from; None for random weights.

    Args:
      network: that the run reads.
      start: replaces the folder of a network whose source no field of the config names.
    """
    if network.path and (epath.Path(network.path) / "model.json").exists():
        return model_folder.load_spec(network.path), network.path
    source = start if network.source is None else network.source
    if source.endswith(".py"):
        return _student(source), f"the student of {source}"
    if source:
        spec = _of_source(source)
        if network.needs_head and not spec.classes:
            # The head comes from the file, which is not here: ImageNet's.
            spec = dataclasses.replace(spec, classes=1000)
        return spec, f"converter source {source}"
    if network.optional:
        return None, "random weights"
    if network.role == registry.TEACHER:
        raise ConfigError(
            f"there is no teacher at {network.path}; to plan without it, name its converter "
            "source in --config.teacher.source"
        )
    raise ConfigError(
        f"there is no model folder at init_from={network.path!r}; to plan without it, name "
        "what the run would start from: --start=configs/distill_clip_vit_b16.py (its student) or "
        "--start=openai_clip_vit_b16 (a converter source)"
    )


def _of_source(name: str) -> ModelSpec:
    source = families.get(name)
    return dataclasses.replace(source.parts[source.default_part].spec, source=name)


def _student(path: str) -> ModelSpec:
    file = pathlib.Path(path)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not file.exists() or spec is None or spec.loader is None:
        raise ConfigError(f"--start={path}: there is no such config file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config() if hasattr(module, "get_config") else None
    if config is None or registry.kind_of(config) is not registry.DISTILLATION:
        raise ConfigError(f"--start={path} is not the config of a distillation: it has no student")
    arch = config.student.arch.to_dict()
    return ModelSpec(config.student.family, arch, source=f"distilled by {path}")
