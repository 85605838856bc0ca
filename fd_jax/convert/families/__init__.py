"""The registry: every source there is, collected from the tables."""

from fd_jax.convert.families import beit, clip, dinov2, dinov3, official_fd, siglip2, swin, timm_vit
from fd_jax.convert.source import Source
from fd_jax.errors import ConversionError

SOURCES: dict[str, Source] = {
    source.name: source
    for module in (clip, timm_vit, dinov2, dinov3, siglip2, beit, swin, official_fd)
    for source in module.SOURCES
}


def get(name: str) -> Source:
    """The source of this name.

    Raises:
      ConversionError: there is none.
    """
    if name not in SOURCES:
        raise ConversionError(
            f"no source is named {name!r}; expected one of {', '.join(sorted(SOURCES))}, "
            "fd_jax (our own safetensors export), or auto"
        )
    return SOURCES[name]
