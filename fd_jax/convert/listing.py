"""The tables of sources and formats, and what an import did, in words."""

from collections.abc import Iterable
import math

from fd_jax import model_folder
from fd_jax.convert import families, networks
from fd_jax.convert.facts import STATISTICS
from fd_jax.convert.formats import FORMATS
from fd_jax.convert.importing import Imported
from fd_jax.convert.rules.names import summarize
from fd_jax.models import sizes
from fd_jax.models.spec import ModelSpec


def source_table() -> str:
    """The table of sources as markdown; `docs/sources.md` holds the same text."""
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


def style_table() -> str:
    """The table of styles as markdown; `docs/sources.md` holds the same text."""
    rows = [("style", "names of", "network", "`model_type` in config.json"), ("---",) * 4]
    for style in families.STYLES.values():
        types = ", ".join(f"`{name}`" for name in style.configs)
        rows.append((f"`{style.name}`", style.writer, f"`{style.network}`", types))
    return _markdown(rows)


def format_table() -> str:
    """The table of formats that can be written, as markdown; the docs hold the same text."""
    rows = [("format", "writes"), ("---", "---")]
    rows += [(f"`{name}`", format.writes) for name, format in FORMATS.items()]
    return _markdown(rows)


def _markdown(rows: Iterable[Iterable[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _network(spec: ModelSpec) -> str:
    arch = spec.arch
    blocks = "+".join(map(str, networks.depths(spec)))
    size = sizes.describe(arch["image_size"])
    return (
        f"{networks.width(spec)} x {blocks}, patch {arch['patch_size']}, {size} px, "
        f"{arch['activation']}, eps {arch['norm_eps']:g}"
    )


def _statistics(spec: ModelSpec) -> str:
    return STATISTICS.get((spec.mean, spec.std), f"{spec.mean} / {spec.std}")


def _positions(spec: ModelSpec) -> str:
    position = networks.positions(spec)
    return f"{position}, resized by {spec.position_resize}" if position == "ape" else position


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
    lines += _origins(spec) + list(result.remarks)
    if result.not_finite:
        broken = ", ".join(_heads(result.not_finite))
        lines.append(
            f"warning: NaN or infinity in {broken}: did its training diverge, or was it cut off?"
        )
    for reason, names in result.dropped.items():
        count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
        lines.append(f"dropped {count}, {reason}: {', '.join(_heads(names))}")
    for name, (before, after) in result.resized.items():
        method = result.spec.position_resize if name.endswith("pos_embed") else "geometric"
        lines.append(f"resized {name} from {list(before)} to {list(after)} ({method})")
    return "\n".join(lines)


def _origins(spec: ModelSpec) -> list[str]:
    """Where the facts are from that no tensor tells, one line for each place."""
    places: dict[str, list[str]] = {}
    for fact, origin in spec.origins.items():
        places.setdefault(origin, []).append(fact)
    return [f"{', '.join(facts)}: {origin}" for origin, facts in places.items()]


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
    kinds = summarize(names)
    return kinds if len(kinds) <= 4 else [*kinds[:3], f"and {len(kinds) - 3} more kinds"]
