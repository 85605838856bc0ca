"""What files beside weights claim about a network: those of transformers, timm and open_clip."""

from collections.abc import Iterable, Mapping
from typing import Any

from fd_jax.convert.configs import huggingface, open_clip, timm
from fd_jax.convert.containers.tensors import Container
from fd_jax.convert.facts import Claim
from fd_jax.convert.huggingface import class_names as classes_of_transformers
from fd_jax.convert.style import Recognized, Style
from fd_jax.errors import ConversionError


def claims(container: Container, network: Recognized) -> list[Claim]:
    """Everything that the files beside the weights say of a network; [] if nothing does.

    A repository may hold the same network in the names of several libraries, each with a config of
    its own: a config counts for the tensors in its library's names.

    Args:
      container: the weights; its `config` and `beside` are the files.
      network: as its names were recognised.

    Raises:
      ConversionError: a file is of another network, cannot be read, or says something that no
        network here has.
    """
    try:
        return _claims(container, network)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(
            f"a config beside {container.path} has a value that cannot be read ({error!s:.80})"
        ) from error


def _claims(container: Container, network: Recognized) -> list[Claim]:
    style, config = network.style, container.config or {}
    if open_clip.is_of(style.name, network.prefix):
        own = container.beside.get(open_clip.FILE)
        return [] if own is None else open_clip.claims(own)
    found = []
    if "architecture" in config:
        _refuse_other(style, timm.STYLES, "timm", config["architecture"])
        found += timm.claims(config, network.tensors)
    elif huggingface.is_known(config):
        _refuse_other(style, "hf_", "transformers", config.get("model_type"))
        found += huggingface.claims(config, style)
    if huggingface.PREPROCESSOR in container.beside:
        beside = container.beside[huggingface.PREPROCESSOR]
        found += huggingface.statistics(beside)
        if style.network == "resnet" and not any(claim.fact == "image_size" for claim in found):
            found += huggingface.size(beside)  # which the config of the class does not have
    return found


def _refuse_other(style: Style, names: str, library: str, kind: Any) -> None:
    if not style.name.startswith(names):
        raise ConversionError(
            f"config.json is of {library} ({kind!s:.60}), but the tensors have the names of "
            f"{style.writer}. Put the weights that belong to it into the folder, or name a file "
            "outside of it"
        )


def styles(container: Container, known: Iterable[Style]) -> list[str]:
    """Names of the styles that a config.json of transformers is for; [] without one."""
    kind = huggingface.vision_type(container.config or {})
    return [style.name for style in known if kind in style.configs]


def pixels(container: Container) -> list[Claim]:
    """The statistics in a preprocessor_config.json beside weights; [] without one.

    Raises:
      ConversionError: they cannot be read.
    """
    fields: Mapping[str, Any] | None = container.beside.get(huggingface.PREPROCESSOR)
    return [] if fields is None else huggingface.statistics(fields)


def class_names(config: Mapping[str, Any] | None, classes: int) -> list[str] | None:
    """The names of the outputs of a head in a config beside the weights; None without them.

    Args:
      config: a config.json of any library, or None.
      classes: outputs of the head.
    """
    found = config or {}
    names = timm.class_names if "architecture" in found else classes_of_transformers
    return names(found, classes)
