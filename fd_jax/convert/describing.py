"""A network's description from its file: shapes, files beside the weights, published tables.

The one order in which facts are put together: what the user states, what a published name says,
what stands beside the weights, what the style's library has as constants, and what the tensors
tell. They have to agree, except that a stated fact may overrule a name and the files. What nobody
tells is asked for.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import json
import math
import reprlib
from typing import Any

from fd_jax.convert import configs
from fd_jax.convert import networks as kinds
from fd_jax.convert.containers.tensors import Container
from fd_jax.convert.facts import STATED_BY, TENSORS, Claim, claims, overruled, settle, show
from fd_jax.convert.networks.vit import POOL_HEAD, ROPE
from fd_jax.convert.rules.tables import Drop, Table, as_tuple
from fd_jax.convert.source import Part, Source
from fd_jax.convert.style import Recognized, depths, parameter_shapes
from fd_jax.errors import ConversionError, UserError
from fd_jax.models.architectures import ARCHITECTURES
from fd_jax.models.description import FIELDS, problems
from fd_jax.models.spec import ModelSpec

# The fields of `ModelSpec` beside `arch` that are facts.
_FIELDS = ("mean", "std", "pixel_scale", "position_resize", "pooling")


# How numbers and names of a stranger's file can fail to be what they should.
UNREADABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


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
        a network. What the user states may contradict the published network and the files.
    """
    style, kind = network.style, kinds.NETWORKS[network.style.network]
    try:
        coded = claims(style.code(network.tensors), f"the code of {style.writer}")
        stated = [claim for claim in given if claim.origin == STATED_BY]
        said = [claim for claim in given if claim not in stated]
        said += configs.claims(container, network)
        stated, said = overruled(stated, said)
        found = [*stated, *said, *coded]
        _check_values(found, style.network)
        told = _told(network, container, found)
        settled = settle([*stated, *claims(told, TENSORS), *said, *coded])
        above_pool = "pool" in settled and "pool_mlp_width" in told  # such a head is left out
        if has_head := _has(network.table, "head/kernel") and not above_pool:
            _check_head(network, settled)
    except (UserError, *UNREADABLE) as error:
        raise ConversionError(f"{container.path}: {style.writer}: {error}") from error
    asked = [*kind.asks(told), *style.asks]
    if style.asks and "rope_theta" in settled and settled["rope_theta"].value is not None:
        asked += ROPE
    if has_head:
        asked.append("pooling")
    missing = [fact for fact in asked if fact not in settled]
    if _lost_class_token(network, told) and not any(c.fact == "cls_token" for c in found):
        missing.append("cls_token")
    return Description(network, settled, tuple(missing), told)


def _lost_class_token(network: Recognized, told: Mapping[str, Any]) -> bool:
    """Whether a file may have lost the class token of its network, or this never had one.

    The names of some styles are those of networks of both kinds, and no other tensor tells them
    apart: position tables may have no row for the token.
    """
    every = network.style.tables[network.variant].rules
    paths = [path for rule in every for path in as_tuple(rule.paths) if rule.optional]
    return "encoder/cls_token" in paths and not told["cls_token"]


def _told(network: Recognized, container: Container, found: Sequence[Claim]) -> dict[str, Any]:
    """What the tensors tell, if they are those of a whole network."""
    bare = any(claim.fact == "final_norm" and not claim.value for claim in found)
    if lacks := network.lacks(final_norm=not bare):
        raise ConversionError("; ".join(lacks))
    counts = depths(network.table, network.tensors)
    if not counts or not all(counts):
        raise ConversionError("it has no blocks, or a stage without any")
    kind = kinds.NETWORKS[network.style.network]
    return kind.told(parameter_shapes(network, container), counts, network.tensors)


def _check_head(network: Recognized, settled: Mapping[str, Claim]) -> None:
    """Refuses a head that would read what the network does not have.

    Raises:
      ConversionError: the tensors and the pooling do not fit each other.
    """
    pooling = settled.get("pooling")
    if pooling is None:
        return
    normed = pooling.value in ("mean_norm", "norm_mean")
    if normed != _has(network.table, "fc_norm/scale"):
        has = "no norm" if normed else "a norm"
        raise ConversionError(f"{pooling}, but its head has {has} of its own")
    cls = settled.get("cls_token")
    if pooling.value == "cls" and cls is not None and not cls.value:
        raise ConversionError(f"{pooling}, but it has no class token")


