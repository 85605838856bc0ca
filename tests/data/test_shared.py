"""Batches in shared memory: a slot that is still in use is never overwritten."""

import gc
import os
import pickle
import resource

from absl import logging
import numpy as np
import pytest

from fd_jax.data import elements
from fd_jax.data.elements import Element
from fd_jax.data.shared import SharedBatches

SLOTS, ROWS, SHAPE = 3, 2, (2, 5, 5, 3)
ELEMENTS = {"image": Element((5, 5, 3), "uint8"), "label": Element((), "int32", -1)}


@pytest.fixture
def shared():
    memory = SharedBatches(SLOTS, ELEMENTS, ROWS)
    yield memory
    memory.close()


def worker_of(shared):
    """The object as a worker process receives it, with its own mapping of the memory."""
    return pickle.loads(pickle.dumps(shared))


def pictures(number):
    return [np.full(SHAPE[1:], 10 * number + i, np.uint8) for i in range(ROWS)]


def rows(images, label=7):
    return [{"image": image, "label": label} for image in images]


def assert_holds(batch, number):
    np.testing.assert_array_equal(batch["image"], np.stack(pictures(number)))
    np.testing.assert_array_equal(batch["label"], np.full(ROWS, 7, np.int32))
    assert batch["label"].dtype == np.int32


def test_batches_go_into_the_slots_in_turn_and_arrive_unchanged(shared):
    worker = worker_of(shared)
    for number in range(3 * SLOTS):
        held = worker.put(number, rows(pictures(number)))
        assert held.slot == number % SLOTS
        assert_holds(shared.take(held), number)


def test_a_slot_is_free_again_once_no_view_of_it_is_left(shared):
    worker = worker_of(shared)
    taken = shared.take(worker.put(0, rows(pictures(0))))
    view = np.asarray(taken["image"])[1:, ::2]
    del taken
    gc.collect()
    other = worker.put(SLOTS, rows(pictures(1)))  # the slot is in use
    assert isinstance(other, dict) and shared.take(other) is other
    assert_holds(other, 1)
    np.testing.assert_array_equal(view, np.stack(pictures(0))[1:, ::2])
    del view
    assert worker.put(SLOTS, rows(pictures(1))).slot == 0


@pytest.mark.parametrize("name", ELEMENTS)
def test_a_slot_stays_in_use_while_any_of_its_arrays_is_alive(shared, name):
    worker = worker_of(shared)
    kept = shared.take(worker.put(0, rows(pictures(0))))[name]
    gc.collect()
    assert isinstance(worker.put(SLOTS, rows(pictures(1), label=8)), dict)
    np.testing.assert_array_equal(kept, elements.stack(rows(pictures(0)), ELEMENTS)[name])
    del kept
    assert worker.put(SLOTS, rows(pictures(1))).slot == 0


def test_a_slot_is_in_use_before_its_batch_is_taken(shared):
    worker = worker_of(shared)
    held = worker.put(0, rows(pictures(0)))
    assert held.slot == 0
    assert isinstance(worker.put(SLOTS, rows(pictures(1))), dict)
    assert_holds(shared.take(held), 0)


def test_a_batch_that_was_taken_outlives_the_shared_memory_object():
    shared = SharedBatches(SLOTS, ELEMENTS, ROWS)
    taken = shared.take(worker_of(shared).put(0, rows(pictures(0))))
    shared.close()
    del shared
    gc.collect()
    assert_holds(taken, 0)


@pytest.mark.parametrize(
    ("pictures_", "error"),
    [
        ([np.zeros((2, 4, 3), np.uint8)] * 2, ValueError),
        ([np.zeros((5, 5, 3), np.uint8)] * 3, ValueError),
        ([np.zeros((5, 5, 3), np.uint16)] * 2, TypeError),
        ([np.zeros((5, 5, 3), np.float32)] * 2, TypeError),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused_whether_the_slot_is_free_or_not(
    shared, pictures_, error
):
    worker = worker_of(shared)
    for _ in range(2):
        with pytest.raises(error):
            worker.put(0, rows(pictures_))
        worker.put(0, rows(pictures(0)))


def test_a_worker_that_starts_after_close_writes_into_no_file(shared, tmp_path):
    """Not even if another file got the descriptor number of the memory."""
    number, state = shared._file, pickle.dumps(shared)
    shared.close()
    target = tmp_path / "other"
    target.write_bytes(bytes(10**6))
    descriptor = os.open(target, os.O_RDWR)
    if descriptor != number:
        os.dup2(descriptor, number)
        os.close(descriptor)
    for late in (pickle.loads(state), worker_of(shared)):
        batch = late.put(0, rows(pictures(0)))
        assert_holds(batch, 0)
    os.close(number)
    assert target.read_bytes() == bytes(10**6)


def test_a_worker_without_permission_to_open_the_memory_warns_and_uses_the_pipe(
    shared, monkeypatch, caplog
):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", path)

    state = pickle.dumps(shared)
    monkeypatch.setattr(os, "open", refuse)
    logging.get_absl_logger().addHandler(caplog.handler)
    batch = pickle.loads(state).put(0, rows(pictures(0)))
    logging.get_absl_logger().removeHandler(caplog.handler)
    assert_holds(shared.take(batch), 0)
    assert "slower" in caplog.text and "Permission denied" in caplog.text


def test_without_memfd_batches_are_returned_as_ordinary_arrays(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    shared = SharedBatches(SLOTS, ELEMENTS, ROWS)
    batch = shared.take(worker_of(shared).put(0, rows(pictures(0))))
    assert_holds(batch, 0)
    shared.close()


def test_when_memory_is_refused_batches_are_returned_as_ordinary_arrays():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**10, before[1]))
    try:
        shared = SharedBatches(SLOTS, ELEMENTS, ROWS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert isinstance(worker_of(shared).put(0, rows(pictures(0))), dict)
    shared.close()
