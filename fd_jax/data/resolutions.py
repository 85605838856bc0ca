"""The side of the training images at each step: one for all, drawn from several, or by phases.

It depends on the step and the seed alone, so that all hosts agree on it, and a resumed run goes on
with it.
"""

import dataclasses

from fd_jax.data import randomness
from fd_jax.typing import Config


@dataclasses.dataclass(frozen=True)
class Resolutions:
    """Sides of square images in pixels; those of held-out images are always `native`.

    Attributes:
      native: side that the network is exported with, and that of a run without `sizes` and
        `phases`.
      sizes: sides of which every step draws one; () for none.
      phases: pairs of a step and the side from it on, the first of step 0; () for none.
      seed: seed of the draws.
    """

    native: int
    sizes: tuple[int, ...] = ()
    phases: tuple[tuple[int, int], ...] = ()
    seed: int = 0

    @classmethod
    def of(cls, config: Config) -> "Resolutions":
        """The sides of a run's config."""
        data = config.data
        sizes, phases = data.get("sizes", ()), data.get("phases", ())
        return cls(
            data.image_size,
            tuple(sizes),
            tuple((step, size) for step, size in phases),
            config.seed,
        )

    @property
    def every(self) -> tuple[int, ...]:
        """All sides of training images, the smallest first."""
        return tuple(sorted({size for _, size in self.phases} or self.sizes or (self.native,)))

    @property
    def others(self) -> tuple[int, ...]:
        """The sides of training images besides `native`."""
        return tuple(size for size in self.every if size != self.native)

    @property
    def varies(self) -> bool:
        """Whether training images have another side than `native`, or several."""
        return bool(self.others)

    def at(self, step: int) -> int:
        """The side of the training images of a step."""
        if self.phases:
            return [size for start, size in self.phases if start <= step][-1]
        if not self.sizes:
            return self.native
        drawn = randomness.generator(randomness.RESOLUTION, self.seed, step)
        return self.sizes[drawn.integers(len(self.sizes))]

    def between(self, start: int, stop: int) -> tuple[int, ...]:
        """The sides that the steps from `start` to before `stop` have, the smallest first."""
        found: set[int] = set()
        for step in range(start, stop):
            found.add(self.at(step))
            if len(found) == len(self.every):
                break
        return tuple(sorted(found))

    def shares(self, steps: int) -> dict[int, float]:
        """The share of each side in a run of so many steps; the expected one where it is drawn."""
        ends = [*(start for start, _ in self.phases[1:]), steps]
        lengths = [
            (size, max(0, min(end, steps) - start))
            for (start, size), end in zip(self.phases, ends, strict=False)
        ]
        parts = lengths or [(size, 1) for size in self.sizes or (self.native,)]
        total = sum(length for _, length in parts)
        shares = dict.fromkeys(self.every, 0.0)
        for size, length in parts:
            shares[size] += length / total
        return shares

    def describe(self) -> str:
        """The sides for people, as "112, 160 or 224 px"."""
        *first, last = map(str, self.every)
        return f"{', '.join(first)} or {last} px" if first else f"{last} px"
