"""What timm and open_clip say of each network that they publish, beyond what its tensors tell.

`timm.json` and `open_clip.json` are written by `python -m benchmarks.coverage --facts` from the
installed libraries: activation, epsilon, windows, rotary arguments and the like are read off the
module that a library makes, statistics and sizes from its configuration of the weights. The names
of facts are those of the fields of `ModelSpec` and of the architectures.

A network is an architecture with the weights of one tag: "vit_base_patch16_224.augreg_in21k". Tags
differ in statistics, in sizes and even in activations.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import difflib
import functools
from importlib import resources
import json
from typing import Any

from fd_jax.errors import ConversionError, first_few
from fd_jax.models.rotary import Rope

LIBRARIES = ("timm", "open_clip")
_NEAR = 5  # names that an error suggests
_TAGS = 12  # tags that it lists
_HUBS = ("hf-hub:", "hf_hub:")  # how timm and open_clip begin the name of a repository
_OF_WEIGHTS = ("mean", "std", "image_size", "pooling")


@functools.cache
def table(library: str) -> dict[str, Any]:
    """A library's table, as it is stored.

    Returns:
      `library`, `version`, `statistics` (name -> mean and std), `common` (facts of every network),
      `aliases` (repository -> network), `architectures` (name -> facts), `networks` (architecture
      -> tag -> facts that are unlike those of the architecture, null for one that it lacks), and
      `others` (kind that no network here can hold -> architectures).
    """
    text = resources.files(__name__).joinpath(f"{library}.json").read_text("utf-8")
    return json.loads(text)


def network(name: str) -> tuple[dict[str, Any], str]:
    """The facts of a published network.

    Args:
      name: as timm says it ("vit_base_patch16_224.augreg_in21k"), the model and the tag of
        open_clip with a dot, slash or comma between them ("ViT-L-14.laion2b_s32b_b82k"), or the
        name of a repository on Hugging Face's hub that one of these libraries reads.

    Returns:
      The facts by name, and where they come from, in words.

    Raises:
      ConversionError: no library has this name, and the message has the nearest ones; or no
        network here can hold it, and the message says what it lacks.
    """
    for library in LIBRARIES:
        found = table(library)
        for spelling in _spellings(name, found["aliases"]):
            known, _, tag = spelling.partition(".")
            if tag in found["networks"].get(known, ()):
                return _stated(found, known, tag)
    raise ConversionError(_unknown(name))


def architecture(name: str, tag: str | None) -> tuple[dict[str, Any], str]:
    """What is known of a network by its architecture.

    Args:
      name: as the config.json of timm and open_clip's `timm_model_name` say it.
      tag: of the weights, if there is one. If it is not one that the library publishes, the facts
        are those that all weights of the architecture have in common: no statistics, image size
        or pooling.

    Returns:
      As `network`.

    Raises:
      ConversionError: as `network`.
    """
    known, _, own = name.partition(".")
    tag = tag or own
    for library in LIBRARIES:
        found = table(library)
        if known in found["architectures"]:
            if tag in found["networks"].get(known, ()):
                return _stated(found, known, tag)
            facts, origin = _stated(found, known, None)
            return {fact: v for fact, v in facts.items() if fact not in _OF_WEIGHTS}, origin
    raise ConversionError(_unknown(name))


def complete(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a published network with those that a table leaves out because they are plain.

    A table has an entry for what few networks have. That the others do not have it is a fact too:
    some configs leave out that an MLP is gated, and then what they say of the activation is wrong.
    """
    if "width" not in facts:  # a network with stages, which has none of these
        return dict(facts)
    plain = {"gated_mlp": False, "mlp_norm": False, "attn_norm": False, "rope_theta": None}
    turned = {f"rope_{f.name}": f.default for f in dataclasses.fields(Rope) if f.name != "theta"}
    rotary = turned if facts.get("rope_theta") is not None else {}
    return {**plain, **rotary, **facts}