def _has(table: Table, path: str) -> bool:
    return any(path in as_tuple(rule.paths) for rule in table.rules)


def _check_values(given: Iterable[Claim], family: str) -> None:
    """Refuses values that no network can have, whoever claims them.

    Raises:
      ConversionError: the message names the origin of each.
    """
    rows = {**FIELDS, **ARCHITECTURES[family]}
    wrong = [
        f"{claim.origin} is {reprlib.repr(claim.value)}{problem}"
        for claim in given
        if claim.fact in rows
        and claim.value is not None  # nothing of the kind, such as no rotary positions
        and (problem := rows[claim.fact].problem(claim.value))
    ]
    if wrong:
        raise ConversionError("; ".join(wrong))


def filled(description: Description) -> Description:
    """The same with stand-ins for what is missing, so that its tensors can be compared."""
    kind = kinds.NETWORKS[description.network.style.network]
    values = kind.stand_ins(description.told)
    made_up = {
        fact: Claim(fact, values[fact], "a stand-in")
        for fact in description.missing
        if fact not in description.settled
    }
    return dataclasses.replace(description, settled={**description.settled, **made_up}, missing=())


def source(description: Description, container: Container) -> Source:
    """The source that a complete description makes of one file.

    Raises:
      ConversionError: the facts together make no network.
    """
    network = description.network
    try:
        table, pool, remarks = _with_pool(description)
        arch, more = kinds.NETWORKS[network.style.network].arch(description.settled)
        spec = _spec(description, arch, pool)
        kinds.check_sizes(spec, container)
        kinds.shapes(spec)
    except (UserError, *UNREADABLE) as error:
        raise ConversionError(f"{container.path}: {description.summary}: {error}") from error
    remarks += more
    if network.prefix:
        remarks.append(f"its tensors are below {network.prefix!r}")
    return Source(
        network.source,
        network.style.writer,
        {"network": Part(table, spec)},
        "its own library",
        recognized=network,
        remarks=tuple(remarks),
    )


def _spec(description: Description, arch: dict[str, Any], pool: dict[str, Any] | None) -> ModelSpec:
    settled, family = description.settled, description.network.style.network
    fields = {name: settled[name].value for name in _FIELDS if name in settled}
    fields |= {name: tuple(fields[name]) for name in ("mean", "std")}
    spec = ModelSpec(family, arch, **fields, pool=pool, origins=origins(settled))
    if wrong := problems(json.loads(spec.to_json())):
        raise ConversionError("; ".join(wrong))
    return spec


def _with_pool(description: Description) -> tuple[Table, dict[str, Any] | None, list[str]]:
    """The rules of a file, its pool if all is known of it, and remarks.

    A head above a pool reads its vector, which no head here does.
    """
    table, claim = description.network.table, description.settled.get("pool")
    own = [rule for rule in table.rules if as_tuple(rule.paths)[0].startswith("pool/")]
    if not own:
        return table, None, []
    if claim is None:
        rest = tuple(rule for rule in table.rules if rule not in own)
        remark = "its pooling head is left out: nothing tells its heads and activation"
        return dataclasses.replace(table, rules=rest), None, [remark]
    if claim.value["kind"] != "attention":
        return table, dict(claim.value), []
    if "pool_mlp_width" not in description.told:
        raise ConversionError("its pooling head has no learned query")
    kept = {name: claim.value[name] for name in ("kind", "heads", "activation", "norm_eps")}
    heads = [rule for rule in table.rules if as_tuple(rule.paths)[0].startswith("head/")]
    names = [name for rule in heads for name in as_tuple(rule.names)]
    above = tuple(Drop(name, "a head above the attention pooling") for name in names)
    drops = tuple(drop for drop in table.drops if drop.why != POOL_HEAD)
    rules = tuple(rule for rule in table.rules if rule not in heads)
    pool = kept | {"mlp_width": description.told["pool_mlp_width"]}
    return Table(rules, (*drops, *above), table.derived), pool, []


def origins(settled: Mapping[str, Claim]) -> dict[str, str]:
    """Where each fact is from that no tensor tells."""
    return {name: claim.origin for name, claim in settled.items() if claim.origin != TENSORS}
