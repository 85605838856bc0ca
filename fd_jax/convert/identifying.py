"""What a file is: a source that is known by name, or a network of a style, described by the file.

Every source and every style answers for itself. Facts that no tensor tells are taken from files
beside the weights, from a published hash, or from a name that the user gives; otherwise they are
asked for, with the candidates.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import re

from fd_jax.convert import asking, configs, families, published
from fd_jax.convert.asking import OF_SPEC, facts_of
from fd_jax.convert.containers.tensors import Container
from fd_jax.convert.describing import Description, describe, filled, source
from fd_jax.convert.facts import Claim, claims, is_stated, same, show
from fd_jax.convert.rules.matching import Match
from fd_jax.convert.rules.names import summarize
from fd_jax.convert.source import Source
from fd_jax.convert.style import OUTER, Recognized, Style, recognized
from fd_jax.errors import ConversionError

_NEAR = 0.1  # a source is near where at least this share of its tensors is in the file
_RIVAL = 0.05  # a style that claims so much fewer tensors than another one is no rival


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A part of a source, matched against a file."""

    source: Source
    part: str
    match: Match

    @property
    def fits(self) -> bool:
        """Whether the file is exactly what the source says."""
        return not self.match.problems

    @property
    def label(self) -> str:
        """The source as the user types it, with the part unless it is the default one."""
        default = self.part == self.source.default_part
        return self.source.name + ("" if default else f" --part={self.part}")

    @property
    def report(self) -> str:
        """How much of the file fits, in words."""
        count = len(self.match.problems)
        problems = f"{count} problem{'s' if count != 1 else ''}"
        return f"{self.match.found} of {self.match.expected} tensors fit, {problems}"


def candidates(container: Container) -> list[Candidate]:
    """What fits a file, and behind it what comes near, the fewest problems first."""
    sources = [*families.SOURCES.values(), *_described(container)]
    every = ((source, part) for source in sources for part in source.parts)
    matched = _matched(container, every, at_least=0.0)
    near = [c for c in matched if c.fits or c.match.found >= _NEAR * c.match.expected]
    return sorted(near, key=lambda c: (len(c.match.problems), "" if c.fits else c.label))


def _described(container: Container) -> list[Source]:
    """The source that the file itself describes, if it does, and as a network that can be had."""
    try:
        source = families.self_described(container)
    except ConversionError:
        return []
    return [] if source is None else [source]


def fitting(container: Container) -> list[Source]:
    """The sources whose default part fits a file, and what stands beside it, completely."""
    every = ((source, source.default_part) for source in families.SOURCES.values())
    return [
        c.source
        for c in _matched(container, every, at_least=1.0)
        if c.fits and not conflicts(c.source, c.part, container)
    ]


def conflicts(source: Source, part: str, container: Container) -> list[str]:
    """What files beside the weights say otherwise than a source, one line each."""
    try:
        said = _beside(source, container)
    except ConversionError as error:
        return [str(error)]
    spec = source.parts[part].spec
    facts = {**spec.arch, **{name: getattr(spec, name) for name in OF_SPEC}}
    return [
        f"{claim.origin} is {show(claim.value)}, but {source.name} has {claim.fact} "
        f"{show(facts[claim.fact])}; --source=auto takes the facts from the files"
        for claim in said
        if claim.fact in facts
        and not same(facts[claim.fact], claim.value)
        and not is_stated(spec.origins.get(claim.fact, ""))
    ]


def _beside(source: Source, container: Container) -> list[Claim]:
    """What files beside the weights claim of the network of a source."""
    if not source.style:
        return configs.pixels(container)
    found = recognized(families.STYLES[source.style], container)
    return configs.claims(container, found[0]) if found else configs.pixels(container)


