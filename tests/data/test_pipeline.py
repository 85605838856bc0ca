"""Batches depend on seed and step alone: not on hosts, threads, processes or restarts."""

import gc
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

from absl import logging
import jax
import numpy as np
import pytest

from fd_jax import sharding
from fd_jax.data import elements, global_batch, pipeline
from fd_jax.data.shared import SharedBatches
from fd_jax.data.transforms import LabelledImage
from fd_jax.errors import DataError, HangError
from fd_jax.tasks.distill import DistillTask
from fd_jax.training import program
from tests import tiny
from tests.data.pictures import (
    SIDE,
    SIGKILL,
    SIGSTOP,
    Buggy,
    Hangs,
    LabelMaps,
    Large,
    Noise,
    Pictures,
    Plain,
    Stops,
)

ROOT = pathlib.Path(__file__).parent.parent.parent
SIZE, BATCH, SEED = 29, 4, 5  # 7 batches per epoch, one example left over


@pytest.fixture
def make_loader():
    """Returns a function that opens loaders; closes them after the test."""
    opened = []

    def make(dataset=None, transform=None, **options):
        dataset = Pictures(SIZE) if dataset is None else dataset
        options = {"batch_size": BATCH, "seed": SEED, "threads": 2, **options}
        opened.append(pipeline.TrainLoader(dataset, LabelledImage(transform or Noise()), **options))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.fixture(scope="module")
def unbroken():
    """The batches of three epochs, read with one thread and without a restart."""
    transform = LabelledImage(Noise())
    loader = pipeline.TrainLoader(Pictures(SIZE), transform, batch_size=BATCH, seed=SEED, threads=1)
    batches = take(loader, 21)
    loader.close()
    return batches


def test_batches_have_the_documented_elements(unbroken):
    batch = unbroken[0]
    assert set(batch) == {"image", "label", "weight", "index"}
    assert batch["image"].shape == (BATCH, 4, 4, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].dtype == batch["index"].dtype == np.int32
    np.testing.assert_array_equal(batch["label"], batch["index"] % 7)
    np.testing.assert_array_equal(batch["weight"], np.ones(BATCH, np.float32))


def test_an_epoch_visits_no_example_twice_and_epochs_have_different_orders(unbroken):
    epochs = [
        np.concatenate([batch["index"] for batch in unbroken[start : start + 7]])
        for start in (0, 7, 14)
    ]
    for epoch in epochs:
        assert len(set(epoch)) == 28 and set(epoch) <= set(range(SIZE))
    assert not np.array_equal(epochs[0], epochs[1])
    assert (
        len({tuple(sorted(epoch)) for epoch in epochs}) > 1
    )  # not always the same one is left over


def test_augmentation_differs_between_epochs(unbroken):
    def image_of(index, batches):
        for batch in batches:
            for row in np.flatnonzero(batch["index"] == index):
                return batch["image"][row]
        return None

    common = set.intersection(
        *({int(i) for b in unbroken[s : s + 7] for i in b["index"]} for s in (0, 7))
    )
    same = [np.array_equal(image_of(i, unbroken[:7]), image_of(i, unbroken[7:14])) for i in common]
    assert not any(same)


@pytest.mark.parametrize(("threads", "workers"), [(4, 0), (2, 1), (2, 2)])
def test_batches_do_not_depend_on_threads_and_worker_processes(
    make_loader, unbroken, threads, workers
):
    assert_same(take(make_loader(threads=threads, workers=workers), 9), unbroken[:9])


