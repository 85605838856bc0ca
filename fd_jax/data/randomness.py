"""Random streams of the data: each purpose has a number of its own, so that no two share one."""

import numpy as np

ORDER, AUGMENT, EVALUATE, RESOLUTION = range(1, 5)


def generator(purpose: int, *words: int) -> np.random.Generator:
    """The random numbers of a purpose, for the numbers that they depend on (seed, epoch, step)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((purpose, *words))))
