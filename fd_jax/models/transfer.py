"""A trained network as the start of another one: what is taken over, and what is not.

Fine-tuning keeps the encoder of a model folder, gives every block its own position bias, drops the
final norm that distillation trained, and begins with a fresh head
(docs/reference.md#fine-tune-loading).
"""

import dataclasses
from typing import Any

from fd_jax.errors import ConfigError
from fd_jax.models import resize, sizes, trees
from fd_jax.models.sizes import ImageSize
from fd_jax.models.spec import FAMILIES, ModelSpec
from fd_jax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Changes:
    """How the new network differs from the one it starts from.

    Attributes:
      image_size: side of its square input in pixels, or (height, width); position tables are
        resized to it.
      final_norm: whether the encoder keeps its own final norm.
      untie: whether a shared position bias becomes one per block.
      keep_head: whether the classifier head (and its `fc_norm`) is taken over.
      patch_size: side of its patches, to which the embedding's kernel is resized; 0 to keep it.
      window: side of a SwinV2's windows in tokens, whose bias networks take any; 0 to keep it.
      position: another kind of positions, which start fresh; "" to keep those that there are.
      lift: whether the encoder keeps a lift of its features; the maps of blocks have none.
    """

    image_size: ImageSize
    final_norm: bool
    untie: bool
    keep_head: bool
    patch_size: int = 0
    window: int = 0
    position: str = ""
    lift: bool = True


def target_spec(spec: ModelSpec, changes: Changes) -> ModelSpec:
    """The encoder that `start` fills, without reading weights.

    Raises:
      ConfigError: a final norm is to be kept that is not there, or the network cannot have other
        windows or positions.
    """
    family = FAMILIES[spec.family]
    arch = {**spec.arch, "image_size": sizes.plain(changes.image_size)}
    arch = _with_window(spec, arch, changes.window)
    arch["patch_size"] = changes.patch_size or arch["patch_size"]
    if "windows_at" in arch:  # whose grid stays
        arch["windows_at"] = arch["windows_at"] * arch["patch_size"] // spec.arch["patch_size"]
    if changes.final_norm and not spec.arch.get("final_norm", True):
        raise ConfigError(
            f"final_norm=True, but the network of {spec.source!r} ends without one; "
            "set model.final_norm=False"
        )
    if not changes.lift:
        arch.pop("lift", None)
    if arch.get("lift") and arch.get("final_norm") and not changes.final_norm:
        raise ConfigError(
            f"final_norm=False, but the network of {spec.source!r} lifts its tokens to "
            f"{arch['lift']} channels after its final norm; set model.final_norm=True"
        )
    if "final_norm" in arch:
        arch["final_norm"] = changes.final_norm
    arch = family.untied(arch) if changes.untie else arch
    arch |= _position(spec, changes)
    return dataclasses.replace(spec, arch=arch, class_names=None, segmenter=None, pool=None)


def _with_window(spec: ModelSpec, arch: dict[str, Any], window: int) -> dict[str, Any]:
    """The architecture with another window, if one is given; its own grids clip it."""
    if not window:
        return arch
    if spec.family != "swin_v2":
        raise ConfigError(
            f"window={window}, but only a network of the family 'swin_v2' takes another window, "
            f"and {spec.source!r} is of the family {spec.family!r}; set it to 0"
        )
    kept = {name: value for name, value in arch.items() if name != "windows_at"}
    return {**kept, "window": window}


def _position(spec: ModelSpec, changes: Changes) -> dict[str, str]:
    """The keyword of the architecture that another kind of positions changes."""
    if changes.position and "position" not in spec.arch:
        raise ConfigError(
            f"position={changes.position!r}, but a network of the family {spec.family!r} has "
            f"positions of its own kind only, as {spec.source!r} has; leave it out"
        )
    return {"position": changes.position} if changes.position else {}


def start(spec: ModelSpec, parts: PyTree, changes: Changes) -> tuple[PyTree, list[str]]:
    """The arrays that the new network starts from, and a report.

    Args:
      spec: of the model folder.
      parts: of the model folder, numpy arrays.
      changes: see there.

    Returns:
      {"encoder": ...} and, where the head is kept, "head" and "fc_norm"; what they do not name
      starts fresh. And lines that say what was copied, resized and dropped.
    """
    family = FAMILIES[spec.family]
    report = []
    old_patch = spec.arch["patch_size"]
    patch = changes.patch_size or old_patch
    # The size at which the old patches have the new grid.
    height, width = (side * old_patch // patch for side in sizes.sides(changes.image_size))
    spec = dataclasses.replace(spec, arch=_with_window(spec, spec.arch, changes.window))
    resized, encoder = spec.resized(parts["encoder"], (height, width))
    if resized is not spec:
        old, new = map(sizes.describe, (spec.arch["image_size"], changes.image_size))
        what = "the input" if encoder is parts["encoder"] else "position tables"
        report.append(f"resized  {what} from {old} px to {new} px")
    if patch != old_patch:
        kernel = resize.resize_patch_kernel(encoder["patch_embed"]["kernel"], patch)
        encoder = {**encoder, "patch_embed": {**encoder["patch_embed"], "kernel": kernel}}
        report.append(f"resized  the kernel of patches from {old_patch} px to {patch} px")
    arch = resized.arch
    if changes.untie and family.untied(arch) != arch:
        encoder = family.untie_positions(encoder, arch)
        report.append("copied   the shared position bias into every block")
    encoder, dropped, fresh = _other_positions(encoder, resized, changes)
    report += [f"fresh    encoder/{name}, for {changes.position!r} positions" for name in fresh]
    dropped += [name for name in parts if name not in ("encoder", "head", "fc_norm")]
    if not changes.lift and "lift" in encoder:
        encoder = {name: value for name, value in encoder.items() if name != "lift"}
        dropped.append("encoder/lift")
    if not changes.final_norm and "norm" in encoder:
        encoder = {name: value for name, value in encoder.items() if name != "norm"}
        dropped.append("encoder/norm")
    taken = {"encoder": encoder}
    for name in ("head", "fc_norm"):
        if name in parts and changes.keep_head:
            taken[name] = parts[name]
        elif name in parts:
            dropped.append(name)
    if dropped:
        report.append(f"dropped  {', '.join(sorted(dropped))}")
    return taken, report


def _other_positions(
    encoder: PyTree, spec: ModelSpec, changes: Changes
) -> tuple[PyTree, list[str], list[str]]:
    """The encoder without the tables that another kind of positions has no use for.

    Returns:
      The encoder, and the paths of what was dropped and of what starts fresh.
    """
    if not changes.position or changes.position == spec.arch.get("position"):
        return encoder, [], []
    arch = {**spec.arch, **_position(spec, changes)}
    wanted = trees.paths(dataclasses.replace(spec, arch=arch).abstract()[1])
    stored = trees.paths(encoder)
    dropped = sorted(f"encoder/{path}" for path in stored - wanted)
    return trees.chosen(encoder, wanted.__contains__), dropped, sorted(wanted - stored)