def whole(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of `complete`, and those of single tensors that few networks have or lack.

    With them a file that has lost its class token is not one of a network without.
    """
    if "width" not in facts:
        return dict(facts)
    plain = {"cls_token": True, "registers": 0, "ln_pre": False, "patch_bias": True}
    return {**plain, **complete(facts)}


def matching(style: str, shapes: Mapping[str, Any]) -> list[str]:
    """The published networks that a file may be, by its names and shapes.

    Args:
      style: of the names in the file.
      shapes: facts that the tensors of a file tell; one that a network does not state (no
        registers, say) has to be 0, False or None.

    Returns:
      Names, as `network` takes them; those of networks that cannot be held are not among them.
    """
    wanted = json.loads(json.dumps({**shapes, "style": style}))  # tuples become lists
    return [
        f"{known}.{tag}"
        for library in LIBRARIES
        for known, tag in _names(table(library))
        if _fits(_facts(table(library), known, tag), wanted)
    ]


def alike(
    library: str, style: str, facts: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The architectures of a library that have certain facts, whatever their weights.

    Args:
      library: one of LIBRARIES.
      style: of the names in its files.
      facts: by name; one that an architecture does not state has to be 0, False or None.

    Returns:
      Names, each with all facts; those of networks that cannot be held are not among them.
    """
    wanted = json.loads(json.dumps({**facts, "style": style}))
    found = table(library)
    for known in found["architectures"]:
        given = complete(_facts(found, known, None))
        if _fits(given, wanted):
            yield known, given


def _names(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for known, tags in found["networks"].items():
        for tag in tags:
            yield known, tag


def _fits(facts: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    same = ((facts.get(fact) or None) == (value or None) for fact, value in wanted.items())
    return "lacks" not in facts and all(same)


def _facts(found: Mapping[str, Any], known: str, tag: str | None) -> dict[str, Any]:
    """The facts of an architecture, with those of the weights of a tag, and the style."""
    own = found["networks"][known][tag] if tag is not None else {}
    facts = {**found["architectures"][known], **own}
    statistics = facts.pop("statistics", None)
    common = {} if "lacks" in facts else {**found["common"], **found["statistics"][statistics]}
    return {fact: value for fact, value in {**common, **facts}.items() if value is not None}


def _stated(found: Mapping[str, Any], known: str, tag: str | None) -> tuple[dict[str, Any], str]:
    """The same without the style, and where it is from; refuses what no network here can hold."""
    facts = _facts(found, known, tag)
    if "lacks" in facts:
        name = known if tag is None else f"{known}.{tag}"
        raise ConversionError(
            f"{name} of {_origin(found)} has {facts['lacks']}, which no network here has"
        )
    del facts["style"]
    return facts, _origin(found)


def _origin(found: Mapping[str, Any]) -> str:
    return f"{found['library']} {found['version']}"


def _spellings(name: str, aliases: Mapping[str, str]) -> list[str]:
    """The names under which a table may have what the user calls `name`."""
    for start in _HUBS:
        name = name.removeprefix(start)
    name = name.strip("/")
    dotted = [name.replace(sign, ".", 1) for sign in "/,"]
    return [name, name.removeprefix("timm/"), aliases.get(name, name), *dotted]


def _unknown(name: str) -> str:
    names: list[str] = []
    for library in LIBRARIES:
        found = table(library)
        if tags := found["networks"].get(name):
            listed = first_few([f"{name}.{tag}" for tag in tags], _TAGS)
            return (
                f"{name!r} is an architecture of {library}, of which there are several weights; "
                f"they differ in what no tensor tells. Say which: {listed}"
            )
        for kind, architectures in found["others"].items():
            if name.partition(".")[0] in architectures:
                return f"{name!r} is a {kind} of {library}, which no network here can hold"
        names += [f"{known}.{tag}" for known, tag in _names(found)]
        names += [*found["architectures"], *found["aliases"]]
    near = difflib.get_close_matches(name, names, _NEAR, cutoff=0.5)
    hint = f"the nearest are {', '.join(near)}" if near else "no name comes near"
    versions = " and ".join(_origin(table(library)) for library in LIBRARIES)
    return f"no network is published as {name!r}; {hint}. Known are the names of {versions}"
