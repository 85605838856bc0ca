"""A network's description from its file: shapes, files beside the weights, published tables.

The one order in which facts are put together: what the user states, what stands beside the
weights, what a published name says, what the style's library has as constants, and what the
tensors tell. They have to agree; what nobody tells is asked for.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
import reprlib
from typing import Any

from fd_jax.convert import configs
from fd_jax.convert import networks as kinds
from fd_jax.convert.containers.tensors import Container
from fd_jax.convert.facts import TENSORS, Claim, claims, settle, show
from fd_jax.convert.rules.tables import Rule, Table, as_tuple
from fd_jax.convert.source import Part, Source
from fd_jax.convert.style import Recognized, depths, parameter_shapes
from fd_jax.errors import ConversionError, UserError
from fd_jax.models.architectures import ARCHITECTURES
from fd_jax.models.description import FIELDS
from fd_jax.models.spec import ModelSpec

# The fields of `ModelSpec` beside `arch` that are facts.
_FIELDS = ("mean", "std", "pixel_scale", "position_resize", "pooling", "pool")


@dataclasses.dataclass(frozen=True)
class Description:
    """What is known of a network in a file.

    Attributes:
      network: the network, as its names were recognised.
      settled: every fact with its origin.
      missing: names of the facts that have to come from elsewhere.
      told: the facts that the tensors tell.
    """

    network: Recognized
    settled: Mapping[str, Claim]
    missing: tuple[str, ...]
    told: Mapping[str, Any]

    @property
    def summary(self) -> str:
        """The network in a few words: "timm's VisionTransformer, 768 x 12, patch 16"."""
        arch = self.told
        width = arch.get("width", arch.get("embed_width", arch.get("widths")))
        blocks = arch.get("depth", arch.get("depths"))
        blocks = "+".join(map(str, blocks)) if isinstance(blocks, list) else blocks
        return (
            f"{self.network.style.writer}, {show(width)} x {blocks}, patch {arch['patch_size']}"
            f"{_pixels(arch)}"
        )


def _pixels(told: Mapping[str, Any]) -> str:
    side = math.isqrt(told.get("patches") or 0)
    return f", {side * told['patch_size']} px" if side and side**2 == told["patches"] else ""


def describe(network: Recognized, container: Container, given: Sequence[Claim] = ()) -> Description:
    """Puts together what is known of a network.

    Args:
      network: as recognised in the file.
      container: the file, and what was found beside it.
      given: claims of the user, or of a published network that the user named.

    Raises:
      ConversionError: claims contradict each other or the tensors, or the tensors are not those of
        a network.
    """
    style, kind = network.style, kinds.NETWORKS[network.style.network]
    try:
        counts = depths(network.table, network.tensors)
        coded = claims(style.code(network.tensors), f"the code of {style.writer}")
        found = [*given, *configs.claims(container, style), *coded]
        bare = any(claim.fact == "final_norm" and not claim.value for claim in found)
        if lacks := network.lacks(final_norm=not bare):
            raise ConversionError("; ".join(lacks))
        if not counts or not all(counts):
            raise ConversionError("it has no blocks, or a stage without any")
        _check_values(found, style.network)
        told = kind.told(parameter_shapes(network, container), counts, network.tensors)
        settled = dict(settle([*claims(told, TENSORS), *found]))
    except UserError as error:
        raise ConversionError(f"{container.path}: {style.writer}: {error}") from error
    asked = kind.asks(told)
    if any("head/kernel" in as_tuple(rule.paths) for rule in network.table.rules):
        asked = (*asked, "pooling")
    missing = tuple(fact for fact in asked if fact not in settled)
    return Description(network, settled, missing, told)


def _check_values(given: Iterable[Claim], family: str) -> None:
    """Refuses values that no network can have, whoever claims them.

    Raises:
      ConversionError: the message names the origin of each.
    """
    rows = {**FIELDS, **ARCHITECTURES[family]}
    wrong = [
        f"{claim.origin} is {reprlib.repr(claim.value)}{problem}"
        for claim in given
        if claim.fact in rows and (problem := rows[claim.fact].problem(claim.value))
    ]
    if wrong:
        raise ConversionError("; ".join(wrong))


def filled(description: Description) -> Description:
    """The same with stand-ins for what is missing, so that its tensors can be compared."""
    kind = kinds.NETWORKS[description.network.style.network]
    values = kind.stand_ins(description.told)
    made_up = {fact: Claim(fact, values[fact], "a stand-in") for fact in description.missing}
    return dataclasses.replace(description, settled={**description.settled, **made_up}, missing=())


def source(description: Description, container: Container) -> tuple[Source, list[str]]:
    """The source that a complete description makes of one file, and remarks for people.

    Raises:
      ConversionError: the facts together make no network.
    """
    network, settled, remarks = description.network, description.settled, []
    table = network.table
    if "pool" not in settled and (pools := pool_rules(table)):
        table = dataclasses.replace(table, rules=tuple(r for r in table.rules if r not in pools))
        remarks.append("its pooling head is left out: nothing tells its heads and activation")
    elif "pool" in settled and not pool_rules(table):
        settled = {name: claim for name, claim in settled.items() if name != "pool"}
    kind = kinds.NETWORKS[network.style.network]
    try:
        arch, told = kind.arch(settled)
        fields = {name: settled[name].value for name in _FIELDS if name in settled}
        fields |= {n: tuple(fields[n]) for n in ("mean", "std") if n in fields}
        if "pool" in fields:
            fields["pool"] = _pool(fields["pool"], description.told)
        spec = ModelSpec(network.style.network, arch, **fields, origins=origins(settled))
        kinds.check_sizes(spec, container)
        kinds.shapes(spec)
    except (UserError, ValueError) as error:
        raise ConversionError(f"{container.path}: {description.summary}: {error}") from error
    remarks += told
    if network.prefix:
        remarks.append(f"its tensors are below {network.prefix!r}")
    part = Part(table, spec)
    made = Source(
        network.source,
        network.style.writer,
        {"network": part},
        "its own library",
        recognized=network,
        remarks=tuple(remarks),
    )
    return made, remarks


def _pool(claimed: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """A pool as it is in the file, whose MLP may have another width than the published one."""
    if claimed["kind"] != "attention":
        return dict(claimed)
    kept = {name: claimed[name] for name in ("kind", "heads", "activation", "norm_eps")}
    return kept | {"mlp_width": told["pool_mlp_width"]}


def pool_rules(table: Table) -> list[Rule]:
    """The rules of a pool."""
    return [rule for rule in table.rules if as_tuple(rule.paths)[0].startswith("pool/")]


def origins(settled: Mapping[str, Claim]) -> dict[str, str]:
    """Where each fact is from that no tensor tells."""
    return {name: claim.origin for name, claim in settled.items() if claim.origin != TENSORS}
