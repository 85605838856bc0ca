"""Which sources a file fits, and what comes nearest: every source answers for itself."""

from collections.abc import Iterable, Iterator
import dataclasses

from fd_jax.convert import families
from fd_jax.convert.containers.tensors import Container
from fd_jax.convert.rules.matching import Match
from fd_jax.convert.source import Source
from fd_jax.errors import ConversionError

_NEAR = 0.1  # a source is near where at least this share of its tensors is in the file


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
    """The sources whose default part fits a file completely."""
    every = ((source, source.default_part) for source in families.SOURCES.values())
    return [c.source for c in _matched(container, every, at_least=1.0) if c.fits]


def identify(container: Container) -> Source:
    """The one source whose default part fits a file completely.

    Raises:
      ConversionError: none fits, or the keys cannot tell several apart.
    """
    found = fitting(container)
    if len(found) == 1:
        return found[0]
    if found:
        lines = "\n  ".join(f"{s.name}: {s.file}; {s.note}" for s in found)
        raise ConversionError(
            f"{container.path}: the names and shapes in it fit several sources; say which with "
            f"--source=\n  {lines}"
        )
    raise ConversionError(f"{container.path}: it fits no source; {_nearest(container)}")


def _nearest(container: Container) -> str:
    near = candidates(container)
    if not near:
        return "none comes near. `inspect` lists what is in it, `sources` what can be read"
    return (
        f"the nearest is {near[0].label} ({near[0].report}). --source={near[0].label} lists what "
        "differs, `inspect` the other sources that come near"
    )


def _matched(
    container: Container, parts: Iterable[tuple[Source, str]], *, at_least: float
) -> Iterator[Candidate]:
    """Matches the parts of which enough names are in the file: counting names is much cheaper."""
    for source, part in parts:
        share = source.share_of_names(container, part)
        if share and share >= at_least:
            yield Candidate(source, part, source.match(container, part)[0])
