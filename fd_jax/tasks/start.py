"""A task that goes on from a trained network: its folder or architecture, and rates per layer."""

from collections.abc import Collection, Mapping
from typing import Any

from etils import epath
import jax

from fd_jax import model_folder, optimizer
from fd_jax.console import say
from fd_jax.errors import ConfigError
from fd_jax.models import transfer
from fd_jax.models.spec import FAMILIES, ModelSpec
from fd_jax.tasks.encoder import share_of
from fd_jax.typing import Config, PyTree


def initial_spec(config: Config, section: str) -> ModelSpec:
    """The spec in the folder `init_from`, or that of the random network in the config.

    Args:
      config: config of a run.
      section: its section with `family`, `arch` and `trains`.

    Raises:
      ConfigError: there is neither, or a random encoder would not be trained.
      ModelFolderError: there is no model at `init_from`.
    """
    chosen = config[section]
    if config.init_from:
        return model_folder.load_spec(epath.Path(config.init_from))
    if chosen.trains == "head":
        raise ConfigError(f"{section}.trains='head' probes a trained encoder: set init_from to it")
    if not chosen.family:
        raise ConfigError(
            "init_from is empty: set it to the model folder to start from "
            f"(--config.init_from=RUN/model), or set {section}.family and {section}.arch"
        )
    arch = {**chosen.arch.to_dict(), "image_size": config.data.image_size}
    return ModelSpec(chosen.family, arch)


def source_name(config: Config, start: ModelSpec, how: str) -> str:
    """The `source` of the trained network; `how` is what was done to the one it started from."""
    if not config.init_from:
        return f"trained by fd_jax on {config.data.name}"
    return f"{how} by fd_jax on {config.data.name} from {start.source}"


def student_changes(config: Config, initial: ModelSpec) -> transfer.Changes:
    """How a student differs from the network in `student.init_from`, whose architecture it has.

    Its size is that of the data, and its positions are those of `student.arch` if it names any.

    Args:
      config: config of a distillation.
      initial: spec of that network.

    Raises:
      ConfigError: the config says something else about the architecture, or positions that start
        fresh would not train.
    """
    student = config.student
    named = student.arch.to_dict()
    size = named.pop("image_size", config.data.image_size)
    position = named.pop("position", "")
    here = {"family": student.family} if student.family else {}
    differing = _differing({**here, **named}, {"family": initial.family, **initial.arch})
    if differing:
        raise ConfigError(
            f"student.init_from={student.init_from} holds another network than the config "
            f"describes: {'; '.join(differing)}. A student has the architecture of its folder: "
            "leave student.family and student.arch empty, as configs/base.py does with "
            "distillation(init_from=...), or change these fields"
        )
    stored = initial.arch.get("position", "")
    untie = stored == "shared_rpb" and position == "rpb"
    other = "" if untie or position == stored else position
    if other and not share_of(config, "student").is_all:
        raise ConfigError(
            f"student.arch.position={position!r} starts fresh, since the network in "
            f"student.init_from={student.init_from} has {stored!r}, so that all of it has to "
            "train: set student.freeze_blocks=0 and lora.rank=0, or leave out the position"
        )
    return transfer.Changes(
        image_size=size,
        final_norm=initial.arch.get("final_norm", True),
        untie=untie,
        keep_head=False,
        position=other,
    )


def _differing(named: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """The fields that a config names and a folder does not have, or has with another value."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return [
        f"{name} is {plain(value)!r} in the config and {plain(stored.get(name))!r} in the folder"
        for name, value in named.items()
        if plain(value) != plain(stored.get(name))
    ]


def load(
    folder: str, changes: transfer.Changes, *, parts: Collection[str], report: bool = False
) -> PyTree:
    """The arrays of a model folder that a network starts from.

    Args:
      folder: the model folder.
      changes: how the network differs from the stored one.
      parts: what the network has besides the encoder; `report` says which of it starts fresh.
      report: whether to print what is loaded, resized, copied and dropped.
    """
    spec, stored = model_folder.load(folder)
    taken, lines = transfer.start(spec, stored, changes)
    if report:
        tensors = jax.tree.leaves(taken)
        values = sum(leaf.size for leaf in tensors)
        say(f"init_from {folder} ({spec.source}):")
        say(f"  loaded   {len(tensors)} tensors, {values:,} values: {', '.join(sorted(taken))}")
        for line in lines:
            say(f"  {line}")
        say(f"  fresh    {', '.join(sorted(set(parts) - taken.keys())) or 'nothing'}")
    return taken


def layer_scales(config: Config, spec: ModelSpec, params: PyTree, *, head: str) -> PyTree | None:
    """The share of the learning rate that each parameter has, by `optim.layer_decay`.

    Args:
      config: config of a run.
      spec: of the network, whose encoder is the part "encoder" of `params`.
      params: trained arrays, or their shapes.
      head: path of a parameter of the last layer, which has the full rate.

    Returns:
      A tree like `params`, or None if all layers have the full rate.
    """

    def layer_id(path: str) -> int:
        return FAMILIES[spec.family].layer_id(path.removeprefix("encoder/"), spec.arch)

    decay = config.optim.layer_decay
    if decay == 1.0:
        return None
    return optimizer.layer_scales(params, layer_id, last=layer_id(head), decay=decay)
