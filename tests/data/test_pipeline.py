"""The order of examples is arithmetic; nothing about hosts, threads or processes may show in it."""

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
    Hangs,
    LabelMaps,
    Large,
    Noise,
    Pictures,
    Plain,
    Stops,
    Wrong,
)

ROOT = pathlib.Path(__file__).parent.parent.parent
SIZE, BATCH, SEED = 29, 4, 5  # 7 batches an epoch, one example left over


@pytest.fixture
def loader():
    """Makes loaders and closes them."""
    opened = []

    def make(dataset=None, transform=None, **options):
        dataset = Pictures(SIZE) if dataset is None else dataset
        options = {"batch_size": BATCH, "seed": SEED, "threads": 2, **options}
        opened.append(pipeline.TrainLoader(dataset, LabelledImage(transform or Noise()), **options))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


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
    """Three epochs, read with one thread."""
    transform = LabelledImage(Noise())
    made = pipeline.TrainLoader(Pictures(SIZE), transform, batch_size=BATCH, seed=SEED, threads=1)
    batches = take(made, 21)
    made.close()
    return batches


def test_batches_hold_what_is_documented(unbroken):
    batch = unbroken[0]
    assert set(batch) == {"image", "label", "weight", "index"}
    assert batch["image"].shape == (BATCH, 4, 4, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].dtype == batch["index"].dtype == np.int32
    np.testing.assert_array_equal(batch["label"], batch["index"] % 7)
    np.testing.assert_array_equal(batch["weight"], np.ones(BATCH, np.float32))


def test_an_epoch_visits_no_example_twice_and_epochs_differ(unbroken):
    epochs = [
        np.concatenate([batch["index"] for batch in unbroken[start : start + 7]])
        for start in (0, 7, 14)
    ]
    for epoch in epochs:
        assert len(set(epoch)) == 28 and set(epoch) <= set(range(SIZE))
    assert not np.array_equal(epochs[0], epochs[1])
    assert len({tuple(sorted(epoch)) for epoch in epochs}) > 1  # another example is left over


def test_augmentation_differs_between_epochs(unbroken):
    def noise_of(index, batches):
        for batch in batches:
            for row in np.flatnonzero(batch["index"] == index):
                return batch["image"][row]
        return None

    common = set.intersection(
        *({int(i) for b in unbroken[s : s + 7] for i in b["index"]} for s in (0, 7))
    )
    same = [np.array_equal(noise_of(i, unbroken[:7]), noise_of(i, unbroken[7:14])) for i in common]
    assert not any(same)


@pytest.mark.parametrize(("threads", "workers"), [(4, 0), (2, 1), (2, 2)])
def test_threads_and_worker_processes_do_not_show(loader, unbroken, threads, workers):
    assert_same(take(loader(threads=threads, workers=workers), 9), unbroken[:9])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_read_the_same_global_batches(loader, unbroken, hosts):
    shares = [take(loader(rows=rows), 9) for rows in np.array_split(np.arange(BATCH), hosts)]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    assert_same(joined, unbroken[:9])


def test_rows_need_not_be_neighbours(loader, unbroken):
    got = take(loader(rows=np.array([0, 3]), workers=0), 3)
    wanted = [{name: value[[0, 3]] for name, value in batch.items()} for batch in unbroken[:3]]
    assert_same(got, wanted)


@pytest.mark.parametrize("start", [1, 7, 12])
def test_resuming_equals_never_stopping(loader, unbroken, start):
    assert_same(take(loader(start_step=start), 21 - start), unbroken[start:])


def test_resuming_with_workers_equals_never_stopping(loader, unbroken):
    assert_same(take(loader(start_step=5, workers=2), 4), unbroken[5:9])


def test_device_arrays_stay_while_the_memory_serves_others(loader):
    """They may lie where their pixels came in; they outlive the batches after them and the end."""
    devices = sharding.batch_sharding(sharding.make_mesh(devices=jax.devices()[:2]))

    def put(batch):
        return global_batch.to_global(batch, devices, rows=np.arange(BATCH), batch_size=BATCH)

    made = loader(transform=Large(), workers=2, put_on_devices=put)
    batches = take(made, 6)
    for _ in range(24):
        next(made)
    made.close()
    gc.collect()
    assert isinstance(batches[0]["image"], jax.Array)
    assert_same(batches, take(loader(transform=Large()), 6))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_take_the_slots_of_shared_memory_in_turn(loader, monkeypatch, workers):
    taken, unwatched = [], SharedBatches.take

    def watched(shared, batch):
        taken.append(batch)
        return unwatched(shared, batch)

    monkeypatch.setattr(SharedBatches, "take", watched)
    made = loader(workers=workers)
    for _ in range(40):
        next(made)
    slots = pipeline.shared_slots(workers)
    assert taken[:40] == [number % slots for number in range(40)]
    assert slots % workers == 0


def test_who_keeps_every_batch_gets_every_batch(loader, unbroken):
    """More of them than shared memory has slots for."""
    made = loader(workers=1)
    assert_same(take(made, 21), unbroken)


