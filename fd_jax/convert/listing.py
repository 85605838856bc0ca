"""What the commands print: the table of sources, the contents of a file, what an import did."""

from collections.abc import Iterable
import math
import os

from etils import epath

from fd_jax import model_folder
from fd_jax.convert import exporting, families
from fd_jax.convert.containers.opening import open_container
from fd_jax.convert.containers.tensors import DTYPES, Container
from fd_jax.convert.importing import Imported
from fd_jax.convert.rules import tables
from fd_jax.convert.source import output_width
from fd_jax.models.spec import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, ModelSpec

_STATISTICS = {
    (IMAGENET_MEAN, IMAGENET_STD): "ImageNet",
    (CLIP_MEAN, CLIP_STD): "CLIP",
    ((0.5,) * 3, (0.5,) * 3): "0.5 / 0.5",
}
_NEAREST = 5  # sources that are listed though they do not fit,
_NEAR = 0.1  # where they share at least this part of the tensors


def source_table() -> str:
    """The table of sources as markdown; `docs/conversion.md` holds the same text."""
    header = "source", "public file", "parts", "network", "statistics", "positions", "compared with"
    rows = [header, ("---",) * len(header)]
    for source in families.SOURCES.values():
        spec = source.parts[source.default_part].spec
        rows.append(
            (
                f"`{source.name}`",
                source.file,
                ", ".join(source.parts),
                _network(spec),
                _statistics(spec),
                _positions(spec),
                source.oracle + (f"; {source.note}" if source.note else ""),
            )
        )
    return _markdown(rows)


def format_table() -> str:
    """The table of formats that can be written, as markdown; the docs hold the same text."""
    rows = [("format", "writes"), ("---", "---")]
    rows += [(f"`{name}`", layout.writes) for name, layout in exporting.FORMATS.items()]
    return _markdown(rows)


def _markdown(rows: Iterable[Iterable[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _network(spec: ModelSpec) -> str:
    arch = spec.arch
    blocks = arch["depth"] if "depth" in arch else "+".join(map(str, arch["depths"]))
    return (
        f"{output_width(arch)} x {blocks}, patch {arch['patch_size']}, {arch['image_size']} px, "
        f"{arch['activation']}, eps {arch['norm_eps']:g}"
    )


def _statistics(spec: ModelSpec) -> str:
    return _STATISTICS.get((spec.mean, spec.std), f"{spec.mean} / {spec.std}")


def _positions(spec: ModelSpec) -> str:
    position = spec.arch.get("position", "windows")
    return f"{position}, resized by {spec.position_resize}" if position == "ape" else position


def inspect(path: str | os.PathLike[str]) -> str:
    """What a weights file, a Hugging Face folder or a model folder holds; runs nothing in it."""
    if (epath.Path(path) / "model.json").exists():
        return _inspect_model_folder(path)
    container = open_container(path)
    tensors = [(t.name, t.shape, t.dtype) for t in container.tensors.values()]
    parts = [f"{container.path}: {container.kind}, {container.size:,} bytes", _tree(tensors)]
    if container.entries:
        entries = tables.summarize([f"{name}: {what}" for name, what in container.entries.items()])
        parts.append("entries that are no tensors:\n" + _indented(entries))
    parts.append(_matches(container))
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
        kinds.setdefault((tables.collapse(name), shape, dtype), []).append(name)
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


def _matches(container: Container) -> str:
    fits, near = [], []
    for source in families.SOURCES.values():
        for part in source.parts:
            if not source.share_of_names(container, part):
                continue
            found, _ = source.match(container, part)
            if found.problems and found.found < _NEAR * found.expected:
                continue
            label = source.name + ("" if part == source.default_part else f" --part={part}")
            if not found.problems:
                note = f" ({source.note})" if source.note else ""
                fits.append(f"{label}: fits completely{note}")
            else:
                count = len(found.problems)
                share = f"{found.found} of {found.expected} tensors fit"
                near.append((count, f"{label}: {share}, {count} problems"))
    lines = fits + [line for _, line in sorted(near)[:_NEAREST]]
    return "sources:\n" + _indented(lines or ["none comes near"])


def import_report(result: Imported) -> str:
    """What was read, dropped and why, and resized."""
    shapes = model_folder.flat_shapes(result.params)
    numbers = sum(math.prod(shape) for shape in shapes.values())
    spec = result.spec
    lines = [
        f"read {len(shapes)} parameters ({numbers:,} numbers) as {result.source}",
        f"network {_network(spec)}; statistics {_statistics(spec)}; positions {_positions(spec)}",
        _checksum(result),
    ]
    if result.not_finite:
        broken = ", ".join(_heads(result.not_finite))
        lines.append(
            f"warning: NaN or infinity in {broken}: was its training cut off or diverging?"
        )
    for reason, names in result.dropped.items():
        count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
        lines.append(f"dropped {count}, {reason}: {', '.join(_heads(names))}")
    for name, (before, after) in result.resized.items():
        method = result.spec.position_resize if name.endswith("pos_embed") else "geometric"
        lines.append(f"resized {name} from {list(before)} to {list(after)} ({method})")
    return "\n".join(lines)


def _checksum(result: Imported) -> str:
    source = families.SOURCES.get(result.source.partition(":")[0])
    if source is None or not source.published:
        return f"SHA-256 {result.sha256}"
    if result.sha256.startswith(source.published):
        return f"SHA-256 {result.sha256}, that of the public {source.file}"
    return (
        f"SHA-256 {result.sha256}; that of the public {source.file} begins with "
        f"{source.published[:8]}: this one was trained on, saved again or changed"
    )


def _heads(names: list[str]) -> list[str]:
    kinds = tables.summarize(names)
    return kinds if len(kinds) <= 4 else [*kinds[:3], f"and {len(kinds) - 3} more kinds"]


def _indented(lines: list[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)
