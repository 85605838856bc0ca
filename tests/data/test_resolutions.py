"""The side of training images at each step, and batches that follow it."""

import collections

import numpy as np
import pytest

from fd_jax.data import elements, pipeline, transforms
from fd_jax.data.resolutions import Resolutions
from tests import tiny
from tests.data.pictures import Patterns

SIZES = (16, 24, 32)
DRAWN = Resolutions(32, SIZES, seed=7)
PHASES = Resolutions(32, phases=((0, 16), (3, 32), (5, 24)))


def transform(side):
    return transforms.LabelledImage(
        transforms.TrainTransform(side, min_area=0.2, interpolation="bilinear", flip=True)
    )


def scheduled(resolutions):
    return transforms.Scheduled({side: transform(side) for side in resolutions.every}, resolutions)


def take(resolutions, start, count, **options):
    at = scheduled(resolutions)
    loader = pipeline.TrainLoader(
        Patterns(29),
        transform(resolutions.every[-1]),
        batch_size=4,
        seed=7,
        start_step=start,
        threads=2,
        transform_at=at,
        **options,
    )
    try:
        return [{k: np.array(v) for k, v in next(loader).items()} for _ in range(count)]
    finally:
        loader.close()


def test_a_size_is_drawn_from_the_seed_and_the_step_alone():
    steps = range(3000)
    drawn = [DRAWN.at(step) for step in steps]
    for step in (0, 1, 2999):  # the stream of purpose 4, as numpy has it
        words = np.random.SeedSequence((4, 7, step))
        index = np.random.Generator(np.random.Philox(words)).integers(3)
        assert drawn[step] == SIZES[index]
    counts = collections.Counter(drawn)
    assert all(abs(counts[side] / 3000 - 1 / 3) < 0.03 for side in SIZES)
    other = Resolutions(32, SIZES, seed=8)
    assert [other.at(step) for step in steps] != drawn
    assert DRAWN.between(10, 3000) == SIZES and len(DRAWN.between(10, 11)) == 1


def test_phases_follow_each_other():
    assert [PHASES.at(step) for step in range(7)] == [16, 16, 16, 32, 32, 24, 24]
    assert PHASES.every == SIZES and PHASES.others == (16, 24)
    assert PHASES.between(3, 100) == (24, 32)
    assert PHASES.shares(10) == {16: 0.3, 24: 0.5, 32: 0.2}
    assert PHASES.shares(4) == {16: 0.75, 24: 0.0, 32: 0.25}
    assert PHASES.describe() == "16, 24 or 32 px"


def test_a_fixed_size_is_the_same_at_every_step():
    for fixed in (Resolutions(32), Resolutions(32, (32,)), Resolutions(32, phases=((0, 32),))):
        assert not fixed.varies and fixed.at(5) == 32 and fixed.shares(9) == {32: 1.0}
    assert Resolutions.of(tiny.segmentation()) == Resolutions(32)
    config = tiny.config(**{"data.sizes": (16, 32), "seed": 3})
    assert Resolutions.of(config) == Resolutions(32, (16, 32), seed=3)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_each_batch_is_that_of_a_loader_of_its_size(workers):
    """Threads, and processes that pass batches of several sizes through one memory."""
    got = take(DRAWN, 0, 12, workers=workers)
    assert {batch["image"].shape[1] for batch in got} == set(SIZES)
    for side in SIZES:
        plain = take(Resolutions(side), 0, 12)
        for step, batch in enumerate(got):
            if DRAWN.at(step) == side:
                for name, value in batch.items():
                    np.testing.assert_array_equal(value, plain[step][name])


def test_a_resumed_loader_and_other_hosts_have_the_same_sizes_and_rows():
    whole = take(DRAWN, 0, 9)
    later = take(DRAWN, 5, 4)
    hosts = [take(DRAWN, 5, 4, rows=np.array(rows)) for rows in ((0, 1), (2, 3))]
    for step in range(4):
        joined = [np.concatenate([host[step]["image"] for host in hosts])]
        for image in (later[step]["image"], *joined):
            np.testing.assert_array_equal(image, whole[5 + step]["image"])


def test_a_batch_larger_than_the_memory_is_refused():
    """Negative control: the specification of a batch is compared with its rows."""
    row = {"image": np.zeros((24, 24, 3), np.uint8), "label": 0}
    with pytest.raises(ValueError):
        elements.stack([row], transform(16).elements)
