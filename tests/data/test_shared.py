"""Batches in shared memory: nothing that is still looked at is written over."""

import gc
import os
import pickle
import resource

from absl import logging
import numpy as np
import pytest

from fd_jax.data.shared import SharedBatches

PLACES, SHAPE = 3, (2, 5, 5, 3)


@pytest.fixture
def shared():
    made = SharedBatches(PLACES, SHAPE)
    yield made
    made.close()


def worker_of(shared):
    """The object as a worker process gets it, with a mapping of its own."""
    return pickle.loads(pickle.dumps(shared))


def pictures(number):
    return [np.full(SHAPE[1:], 10 * number + i, np.uint8) for i in range(SHAPE[0])]


def test_batches_arrive_in_the_places_of_their_turns(shared):
    worker = worker_of(shared)
    for number in range(3 * PLACES):
        place = worker.put(number, pictures(number))
        assert place == number % PLACES
        np.testing.assert_array_equal(shared.take(place), np.stack(pictures(number)))


def test_a_place_serves_again_when_nothing_looks_at_it(shared):
    worker = worker_of(shared)
    taken = shared.take(worker.put(0, pictures(0)))
    view = np.asarray(taken)[1:, ::2]
    del taken
    gc.collect()
    other = worker.put(PLACES, pictures(1))  # the place is used: it travels by itself
    assert isinstance(other, np.ndarray) and shared.take(other) is other
    np.testing.assert_array_equal(other, np.stack(pictures(1)))
    np.testing.assert_array_equal(view, np.stack(pictures(0))[1:, ::2])
    del view
    assert worker.put(PLACES, pictures(1)) == 0


def test_a_place_is_used_before_its_batch_is_taken(shared):
    worker = worker_of(shared)
    assert worker.put(0, pictures(0)) == 0
    assert isinstance(worker.put(PLACES, pictures(1)), np.ndarray)
    np.testing.assert_array_equal(shared.take(0), np.stack(pictures(0)))


def test_what_was_taken_outlives_the_rest():
    shared = SharedBatches(PLACES, SHAPE)
    taken = shared.take(worker_of(shared).put(0, pictures(0)))
    shared.close()
    del shared
    gc.collect()
    np.testing.assert_array_equal(taken, np.stack(pictures(0)))


@pytest.mark.parametrize(
    ("pictures_", "error"),
    [
        ([np.zeros((2, 4, 3), np.uint8)] * 2, ValueError),
        ([np.zeros((5, 5, 3), np.uint8)] * 3, ValueError),
        ([np.zeros((5, 5, 3), np.uint16)] * 2, TypeError),
        ([np.zeros((5, 5, 3), np.float32)] * 2, TypeError),
    ],
)
def test_other_pictures_are_refused_whether_the_place_is_free_or_not(shared, pictures_, error):
    worker = worker_of(shared)
    for _ in range(2):
        with pytest.raises(error):
            worker.put(0, pictures_)
        worker.put(0, pictures(0))


def test_who_comes_after_the_end_writes_nowhere(shared, tmp_path):
    """Not even where another file got the number of the memory's."""
    number, state = shared._file, pickle.dumps(shared)
    shared.close()
    target = tmp_path / "other"
    target.write_bytes(bytes(10**6))
    descriptor = os.open(target, os.O_RDWR)
    if descriptor != number:
        os.dup2(descriptor, number)
        os.close(descriptor)
    for late in (pickle.loads(state), worker_of(shared)):
        batch = late.put(0, pictures(0))
        np.testing.assert_array_equal(batch, np.stack(pictures(0)))
    os.close(number)
    assert target.read_bytes() == bytes(10**6)


def test_a_worker_that_may_not_look_into_the_main_process_says_so(shared, monkeypatch, caplog):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", path)

    state = pickle.dumps(shared)
    monkeypatch.setattr(os, "open", refuse)
    logging.get_absl_logger().addHandler(caplog.handler)
    batch = pickle.loads(state).put(0, pictures(0))
    logging.get_absl_logger().removeHandler(caplog.handler)
    np.testing.assert_array_equal(shared.take(batch), np.stack(pictures(0)))
    assert "slower" in caplog.text and "Permission denied" in caplog.text


def test_batches_travel_by_themselves_where_memory_cannot_be_shared(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    shared = SharedBatches(PLACES, SHAPE)
    batch = shared.take(worker_of(shared).put(0, pictures(0)))
    np.testing.assert_array_equal(batch, np.stack(pictures(0)))
    shared.close()


def test_batches_travel_by_themselves_where_memory_is_refused():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**10, before[1]))
    try:
        shared = SharedBatches(PLACES, SHAPE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert isinstance(worker_of(shared).put(0, pictures(0)), np.ndarray)
    shared.close()
