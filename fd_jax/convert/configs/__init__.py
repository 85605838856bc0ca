"""What files beside weights claim about a network: those of transformers, timm and open_clip."""

from collections.abc import Iterable, Mapping
from typing import Any

from fd_jax.convert.configs import huggingface, open_clip, timm
from fd_jax.convert.containers.tensors import Container
from fd_jax.convert.facts import Claim
from fd_jax.convert.style import Style


def claims(container: Container, style: Style) -> list[Claim]:
    """Everything that stands beside the weights, in facts; [] if nothing does.

    Args:
      container: the weights; its `config` and `beside` are the files.
      style: the names of the tensors.

    Raises:
      ConversionError: a file is of another network, or says something that no network here has.
    """
    config: Mapping[str, Any] = container.config or {}
    if open_clip.FILE in container.beside:
        return open_clip.claims(container.beside[open_clip.FILE])
    if "architecture" in config:
        return timm.claims(config)
    found = []
    if style.configs and config:
        found += huggingface.claims(config, style)
    if huggingface.PREPROCESSOR in container.beside:
        found += huggingface.statistics(container.beside[huggingface.PREPROCESSOR])
    return found


def styles(container: Container, known: Iterable[Style]) -> list[str]:
    """Names of the styles that a config.json of transformers is for; [] without one."""
    kind = huggingface.vision_type(container.config or {})
    return [style.name for style in known if kind in style.configs]