def test_another_seed_is_another_order(loader, unbroken):
    assert not np.array_equal(next(loader(seed=SEED + 1))["index"], unbroken[0]["index"])


def test_indices_and_state_tell_where_a_step_stands(loader, unbroken):
    made = loader()
    for step in (0, 6, 7, 20):
        np.testing.assert_array_equal(made.indices(step), unbroken[step]["index"])
    assert json.loads(json.dumps(made.state(16))) == {"epoch": 2, "batch": 2, "replaced": []}


def test_an_epoch_shorter_than_a_batch_is_refused(loader):
    with pytest.raises(DataError, match="pictures has 29 examples, fewer than one batch of 30"):
        loader(batch_size=30)


def test_a_broken_example_gives_way_to_the_next_of_the_order(loader, unbroken, caplog):
    broken, following = unbroken[0]["index"][1:3]
    logging.get_absl_logger().addHandler(caplog.handler)
    made = loader(Pictures(SIZE, broken={broken}))
    batches = take(made, 7)
    np.testing.assert_array_equal(
        batches[0]["index"], np.where(unbroken[0]["index"] == broken, following, made.indices(0))
    )
    np.testing.assert_array_equal(batches[0]["image"][1], unbroken[0]["image"][2])
    assert_same(batches[1:], unbroken[1:7])
    assert made.state(7)["replaced"] == [broken]
    assert f"picture-{broken}: cut off" in caplog.text


