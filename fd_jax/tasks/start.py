"""A task that goes on from a trained network: its folder or architecture, and rates per layer."""

from collections.abc import Collection

from etils import epath
import jax

from fd_jax import model_folder, optimizer
from fd_jax.console import say
from fd_jax.errors import ConfigError
from fd_jax.models import transfer
from fd_jax.models.spec import FAMILIES, ModelSpec
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


def load(
    config: Config, changes: transfer.Changes, *, parts: Collection[str], report: bool = False
) -> PyTree:
    """The arrays of `init_from` that the network starts from.

    Args:
      config: config of a run, with `init_from`.
      changes: how the network differs from the stored one.
      parts: what the network has besides the encoder; `report` says which of it starts fresh.
      report: whether to print what is loaded, resized, copied and dropped.
    """
    folder = config.init_from
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
