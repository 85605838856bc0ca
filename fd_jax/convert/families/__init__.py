"""The registry: the one place that names every family.

A family is a module here with a `FAMILY`. The commands ask the functions below, which ask the
families; neither they nor this file know what is in one.
"""

from collections.abc import Set

from fd_jax.convert.containers.tensors import Container
from fd_jax.convert.families import (
    beit,
    beit_segmentation,
    clip,
    convnext,
    dinov2,
    dinov3,
    eva,
    internvl,
    mmseg,
    official_fd,
    own,
    resnet,
    siglip2,
    swin,
    swin_v2,
    timm_vit,
    upernet_swin,
)
from fd_jax.convert.family import Family, Format
from fd_jax.convert.layout import AnyLayout, Fit, best
from fd_jax.convert.rules.tables import Table
from fd_jax.convert.source import Source
from fd_jax.convert.style import Style
from fd_jax.errors import ConversionError
from fd_jax.models.spec import ModelSpec

FAMILIES: tuple[Family, ...] = (
    clip.FAMILY,
    timm_vit.FAMILY,
    dinov2.FAMILY,
    dinov3.FAMILY,
    eva.FAMILY,
    siglip2.FAMILY,
    beit.FAMILY,
    internvl.FAMILY,
    swin.FAMILY,
    swin_v2.FAMILY,
    convnext.FAMILY,
    resnet.FAMILY,
    official_fd.FAMILY,
    beit_segmentation.FAMILY,
    upernet_swin.FAMILY,
    mmseg.FAMILY,
    own.FAMILY,
)

SOURCES: dict[str, Source] = {
    source.name: source for family in FAMILIES for source in family.sources
}
STYLES: dict[str, Style] = {style.name: style for family in FAMILIES for style in family.styles}


def get(name: str) -> Source:
    """The source of this name.

    Raises:
      ConversionError: there is none.
    """
    if name not in SOURCES:
        described = [f"{d.name} ({d.file})" for family in FAMILIES if (d := family.described)]
        raise ConversionError(
            f"no source is named {name!r}; expected one of "
            f"{', '.join([*sorted(SOURCES), *described, *sorted(STYLES)])}, or auto"
        )
    return SOURCES[name]


def source_for(name: str, container: Container) -> Source:
    """The source of this name, for one file: some are made from the file itself.

    Raises:
      ConversionError: there is none, or the file is not of the kind.
    """
    for family in FAMILIES:
        if family.described is not None and family.described.name == name:
            return family.described.source(container)
    return get(name)


def self_described(container: Container) -> Source | None:
    """The source of a file that holds its own whole description; None for any other file.

    Raises:
      ConversionError: the description in the file is not a network's.
    """
    for family in FAMILIES:
        if family.described is not None and family.described.recognises(container):
            return family.described.source(container)
    return None


def table_of(spec: ModelSpec) -> Table | None:
    """The rules by which a network was read from a file; None if it was not imported."""
    name, _, part = spec.source.partition(":")
    if name in STYLES:
        return STYLES[name].tables.get(part)
    if name in SOURCES:
        source = SOURCES[name]
        return source.parts[part or source.default_part].table
    return None


def formats() -> dict[str, Format]:
    """What single families write, by the name the user types."""
    return {name: format for family in FAMILIES for name, format in family.formats.items()}


def layouts(kind: type[AnyLayout]) -> list[AnyLayout]:
    """Every layout of a kind, which is a subclass of `Layout`, one per library."""
    return [one for family in FAMILIES for one in family.layouts if isinstance(one, kind)]


def layout(
    kind: type[AnyLayout], spec: ModelSpec, paths: Set[str], *, format: str
) -> tuple[AnyLayout, Fit]:
    """The layout of a kind that holds a network: every family is asked.

    Args:
      kind: a subclass of `Layout`, one per library.
      spec: of the network.
      paths: its parameters.
      format: what the user typed, for errors.

    Returns:
      The layout, and the rules that concern this network.

    Raises:
      ConversionError: none does; the error names what is in the way of the nearest.
    """
    return best(layouts(kind), spec, paths, format=format)