def described(container: Container) -> list[str]:
    """The networks in a file by the names of their tensors, one line each, for `inspect`."""
    try:
        found = _descriptions(container, (), None, None)
        made, open_, problems = _sources(found, container)
    except ConversionError as error:
        return str(error).splitlines()
    lines = [f"{one.name}: fits completely" for one in made]
    lines += [
        f"{d.network.style.name}: {d.summary}; to be stated: {', '.join(d.missing)}" for d in open_
    ]
    return lines + [line for problem in problems for line in problem.splitlines()]


def published_claims(name: str) -> list[Claim]:
    """The facts of a published network, or of a source, that the user names with --arch.

    Raises:
      ConversionError: neither has this name, or no network here can hold it.
    """
    if name in families.SOURCES:
        spec = families.SOURCES[name].parts[families.SOURCES[name].default_part].spec
        return claims(facts_of(spec), f"--arch={name}")
    facts, origin = published.network(name)
    return claims(published.whole(facts), f"--arch={name} ({origin})")


def identify(
    container: Container,
    given: Sequence[Claim] = (),
    *,
    style: str | None = None,
    part: str | None = None,
    digest: Callable[[], str] | None = None,
) -> Source:
    """The one source of a file: one that fits it completely, or one that its own names make.

    Args:
      container: the file and what stands beside it.
      given: facts that the user states, or of a published network that the user names.
      style: name of the only style to consider; None for all.
      part: words in the names before those of the network, where the file holds several.
      digest: () -> the file's SHA-256, with which published files are recognised.

    Raises:
      ConversionError: none fits, or facts are missing, or several networks are in the file. The
        message has what was recognised, and the candidates.
    """
    fits = [] if style else fitting(container)
    if fits and not given and (known := _certain(fits, digest)):
        return known
    try:
        made, open_, problems = _sources(_descriptions(container, given, style, part), container)
    except ConversionError as error:
        if fits and not given:
            raise ConversionError(asking.for_source(container, fits)) from error
        raise
    if len(made) == 1 and not open_:
        return made[0]
    if open_:
        raise ConversionError(asking.question(container, open_, fits))
    if made:
        raise ConversionError(asking.for_style(container, made))
    if fits:
        raise ConversionError(asking.for_source(container, fits))
    if problems:
        near = candidates(container)[:1] if style is None else []
        also = [f"Of the sources, the nearest is {c.label} ({c.report})." for c in near]
        raise ConversionError("\n".join((*problems, *also)))
    if (name := (container.config or {}).get("architecture")) and style is None:
        published.architecture(str(name), None)  # says what networks of this kind have
    raise ConversionError(f"{container.path}: it fits no source; {_nearest(container, style)}")


def _certain(fits: list[Source], digest: Callable[[], str] | None) -> Source | None:
    """The source that a published hash shows, or the only one whose names are its own."""
    hashed = [s for s in fits if s.published or s.sha256]
    if hashed and digest is not None:
        for source in hashed:
            if digest().startswith(source.sha256 or source.published):
                return source
    return fits[0] if len(fits) == 1 and fits[0].certain else None


def _descriptions(
    container: Container, given: Sequence[Claim], style: str | None, part: str | None
) -> list[Description]:
    """The network in a file under the styles that name most of it, described.

    Raises:
      ConversionError: the file holds several networks, or none can be described.
    """
    rivals = _rivals(_networks(container, style, part))
    found, errors = [], []
    for network in rivals:
        try:
            found.append(describe(network, container, given))
        except ConversionError as error:
            errors.append(error)
    if errors and not found:
        raise errors[0]
    return found


def _networks(container: Container, style: str | None, part: str | None) -> list[Recognized]:
    """What the names in a file are, of one network: that of the part if there are several."""
    styles = [families.STYLES[style]] if style else list(families.STYLES.values())
    found, errors = [], []
    for one in styles:
        try:
            found += recognized(one, container)
        except ConversionError as error:
            errors.append(ConversionError(f"{container.path}: {error}"))
    if errors and not found:
        raise errors[0]
    named = configs.styles(container, families.STYLES.values())
    found = [n for n in found if n.style.name in named] or found
    prefixes = {network.prefix for network in found}
    if part is not None:
        prefixes = _chosen(prefixes, part)
    if len(prefixes) > 1:
        raise ConversionError(
            f"{container.path} holds {len(prefixes)} networks, below "
            f"{', '.join(map(repr, sorted(prefixes)))}; say which with --part, which takes the "
            "whole prefix or a word of it"
        )
    return [network for network in found if network.prefix in prefixes]


