"""What a file or folder of weights holds, and which sources it fits."""

from collections.abc import Iterable
import math
import os

from etils import epath

from fd_jax import model_folder
from fd_jax.convert.containers.opening import open_container
from fd_jax.convert.containers.tensors import DTYPES, Container
from fd_jax.convert.identifying import candidates, described
from fd_jax.convert.rules.names import collapse, summarize
from fd_jax.convert.source import Source

_NEAREST = 5  # sources that are listed though they do not fit


def inspect(path: str | os.PathLike[str]) -> str:
    """What a weights file, a Hugging Face folder or a model folder holds; runs nothing in it."""
    if (epath.Path(path) / "model.json").exists():
        return _inspect_model_folder(path)
    container = open_container(path)
    tensors = [(t.name, t.shape, t.dtype) for t in container.tensors.values()]
    parts = [f"{container.path}: {container.kind}, {container.size:,} bytes", _tree(tensors)]
    if container.entries:
        entries = summarize([f"{name}: {what}" for name, what in container.entries.items()])
        parts.append("entries that are not tensors:\n" + _indented(entries))
    parts.append(_sources(container))
    return "\n".join(parts)


def _inspect_model_folder(path: str | os.PathLike[str]) -> str:
    spec, arrays = model_folder.describe(path)
    tensors = [(name, shape, dtype) for name, (shape, dtype) in arrays.items()]
    return f"{path}: fd_jax model folder\n{spec.to_json()}{_tree(tensors)}"


def _tree(tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> str:
    """One line per kind of tensor (block numbers collapsed), and totals per dtype."""
    kinds: dict[tuple, list[str]] = {}
    totals: dict[str, list[int]] = {}
    for name, shape, dtype in tensors:
        kinds.setdefault((collapse(name), shape, dtype), []).append(name)
        total = totals.setdefault(dtype, [0, 0, 0])
        count = math.prod(shape)
        for i, amount in enumerate((1, count, count * DTYPES[dtype].itemsize)):
            total[i] += amount
    lines = [
        f"{names[0] if len(names) == 1 else kind} {dtype}{list(shape)}"
        + (f" x {len(names)}" if len(names) > 1 else "")
        for (kind, shape, dtype), names in kinds.items()
    ]
    sums = [
        f"{dtype}: {count:,} tensors, {numbers:,} numbers, {size:,} bytes"
        for dtype, (count, numbers, size) in totals.items()
    ]
    return "tensors:\n" + _indented(lines) + "\ntotals:\n" + _indented(sums)


def _sources(container: Container) -> str:
    found = candidates(container)
    lines = described(container)
    lines += [f"{c.label}: fits completely{_note(c.source)}" for c in found if c.fits]
    near = [c for c in found if not c.fits][:_NEAREST]
    lines += [f"{c.label}: {c.report}" for c in near]
    return "sources:\n" + _indented(lines or ["none comes near"])


def _note(source: Source) -> str:
    return f" ({source.note})" if source.note else ""


def _indented(lines: list[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)
