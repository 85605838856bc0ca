"""The bench of the loop's own cost, which wraps functions of the loop and of the program."""

import pytest

from benchmarks import loop_overhead


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_each_step_after_the_first_ones_has_a_time_outside_the_compiled_call(
    embedded_data, workers
):
    steps = loop_overhead.UNCOUNTED + 5
    outside = loop_overhead.measure(loop_overhead.config(steps, embedded_data, workers))
    assert len(outside) == 5
    assert min(outside) > 0