def _chosen(prefixes: set[str], part: str) -> set[str]:
    """The prefixes that a part names: the one that it is, or else those with such a word."""
    whole = {prefix for prefix in prefixes if prefix.rstrip("./") == part.rstrip("./")}
    return whole or {prefix for prefix in prefixes if part in re.split(r"[./]", prefix)}


def _rivals(found: list[Recognized]) -> list[Recognized]:
    """The styles that name about as much of a network as the best one, which comes first."""
    most = max((network.claimed for network in found), default=0)
    near = (network for network in found if network.claimed >= most - _RIVAL)
    return sorted(near, key=lambda network: -network.claimed)


def _sources(
    found: list[Description], container: Container
) -> tuple[list[Source], list[Description], list[str]]:
    """What descriptions make of a file.

    Returns:
      The sources of complete descriptions that match the file, where the first counts of styles
      that make the same network of the same tensors; the descriptions that lack facts and match
      otherwise; and what is wrong with all others.
    """
    made: dict[str, Source] = {}
    open_, problems = [], []
    for description in found:
        one = source(filled(description), container)
        match = one.match(container, one.default_part)[0]
        if match.problems:
            problems.append(_unfit(container, description, match))
        elif description.missing:
            open_.append(description)
        else:
            spec = dataclasses.replace(one.parts[one.default_part].spec, origins={})
            made.setdefault(spec.to_json(), one)
    return list(made.values()), open_, problems


def _unfit(container: Container, description: Description, match: Match) -> str:
    lines = "\n  ".join(grouped(match.problems))
    return (
        f"{container.path}: {description.summary}: {match.found} of {match.expected} tensors fit, "
        f"which networks here cannot represent:\n  {lines}"
    )


def grouped(problems: Sequence[str]) -> list[str]:
    """Problems with the numbers of blocks collapsed: one line per kind."""
    problems = [problem.replace(OUTER, "") for problem in problems]
    missing = [p.removeprefix("missing ") for p in problems if p.startswith("missing ")]
    others = [p for p in problems if not p.startswith("missing ")]
    return [f"missing {line}" for line in summarize(missing)] + summarize(others)


def _nearest(container: Container, style: str | None) -> str:
    if style is not None:
        return f"its names are not those of {families.STYLES[style].writer}"
    near = candidates(container)
    if not near:
        return f"none comes near. {_nearest_style(container)}"
    return (
        f"the nearest is {near[0].label} ({near[0].report}). --source={near[0].label} lists what "
        "differs, `inspect` the other sources that come near"
    )


def _nearest_style(container: Container) -> str:
    """The style most of whose marks are in a file, and those that are not."""

    def there(mark: str) -> bool:
        return any(name.endswith(mark) for name in container.tensors)

    ranked = sorted(families.STYLES.values(), key=lambda s: sum(map(there, s.marks)) / len(s.marks))
    nearest: Style = ranked[-1]
    lacking = [mark for mark in nearest.marks if not there(mark)]
    if not lacking or len(lacking) == len(nearest.marks):
        return "`inspect` lists what is in it, `sources` what can be read"
    return (
        f"Of the styles, {nearest.writer} comes nearest, which also has {', '.join(lacking)}. "
        "`inspect` lists what is in the file"
    )


def _matched(
    container: Container, parts: Iterable[tuple[Source, str]], *, at_least: float
) -> Iterator[Candidate]:
    """Matches the parts of which enough names are in the file: counting names is much cheaper."""
    for one, part in parts:
        share = one.share_of_names(container, part)
        if share and share >= at_least:
            yield Candidate(one, part, one.match(container, part)[0])
