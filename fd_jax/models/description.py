"""The fields of `model.json`, and what their values have to be.

A description may come from a stranger. It is compared with these tables before a network is
defined, since a size of it decides how long that takes and how much memory.
"""

from collections.abc import Mapping
import math
import reprlib
from typing import Any

from fd_jax.errors import ConfigError
from fd_jax.fields import FLAG, Choice, Named, Number, OrNone, Rule, Several, Text, choice, whole
from fd_jax.models import heads, layers, resize, segmenter, sizes, vit
from fd_jax.models.architectures import ARCHITECTURES, EPS, MOST_BLOCKS, OPTIONAL
from fd_jax.models.segmenter.network import Neck

MOST_TOKENS = 2**16  # an image of 4096 pixels in patches of 16
MOST_ROTATIONS = 2**24  # tokens x channels of a head, of which a table is computed
MOST_CLASSES = 2**20

SECTIONS = ("arch", "segmenter", "pool")  # fields of `ModelSpec` that have fields of their own
FIELDS: dict[str, Rule] = {
    "family": Choice(tuple(ARCHITECTURES)),
    "mean": Several(Number(least=-1000, most=1000, unit="scaled pixel value"), length=3),
    "std": Several(Number(above=0, most=1000, unit="scaled pixel value"), length=3),
    "pixel_scale": Number(above=0, most=255, unit="factor of a value from 0 to 255"),
    "position_resize": choice(resize.PositionResize),
    "classes": whole(0, "classes; 0 without a head", most=MOST_CLASSES),
    "class_names": OrNone(Several(Text("a name", optional=True), most=MOST_CLASSES)),
    "pooling": choice(heads.Pooling),
    "source": Text("a name", optional=True),
    "source_sha256": OrNone(Text("64 hexadecimal digits")),
    "source_dtypes": Named("a dtype per tensor name"),
    "source_names": Named("a name, or its beginning, per tensor name"),
    "origins": Named("where each fact comes from, in words"),
    "notes": Text("a text", optional=True),
    "format_version": whole(0),
}
REQUIRED = ("family", "arch")

# The fields of `segmenter`; those of `Segmenter` may be missing where it has a default.
SEGMENTER: dict[str, Rule] = {
    "blocks": Several(whole(0, "number of a block", most=MOST_BLOCKS), most=8),
    "classes": whole(1, "classes", most=MOST_CLASSES),
    "neck": choice(Neck),
    "decoder": choice(segmenter.Decoder),
    "channels": whole(1, "channels", most=2**14),
    "auxiliary_channels": whole(0, "channels; 0 for no auxiliary head", most=2**14),
    "dropout": Number(least=0, below=1, unit="probability of dropping a channel"),
}
_SEGMENTER_REQUIRED = ("blocks", "classes", "neck", "decoder")

# The fields of `pool`, by its kind.
_PROJECTION: dict[str, Rule] = {"width": whole(1, "channels", most=2**16), "bias": FLAG}
POOL: dict[str, dict[str, Rule]] = {
    "attention": {
        "heads": whole(1, "heads", most=1024),
        "mlp_width": whole(1, "channels", most=2**18),
        "activation": Choice(tuple(layers.ACTIVATIONS)),
        "norm_eps": EPS,
        **_PROJECTION,
    },
    "projection": _PROJECTION,
}
_POOL_OPTIONAL = {"attention": ("width", "bias"), "projection": ("bias",)}


def problems(fields: Mapping[str, Any]) -> list[str]:
    """One line for each problem of a description; [] if a network can be defined from it."""
    plain = {name: value for name, value in fields.items() if name not in SECTIONS}
    found = _compare(plain, FIELDS, required=("family",))
    if found:
        return found
    rows, optional = ARCHITECTURES[fields["family"]], OPTIONAL[fields["family"]]
    found = _section("arch", fields.get("arch"), rows, [n for n in rows if n not in optional])
    if not found:
        found = _too_large(fields["family"], fields["arch"])
    if fields.get("segmenter") is not None:
        found += _section("segmenter", fields["segmenter"], SEGMENTER, _SEGMENTER_REQUIRED)
    if fields.get("pool") is not None:
        found += _pool(fields["pool"])
    return found


def _pool(values: Any) -> list[str]:
    kind: Any = values.get("kind") if isinstance(values, dict) else None
    if problem := Choice(tuple(POOL)).problem(kind):
        return [f"pool.kind={reprlib.repr(kind)}{problem}"]
    rows, optional = POOL[kind], _POOL_OPTIONAL[kind]
    rest = {name: value for name, value in values.items() if name != "kind"}
    return _section("pool", rest, rows, [name for name in rows if name not in optional])


def _section(
    name: str, values: Any, rows: Mapping[str, Rule], required: list[str] | tuple[str, ...]
) -> list[str]:
    if not isinstance(values, dict):
        return [f"{name}={reprlib.repr(values)}: expected the fields {', '.join(rows)}"]
    return _compare(values, rows, required=required, prefix=f"{name}.")


def _compare(
    values: Mapping[str, Any],
    rows: Mapping[str, Rule],
    *,
    required: list[str] | tuple[str, ...],
    prefix: str = "",
) -> list[str]:
    found = [f"{prefix}{name} is missing" for name in required if name not in values]
    for name, value in values.items():
        if name not in rows:
            found.append(f"{prefix}{reprlib.repr(name)}: there is no such field")
        elif problem := rows[name].problem(value):
            found.append(f"{prefix}{name}={reprlib.repr(value)}{problem}")
    return found


def _too_large(family: str, arch: Mapping[str, Any]) -> list[str]:
    """What follows from several sizes together, each of which is within its bounds."""
    partial = arch.get("partial_patches", "refuse")
    try:
        if family in ("convnext", "resnet"):
            sizes.check_halved(arch["image_size"], arch["patch_size"], len(arch["depths"]) - 1)
        else:
            sizes.check_patches(arch["image_size"], arch["patch_size"], partial=partial)
    except ConfigError as error:
        return [f"arch: {error}"]
    tokens = math.prod(sizes.patch_grid(arch["image_size"], arch["patch_size"]))
    if tokens > MOST_TOKENS:
        return [f"arch: {tokens} patches; expected at most {MOST_TOKENS}"]
    if sum(arch.get("depths", ())) > MOST_BLOCKS:
        return [f"arch.depths={arch['depths']}: expected at most {MOST_BLOCKS} blocks in all"]
    rotary = arch.get("position") in vit.ROTARY
    if rotary and tokens * arch["width"] // arch["heads"] > MOST_ROTATIONS:
        return [f"arch: {tokens} patches and {arch['heads']} heads need too large rotary tables"]
    return []