@pytest.mark.parametrize("hosts", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_hosts(make_loader, unbroken, hosts):
    shares = [take(make_loader(rows=rows), 9) for rows in np.array_split(np.arange(BATCH), hosts)]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    assert_same(joined, unbroken[:9])


def test_a_process_may_read_rows_that_are_not_contiguous(make_loader, unbroken):
    got = take(make_loader(rows=np.array([0, 3]), workers=0), 3)
    wanted = [{name: value[[0, 3]] for name, value in batch.items()} for batch in unbroken[:3]]
    assert_same(got, wanted)


@pytest.mark.parametrize("start", [1, 7, 12])
def test_a_resumed_loader_gives_the_batches_of_an_unbroken_one(make_loader, unbroken, start):
    assert_same(take(make_loader(start_step=start), 21 - start), unbroken[start:])


def test_a_resumed_loader_with_workers_gives_the_batches_of_an_unbroken_one(make_loader, unbroken):
    assert_same(take(make_loader(start_step=5, workers=2), 4), unbroken[5:9])


def test_device_arrays_stay_valid_while_shared_memory_is_reused(make_loader):
    """JAX may use the host memory of a batch in place; later batches must not overwrite it."""
    devices = sharding.batch_sharding(sharding.make_mesh(devices=jax.devices()[:2]))

    def put(batch):
        return global_batch.to_global(batch, devices, rows=np.arange(BATCH), batch_size=BATCH)

    loader = make_loader(transform=Large(), workers=2, put_on_devices=put)
    batches = take(loader, 6)
    for _ in range(24):
        next(loader)
    loader.close()
    gc.collect()
    assert isinstance(batches[0]["image"], jax.Array)
    assert_same(batches, take(make_loader(transform=Large()), 6))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_use_the_slots_of_shared_memory_in_turn(make_loader, monkeypatch, workers):
    taken, original = [], SharedBatches.take

    def recording(shared, batch):
        taken.append(batch)
        return original(shared, batch)

    monkeypatch.setattr(SharedBatches, "take", recording)
    loader = make_loader(workers=workers)
    for _ in range(40):
        next(loader)
    slots = pipeline.shared_slots(workers)
    assert [held.slot for held in taken[:40]] == [number % slots for number in range(40)]
    assert slots % workers == 0


def test_keeping_every_batch_does_not_block_or_corrupt_the_loader(make_loader, unbroken):
    """There are more batches than slots in shared memory."""
    loader = make_loader(workers=1)
    assert_same(take(loader, 21), unbroken)


def test_another_seed_gives_another_order(make_loader, unbroken):
    assert not np.array_equal(next(make_loader(seed=SEED + 1))["index"], unbroken[0]["index"])


def test_indices_and_state_describe_the_position_of_a_step(make_loader, unbroken):
    loader = make_loader()
    for step in (0, 6, 7, 20):
        np.testing.assert_array_equal(loader.indices(step), unbroken[step]["index"])
    assert json.loads(json.dumps(loader.state(16))) == {"epoch": 2, "batch": 2, "replaced": []}


def test_a_dataset_smaller_than_one_batch_is_refused(make_loader):
    with pytest.raises(DataError, match="pictures has 29 examples, fewer than one batch of 30"):
        make_loader(batch_size=30)


def test_a_broken_example_is_replaced_by_the_next_one_in_the_order(make_loader, unbroken, caplog):
    broken, following = unbroken[0]["index"][1:3]
    logging.get_absl_logger().addHandler(caplog.handler)
    loader = make_loader(Pictures(SIZE, broken={broken}))
    batches = take(loader, 7)
    np.testing.assert_array_equal(
        batches[0]["index"], np.where(unbroken[0]["index"] == broken, following, loader.indices(0))
    )
    np.testing.assert_array_equal(batches[0]["image"][1], unbroken[0]["image"][2])
    assert_same(batches[1:], unbroken[1:7])
    assert loader.state(7)["replaced"] == [broken]
    assert f"picture-{broken}: cut off" in caplog.text


def test_replacements_are_the_same_on_every_host(make_loader):
    dataset = Pictures(SIZE, broken={3, 8, 9, 20})
    whole = take(make_loader(dataset), 7)
    halves = [
        take(make_loader(dataset, rows=rows), 7) for rows in np.array_split(np.arange(BATCH), 2)
    ]
    for batch, first, second in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(
            batch["index"], np.concatenate([first["index"], second["index"]])
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_examples_stop_the_run_and_are_listed(make_loader, workers):
    loader = make_loader(Pictures(SIZE, broken={3, 8, 20}), max_broken=2, workers=workers)
    with pytest.raises(DataError, match="3 broken images.*max_broken=2") as error:
        take(loader, 21)
    for index in (3, 8, 20):
        assert f"picture-{index}: cut off" in str(error.value)


def test_a_broken_example_is_counted_once_although_every_epoch_has_it(make_loader):
    loader = make_loader(Pictures(SIZE, broken={3}), max_broken=1)
    assert len(take(loader, 28)) == 28 and list(loader.replaced) == [3]


def test_a_dataset_without_readable_examples_stops_at_the_first_batch(make_loader):
    with pytest.raises(DataError, match="3 broken images"):
        next(make_loader(Pictures(SIZE, broken=set(range(SIZE))), max_broken=2))


def test_skipped_examples_are_replaced_but_not_counted_as_broken(make_loader, unbroken):
    skipped, following = unbroken[0]["index"][:2]
    loader = make_loader(Pictures(SIZE, skipped={skipped}), max_broken=0)
    assert next(loader)["index"][0] == following and not loader.replaced


def test_a_bug_in_the_transform_is_raised_and_not_taken_for_a_broken_image(make_loader):
    with pytest.raises(TypeError, match="a bug"):
        next(make_loader(transform=Buggy()))


def test_the_example_whose_read_hangs_is_named(make_loader, unbroken):
    stuck = unbroken[2]["index"][1]
    loader = make_loader(transform=Hangs(stuck), timeout=1.0)
    with pytest.raises(HangError, match=f"no batch for step .* within 1 s: .*picture-{stuck}"):
        take(loader, 3)


LATE = 21  # a batch of worker 1 of 2, after it has delivered others


@pytest.mark.slow
def test_a_worker_that_dies_is_named(make_loader, tmp_path):
    dataset, pid_file = Pictures(200), tmp_path / "pid"
    at = pipeline.epoch_order(SEED, 0, 200)[LATE * BATCH]
    loader = make_loader(dataset, Stops(at, SIGKILL, pid_file), workers=2, threads=1)
    with pytest.raises(DataError, match="worker died before step .*exit code -9") as error:
        take(loader, LATE + 1)
    assert f"data worker 1 of 2 (process {pid_file.read_text()})" in str(error.value)


@pytest.mark.slow
def test_a_worker_that_is_stuck_is_named_and_killed(make_loader, tmp_path):
    dataset, pid_file = Pictures(200), tmp_path / "pid"
    at = pipeline.epoch_order(SEED, 0, 200)[LATE * BATCH]
    loader = make_loader(dataset, Stops(at, SIGSTOP, pid_file), workers=2, threads=1, timeout=10.0)
    with pytest.raises(HangError, match="no batch for step .* within 10 s") as error:
        take(loader, LATE + 1)
    pid = pid_file.read_text()
    assert f"data worker 1 of 2 (process {pid})" in str(error.value)
    loader.close()
    wait_until(lambda: not pathlib.Path(f"/proc/{pid}").exists())


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        multiprocessing.active_children()  # reaps the children that have ended
        time.sleep(0.05)
    assert condition()


def wait_for_exit(pid):
    wait_until(lambda: not running(pid))


def running(pid):
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_workers_ignore_sigterm(make_loader, tmp_path):
    """The main process still needs batches until it has saved, after a signal to all processes."""
    dataset, pid_file = Pictures(200), tmp_path / "pid"
    at = pipeline.epoch_order(SEED, 0, 200)[LATE * BATCH]
    loader = make_loader(dataset, Stops(at, signal.SIGTERM, pid_file), workers=2, threads=1)
    assert len(take(loader, LATE + 2)) == LATE + 2
    loader.close()
    wait_for_exit(pid_file.read_text())


SCRIPT = """
from fd_jax.cli import application
from fd_jax.data import pipeline
from fd_jax.data.transforms import LabelledImage
from tests.data.pictures import Hangs, Pictures, Plain

def main(argv):
    workers = int(argv[1])
    transform = Plain() if workers else Hangs(int(pipeline.epoch_order(0, 0, 40)[8]), seconds=3600)
    loader = pipeline.TrainLoader(
        Pictures(40), LabelledImage(transform), batch_size=4, seed=0, workers=workers, threads=1,
        timeout=10.0
    )
    for _ in range(4):
        next(loader)
    print(*loader._pids.values(), flush=True)
    while True:
        next(loader)

if __name__ == "__main__":
    application.run_app(main)
"""


@pytest.fixture
def script(tmp_path):
    """Returns a function that starts a loader with some workers in a process of its own."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    started = []

    def start(workers):
        process = subprocess.Popen(
            [sys.executable, path, str(workers)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_read_that_hangs_ends_the_process_with_one_message(script):
    process = script(workers=0)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "error: no batch for step 2 within 10 s: being read: picture-" in stderr


def test_workers_exit_when_the_main_process_is_killed(script):
    process = script(workers=2)
    pids = process.stdout.readline().split()
    assert len(pids) == 2 and all(map(running, pids))
    process.kill()
    for pid in pids:
        wait_for_exit(pid)


def evaluation(dataset, **options):
    return list(pipeline.eval_batches(dataset, LabelledImage(Plain()), batch_size=BATCH, **options))


def test_evaluation_reads_every_example_once_and_pads_the_last_batch():
    batches = evaluation(Pictures(SIZE))
    assert [len(batch["image"]) for batch in batches] == [BATCH] * 8
    weight = np.concatenate([batch["weight"] for batch in batches])
    index = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(index[weight > 0], np.arange(SIZE))
    np.testing.assert_array_equal(index[weight == 0], [-1, -1, -1])
    np.testing.assert_array_equal(batches[-1]["label"], [28 % 7, -1, -1, -1])
    assert weight.sum() == SIZE


@pytest.mark.parametrize("hosts", [2, 4])
def test_evaluation_batches_do_not_depend_on_the_number_of_hosts(hosts):
    whole = evaluation(Pictures(SIZE))
    shares = [
        list(
            pipeline.eval_batches(
                Pictures(SIZE), LabelledImage(Plain()), batch_size=BATCH, rows=rows
            )
        )
        for rows in np.array_split(np.arange(BATCH), hosts)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    assert_same(joined, whole)


def test_evaluation_stops_after_its_limit():
    batches = evaluation(Pictures(SIZE), limit=2)
    np.testing.assert_array_equal(np.concatenate([b["index"] for b in batches]), np.arange(8))


def test_evaluation_leaves_out_broken_examples_up_to_max_broken():
    dataset = Pictures(SIZE, broken={2, 6})
    batches = evaluation(dataset, max_broken=2)
    weight = np.concatenate([batch["weight"] for batch in batches])
    np.testing.assert_array_equal(np.flatnonzero(weight[:SIZE] == 0), [2, 6])
    with pytest.raises(DataError, match="2 broken images.*\n.*picture-2.*\n.*picture-6"):
        evaluation(dataset, max_broken=1)


# --- a new element ---------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_new_element_of_the_transform_reaches_the_batches(workers):
    """A label map and a box for each image, defined in the transform and nowhere else."""
    loader = pipeline.TrainLoader(
        Pictures(SIZE), LabelMaps(), batch_size=BATCH, seed=SEED, threads=2, workers=workers
    )
    batches = take(loader, 9)
    loader.close()
    for batch in batches:
        assert set(batch) == {"image", "label_map", "box", "weight", "index"}
        assert batch["label_map"].shape == (BATCH, SIDE, SIDE)
        assert batch["label_map"].dtype == np.int32 and batch["box"].dtype == np.float32
        for row, index in enumerate(batch["index"]):
            wanted = LabelMaps().of_index(index)
            np.testing.assert_array_equal(batch["image"][row], np.full((SIDE, SIDE, 3), index))
            np.testing.assert_array_equal(batch["label_map"][row], wanted["label_map"])
            np.testing.assert_array_equal(batch["box"][row], wanted["box"])


def test_a_new_element_of_the_transform_is_padded_in_evaluation():
    *_, last = pipeline.eval_batches(
        Pictures(SIZE, broken={SIZE - 1}), LabelMaps(), batch_size=BATCH, max_broken=1
    )
    np.testing.assert_array_equal(last["weight"], [0, 0, 0, 0])
    np.testing.assert_array_equal(last["index"], [SIZE - 1, -1, -1, -1])
    np.testing.assert_array_equal(last["label_map"], np.full((BATCH, SIDE, SIDE), 255))
    np.testing.assert_array_equal(last["box"], np.zeros((BATCH, 4)))


def test_a_new_element_of_the_transform_is_an_argument_of_the_step():
    """The compiled step takes the arrays of the loader, as they are placed onto the mesh."""
    config = tiny.config(batch_size=8)
    specified = elements.of_batch(LabelMaps().elements)
    built = program.build(
        DistillTask(config, teacher_spec=tiny.teacher_spec()),
        config,
        sharding.make_mesh(),
        steps_per_epoch=3,
        total_steps=3,
        elements=specified,
    )
    (host,) = pipeline.eval_batches(Pictures(8), LabelMaps(), batch_size=8)
    split = sharding.batch_sharding(built.mesh)
    batch = global_batch.to_global(host, split, rows=np.arange(8), batch_size=8)
    shapes = {name: (leaf.shape, leaf.dtype, leaf.sharding) for name, leaf in batch.items()}
    expected = {name: (leaf.shape, leaf.dtype, leaf.sharding) for name, leaf in built.batch.items()}
    del expected["stop"]
    assert shapes == expected


def test_a_row_without_a_specified_element_is_refused(make_loader):
    class Lacking(LabelMaps):
        def __call__(self, example, rng):
            return {"image": example.image}

    loader = pipeline.TrainLoader(Pictures(SIZE), Lacking(), batch_size=BATCH, seed=SEED, threads=1)
    with pytest.raises(KeyError, match="a row has .*its elements are .*label_map"):
        next(loader)
    loader.close()
