"""Questions: what a file does not tell, and which published networks it may be."""

from collections.abc import Mapping
from typing import Any

from fd_jax.convert import published
from fd_jax.convert.containers.tensors import Container
from fd_jax.convert.describing import Description
from fd_jax.convert.facts import STATISTICS, show
from fd_jax.convert.source import Source
from fd_jax.models.spec import ModelSpec

_SHOWN = 3  # names of published networks that agree in all facts
# Facts of a published network that other files of it have in common with it.
_SHARED = (
    "width depth heads mlp_width patch_size cls_token registers embed_width depths window "
    "pretrained_windows activation norm_eps rope_theta rope_pairs rope_reference rope_offset "
    "rope_axes"
).split()
OF_SPEC = ("mean", "std", "pixel_scale", "position_resize", "pooling")


def facts_of(spec: ModelSpec) -> dict[str, Any]:
    """The facts of a network that other files of it have in common with it."""
    every = {**spec.arch, **{name: getattr(spec, name) for name in OF_SPEC}}
    found = {name: every[name] for name in (*_SHARED, *OF_SPEC) if name in every}
    return published.complete(found)


def for_style(container: Container, made: list[Source]) -> str:
    """The question which of several styles a file has, whose networks differ."""
    names = ", ".join(sorted(one.name.partition(":")[0] for one in made))
    return (
        f"{container.path}: its names are those of several styles; say which with --source: {names}"
    )


def question(container: Container, open_: list[Description], fits: list[Source]) -> str:
    """What was recognised, what is not told, and which published networks it may be.

    Args:
      container: the file.
      open_: the descriptions that lack facts; the first counts for people.
      fits: the sources whose names and shapes the file has.
    """
    first = open_[0]
    lines = [
        f"{container.path}: {first.summary}. No tensor, and no file beside it, tells "
        f"{', '.join(first.missing)}.",
        "Say which network it is with --source or --arch, or state each with --fact=NAME=VALUE.",
    ]
    if "cls_token" in first.missing:
        lines.append(
            "It holds no class token: --fact=cls_token=no, if the network has none; a file that "
            "has lost it looks alike."
        )
    lines += [
        f"Its file name is that of --source={one.name}."
        for one in fits
        if container.path.name in one.file.split()
    ]
    rows = _rows(open_, fits)
    if rows:
        lines.append("Networks of these shapes:")
    lines += [f"  {', '.join(names)}: {facts}" for facts, names in rows]
    return "\n".join(lines)


def _rows(open_: list[Description], fits: list[Source]) -> list[tuple[str, list[str]]]:
    """Facts in words, and the published networks that have them."""
    found: dict[str, list[str]] = {}
    for one in fits:
        spec = one.parts[one.default_part].spec
        found.setdefault(_words(facts_of(spec)), []).append(f"--source={one.name}")
    for description in open_:
        for name in _matching(description):
            words = _words(published.network(name)[0])
            found.setdefault(words, []).append(f"--arch={name}")
    return [(facts, _some(list(dict.fromkeys(names)))) for facts, names in found.items()]


def _matching(description: Description) -> list[str]:
    """The published networks that have the names and shapes of a file."""
    told = description.told
    compared = {name: value for name, value in told.items() if name in _COMPARED}
    names = published.matching(description.network.style.name, compared)
    return [name for name in names if _alike(published.network(name)[0], told)]


def _alike(facts: Mapping[str, Any], told: Mapping[str, Any]) -> bool:
    """Whether a published network has layer scale, and ends with a norm, where a file says so."""
    if (facts.get("layer_scale") is not None) != told.get("scaled", False):
        return False
    return facts.get("final_norm", told.get("final_norm")) == told.get("final_norm")


# What shapes tell of a published network, whatever its head and image size.
_COMPARED = (
    "width depth mlp_width patch_size registers gated_mlp mlp_norm attn_norm embed_width depths "
    "heads window widths grn stem_widths inner_widths bottleneck"
).split()


def _some(names: list[str]) -> list[str]:
    more = len(names) - _SHOWN
    return [*names[:_SHOWN], f"and {more} more"] if more > 0 else names


def _words(facts: Mapping[str, Any]) -> str:
    statistics = tuple(facts["mean"]), tuple(facts["std"])
    known = STATISTICS.get(statistics)
    words = [
        f"{name} {show(facts[name])}"
        for name in ("heads", "window", "pretrained_windows", "stride_at")
        if name in facts
    ]
    words += [str(facts["activation"]), f"eps {show(facts['norm_eps'])}"]
    words.append(
        f"statistics {known}" if known else f"mean {show(facts['mean'])}, std {show(facts['std'])}"
    )
    if facts.get("position_resize"):
        words.append(f"positions resized by {facts['position_resize']}")
    return ", ".join(words)


def for_source(container: Container, fits: list[Source]) -> str:
    """The question which of several sources a file is."""
    lines = "\n  ".join(f"{s.name}: {s.file}; {s.note}" for s in fits)
    return (
        f"{container.path}: the names and shapes in it fit several sources; say which with "
        f"--source=\n  {lines}"
    )
