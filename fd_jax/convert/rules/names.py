"""Names of tensors for people: twelve blocks are one line."""

from collections.abc import Sequence
import re


def collapse(name: str) -> str:
    """A name with block numbers as stars."""
    return re.sub(r"(?<![^./])\d+(?![^./])|(?<=block_)\d+", "*", name)


def summarize(names: Sequence[str]) -> list[str]:
    """Names with block numbers collapsed: one line per kind, "blocks.*.norm1.weight (12)"."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(collapse(name), []).append(name)
    return [
        group[0] if len(group) == 1 else f"{kind} ({len(group)})" for kind, group in kinds.items()
    ]