def test_replacements_are_the_same_on_every_host(loader):
    dataset = Pictures(SIZE, broken={3, 8, 9, 20})
    whole = take(loader(dataset), 7)
    halves = [take(loader(dataset, rows=rows), 7) for rows in np.array_split(np.arange(BATCH), 2)]
    for batch, first, second in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(
            batch["index"], np.concatenate([first["index"], second["index"]])
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_examples_stop_the_run_with_the_list(loader, workers):
    made = loader(Pictures(SIZE, broken={3, 8, 20}), max_broken=2, workers=workers)
    with pytest.raises(DataError, match="3 broken images.*max_broken=2") as error:
        take(made, 21)
    for index in (3, 8, 20):
        assert f"picture-{index}: cut off" in str(error.value)


def test_a_broken_example_counts_once_however_often_it_comes(loader):
    made = loader(Pictures(SIZE, broken={3}), max_broken=1)
    assert len(take(made, 28)) == 28 and list(made.replaced) == [3]


def test_nothing_readable_stops_at_once(loader):
    with pytest.raises(DataError, match="3 broken images"):
        next(loader(Pictures(SIZE, broken=set(range(SIZE))), max_broken=2))


def test_examples_to_skip_are_replaced_but_not_broken(loader, unbroken):
    skipped, following = unbroken[0]["index"][:2]
    made = loader(Pictures(SIZE, skipped={skipped}), max_broken=0)
    assert next(made)["index"][0] == following and not made.replaced


def test_a_bug_is_no_broken_picture(loader):
    with pytest.raises(TypeError, match="a bug"):
        next(loader(transform=Wrong()))


def test_a_read_that_hangs_is_named(loader, unbroken):
    stuck = unbroken[2]["index"][1]
    made = loader(transform=Hangs(stuck), timeout=1.0)
    with pytest.raises(HangError, match=f"no batch for step .* within 1 s: .*picture-{stuck}"):
        take(made, 3)


LATE = 21  # a batch that worker 1 of 2 starts after it has delivered others


def test_a_worker_that_dies_is_named(loader, tmp_path):
    dataset, pid_file = Pictures(200), tmp_path / "pid"
    at = pipeline.epoch_order(SEED, 0, 200)[LATE * BATCH]
    made = loader(dataset, Stops(at, SIGKILL, pid_file), workers=2, threads=1)
    with pytest.raises(DataError, match="worker died before step .*exit code -9") as error:
        take(made, LATE + 1)
    assert f"data worker 1 of 2 (process {pid_file.read_text()})" in str(error.value)


def test_a_worker_that_is_stuck_is_named_and_ended(loader, tmp_path):
    dataset, pid_file = Pictures(200), tmp_path / "pid"
    at = pipeline.epoch_order(SEED, 0, 200)[LATE * BATCH]
    made = loader(dataset, Stops(at, SIGSTOP, pid_file), workers=2, threads=1, timeout=10.0)
    with pytest.raises(HangError, match="no batch for step .* within 10 s") as error:
        take(made, LATE + 1)
    pid = pid_file.read_text()
    assert f"data worker 1 of 2 (process {pid})" in str(error.value)
    made.close()
    wait_until(lambda: not pathlib.Path(f"/proc/{pid}").exists())


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        multiprocessing.active_children()  # collects what has ended
        time.sleep(0.05)
    assert condition()


def wait_for_the_end_of(pid):
    wait_until(lambda: not running(pid))


def running(pid):
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_workers_leave_signals_to_the_main_process(loader, tmp_path):
    """A signal to the whole group must not take the batches that saving waits for."""
    dataset, pid_file = Pictures(200), tmp_path / "pid"
    at = pipeline.epoch_order(SEED, 0, 200)[LATE * BATCH]
    made = loader(dataset, Stops(at, signal.SIGTERM, pid_file), workers=2, threads=1)
    assert len(take(made, LATE + 2)) == LATE + 2
    made.close()
    wait_for_the_end_of(pid_file.read_text())


SCRIPT = """
from fd_jax.cli import application
from fd_jax.data import pipeline
from fd_jax.data.transforms import LabelledImage
from tests.data.pictures import Hangs, Pictures, Plain

def main(argv):
    workers = int(argv[1])
    transform = Plain() if workers else Hangs(int(pipeline.epoch_order(0, 0, 40)[8]), seconds=3600)
    made = pipeline.TrainLoader(
        Pictures(40), LabelledImage(transform), batch_size=4, seed=0, workers=workers, threads=1,
        timeout=10.0
    )
    for _ in range(4):
        next(made)
    print(*made._pids.values(), flush=True)
    while True:
        next(made)

if __name__ == "__main__":
    application.run_app(main)
"""


@pytest.fixture
def script(tmp_path):
    """Starts a loader of so many workers in a process of its own."""
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


def test_a_read_that_hangs_ends_the_process(script):
    process = script(workers=0)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "error: no batch for step 2 within 10 s: being read: picture-" in said


def test_workers_end_with_a_main_process_that_is_killed(script):
    process = script(workers=2)
    pids = process.stdout.readline().split()
    assert len(pids) == 2 and all(map(running, pids))
    process.kill()
    for pid in pids:
        wait_for_the_end_of(pid)


def evaluation(dataset, **options):
    return list(pipeline.eval_batches(dataset, LabelledImage(Plain()), batch_size=BATCH, **options))


def test_evaluation_sees_every_example_once():
    batches = evaluation(Pictures(SIZE))
    assert [len(batch["image"]) for batch in batches] == [BATCH] * 8
    weight = np.concatenate([batch["weight"] for batch in batches])
    index = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(index[weight > 0], np.arange(SIZE))
    np.testing.assert_array_equal(index[weight == 0], [-1, -1, -1])
    np.testing.assert_array_equal(batches[-1]["label"], [28 % 7, -1, -1, -1])
    assert weight.sum() == SIZE


@pytest.mark.parametrize("hosts", [2, 4])
def test_evaluation_is_exact_for_any_number_of_hosts(hosts):
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


def test_evaluation_leaves_out_broken_examples_up_to_a_number():
    dataset = Pictures(SIZE, broken={2, 6})
    batches = evaluation(dataset, max_broken=2)
    weight = np.concatenate([batch["weight"] for batch in batches])
    np.testing.assert_array_equal(np.flatnonzero(weight[:SIZE] == 0), [2, 6])
    with pytest.raises(DataError, match="2 broken images.*\n.*picture-2.*\n.*picture-6"):
        evaluation(dataset, max_broken=1)


# --- another element -------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_an_element_of_the_transform_flows_through_the_loader(workers):
    """A label map and a box per picture, named in the transform and nowhere else."""
    made = pipeline.TrainLoader(
        Pictures(SIZE), LabelMaps(), batch_size=BATCH, seed=SEED, threads=2, workers=workers
    )
    batches = take(made, 9)
    made.close()
    for batch in batches:
        assert set(batch) == {"image", "label_map", "box", "weight", "index"}
        assert batch["label_map"].shape == (BATCH, SIDE, SIDE)
        assert batch["label_map"].dtype == np.int32 and batch["box"].dtype == np.float32
        for row, index in enumerate(batch["index"]):
            wanted = LabelMaps().of_index(index)
            np.testing.assert_array_equal(batch["image"][row], np.full((SIDE, SIDE, 3), index))
            np.testing.assert_array_equal(batch["label_map"][row], wanted["label_map"])
            np.testing.assert_array_equal(batch["box"][row], wanted["box"])


def test_an_element_of_the_transform_is_padded_in_evaluation():
    *_, last = pipeline.eval_batches(
        Pictures(SIZE, broken={SIZE - 1}), LabelMaps(), batch_size=BATCH, max_broken=1
    )
    np.testing.assert_array_equal(last["weight"], [0, 0, 0, 0])
    np.testing.assert_array_equal(last["index"], [SIZE - 1, -1, -1, -1])
    np.testing.assert_array_equal(last["label_map"], np.full((BATCH, SIDE, SIDE), 255))
    np.testing.assert_array_equal(last["box"], np.zeros((BATCH, 4)))


def test_an_element_of_the_transform_is_an_argument_of_the_step():
    """The compiled step asks for what the loader brings, and it can be put onto the mesh."""
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
    asked = {name: (leaf.shape, leaf.dtype, leaf.sharding) for name, leaf in built.batch.items()}
    del asked["stop"]
    assert shapes == asked


def test_a_row_that_is_not_as_specified_is_refused(loader):
    class Lacking(LabelMaps):
        def __call__(self, example, rng):
            return {"image": example.image}

    made = pipeline.TrainLoader(Pictures(SIZE), Lacking(), batch_size=BATCH, seed=SEED, threads=1)
    with pytest.raises(KeyError, match="a row has .*its elements are .*label_map"):
        next(made)
    made.close()
