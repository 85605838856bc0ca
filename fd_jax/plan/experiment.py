"""Creates the task of a config without weights or data.

The spec of each network that a run would read from a model folder comes from that folder if it
exists, else from a converter source ("openai_clip_vit_b16"), else from the config file of the
distillation that would produce the network.
"""

import dataclasses
import importlib.util
import pathlib

from etils import epath
import ml_collections

from fd_jax import model_folder, settings
from fd_jax.convert import families
from fd_jax.cost.flops import Flops
from fd_jax.data.resolutions import Resolutions
from fd_jax.errors import ConfigError
from fd_jax.models import kernels
from fd_jax.models.spec import ModelSpec
from fd_jax.tasks import registry
from fd_jax.tasks.base import Resizes, Task
from fd_jax.typing import Config

# Number of training images by dataset and split, for the datasets in configs/.
EXAMPLES = {("imagenet2012", "train"): 1_281_167, ("ade20k", "training"): 20_210}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run that is planned.

    Attributes:
      task: task to train.
      config: settings of the run; the dtype "auto" is replaced by that of TPUs.
      networks: (role, origin of its spec) of each network that the run would read.
      examples: number of images in an epoch, or None if unknown, where the config counts steps.
      steps_per_epoch: number of full batches in an epoch.
      total_steps: number of optimizer steps.
    """

    task: Task
    config: Config
    networks: tuple[tuple[str, str], ...]
    examples: int | None
    steps_per_epoch: int
    total_steps: int

    @property
    def resolutions(self) -> Resolutions:
        """Sides of the training images, of which the largest is planned."""
        return Resolutions.of(self.config)

    @property
    def mean_share(self) -> float:
        """FLOPs of a mean training image of the run, over those of one of the largest size."""
        if not self.resolutions.varies or not isinstance(self.task, Resizes):
            return 1.0
        task, largest = self.task, self.work.executed
        shares = self.resolutions.shares(self.total_steps)
        return sum(part * task.flops_at(side).executed / largest for side, part in shares.items())

    @property
    def work(self) -> Flops:
        """FLOPs of a step, per image; per image of the largest size where sizes vary.

        Raises:
          ConfigError: the task has no closed form, which a plan compares with the program.
        """
        task, sides = self.task, self.resolutions
        if sides.varies and isinstance(task, Resizes):
            return task.flops_at(sides.every[-1])
        work = task.flops()
        if work is None:
            raise ConfigError(
                f"{type(self.task).__name__}.flops() returns no closed form, but a plan needs one"
            )
        return work


def define(config: Config, *, start: str = "", examples: int | None = None) -> Experiment:
    """The experiment of a config of `configs/`.

    Args:
      config: config of any task in `tasks.registry`.
      start: replaces `config.init_from` if that folder does not exist: a converter source or the
        path of a distillation's config file.
      examples: number of images in an epoch, for datasets that are not in `EXAMPLES`.

    Raises:
      UserError: a network or the number of images is unknown, or the settings cannot work together.
    """
    config = ml_collections.ConfigDict(config.to_dict())
    if config.dtype == "auto":
        config.dtype = "bfloat16"
    steps_per_epoch, total_steps, examples = _run_length(config, examples)
    config = ml_collections.FrozenConfigDict(config)
    specs, origins = {}, []
    for network in registry.kind_of(config).networks(config):
        spec, origin = _resolve(network, start)
        origins.append((network.role, origin))
        if spec is not None:
            specs[network.role] = spec
    with kernels.compiling_for("tpu"):
        task = registry.make(config, specs)
    return Experiment(task, config, tuple(origins), examples, steps_per_epoch, total_steps)


def _run_length(config: Config, examples: int | None) -> tuple[int, int, int | None]:
    """(steps per epoch, total steps, images per epoch or None)."""
    if examples is None:
        examples = EXAMPLES.get((config.data.name, config.data.split))
    if examples is None and not config.steps:
        raise ConfigError(
            f"the number of images in the split {config.data.split!r} of {config.data.name} is "
            "unknown without the data: set it with --examples=N"
        )
    if examples is not None and examples < config.batch_size:
        raise ConfigError(
            f"batch_size {config.batch_size} is more than the {examples} images of an epoch"
        )
    if examples is None:
        return 1, config.steps, examples
    per_epoch = examples // config.batch_size
    return per_epoch, settings.total_steps(config, per_epoch), examples


def _resolve(network: registry.Network, start: str) -> tuple[ModelSpec | None, str]:
    """(spec of a network, origin of the spec); the spec is None for random weights.

    Args:
      network: network that the run reads.
      start: replaces the folder of a network whose source the config has no field for.
    """
    if network.path and (epath.Path(network.path) / "model.json").exists():
        return model_folder.load_spec(network.path), network.path
    source = start if network.source is None else network.source
    if source.endswith(".py"):
        return _distilled_spec(source), f"the student of {source}"
    if source:
        spec = _source_spec(source)
        if network.needs_head and not spec.classes:
            # The real head is in the checkpoint file; assume that of ImageNet.
            spec = dataclasses.replace(spec, classes=1000)
        return spec, f"converter source {source}"
    if network.optional:
        return None, "random weights"
    if network.field:
        raise ConfigError(
            f"there is no {network.role} at {network.path}; to plan without it, set "
            f"--config.{network.field} to its converter source"
        )
    raise ConfigError(
        f"there is no model folder at init_from={network.path!r}; to plan without it, say "
        "what the run would start from: --start=configs/distill_clip_vit_b16.py (its student) or "
        "--start=openai_clip_vit_b16 (a converter source)"
    )


def _source_spec(name: str) -> ModelSpec:
    source = families.get(name)
    return dataclasses.replace(source.parts[source.default_part].spec, source=name)


def _distilled_spec(path: str) -> ModelSpec:
    """The spec of the student that a distillation's config file describes."""
    file = pathlib.Path(path)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not file.exists() or spec is None or spec.loader is None:
        raise ConfigError(f"--start={path}: there is no such config file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config() if hasattr(module, "get_config") else None
    if config is None or registry.kind_of(config) is not registry.DISTILLATION:
        raise ConfigError(f"--start={path} is not a distillation config: it has no student")
    arch = config.student.arch.to_dict()
    return ModelSpec(config.student.family, arch, source=f"distilled by {path}")
