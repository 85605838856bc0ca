"""A pass over images: sums against plain numpy, on any mesh, and after a kill."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fd_jax import sharding
from fd_jax.data import datasets, transforms
from fd_jax.data.datasets import BrokenImageError
from fd_jax.diagnose import stream
from fd_jax.errors import DataError, UserError

COUNT = 37  # a prime, so that the last batch is padded


class Channels:
    """Mean and mean square of each colour channel: a measurement that numpy repeats easily."""

    def __init__(self, subject, scale):
        self.subject = subject
        self.params = {"scale": jnp.float32(scale)}

    def sums(self, params, batch):
        pixels = batch["image"].astype(jnp.float32) * params["scale"]
        weight = batch["weight"][:, None]
        return {
            "first": jnp.sum(jnp.mean(pixels, axis=(1, 2)) * weight, axis=0),
            "second": jnp.sum(jnp.mean(pixels**2, axis=(1, 2)) * weight, axis=0),
        }

    def figures(self, sums, images):
        return {name: (value / images).tolist() for name, value in sums.items()}


@pytest.fixture(scope="module")
def digits(embedded_data):
    return datasets.open_dataset("digits", f"test[:{COUNT}]", data_dir=embedded_data)


class Failing:
    """A dataset whose storage fails at one example, as when a process is killed there."""

    def __init__(self, dataset, index, error):
        self._dataset, self._index, self._error = dataset, index, error
        self.name, self.num_classes = dataset.name, dataset.num_classes
        self.class_names = dataset.class_names
        self.read = set()

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, index):
        self.read.add(index)
        if index == self._index:
            raise self._error
        return self._dataset[index]

    def describe(self, index):
        return self._dataset.describe(index)


def run(dataset, path, *, batch_size=8, devices=1, identity="a", scale=1 / 255, **fields):
    measurements = [Channels("one", scale), Channels("two", 2 * scale)]
    return stream.accumulate(
        measurements,
        dataset,
        transform=transforms.EvalTransform(24),
        mesh=sharding.make_mesh(devices=jax.devices()[:devices]),
        batch_size=batch_size,
        partial=path / "partial.npz",
        identity=identity,
        threads=2,
        **fields,
    )


def by_hand(dataset, scale):
    transform = transforms.EvalTransform(24)
    images = [transform(dataset[index].image) for index in range(len(dataset))]
    pixels = np.stack(images).astype(np.float64) * scale
    return {
        "first": pixels.mean(axis=(1, 2)).sum(0),
        "second": (pixels**2).mean(axis=(1, 2)).sum(0),
    }


def assert_same(actual, expected):
    assert actual.images == expected.images and actual.batches == expected.batches
    for a, b in zip(actual.sums, expected.sums, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == np.float64
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("batch_size, devices", [(8, 1), (8, 2), (16, 8), (64, 1)])
def test_sums_equal_numpy_for_any_batch_and_mesh(digits, tmp_path, batch_size, devices):
    totals = run(digits, tmp_path, batch_size=batch_size, devices=devices)
    assert totals.images == COUNT
    assert totals.batches == -(-COUNT // batch_size)
    for sums, scale in zip(totals.sums, (1 / 255, 2 / 255), strict=True):
        expected = by_hand(digits, scale)
        for name in expected:
            np.testing.assert_allclose(sums[name], expected[name], rtol=1e-6)


def test_a_killed_pass_goes_on_with_the_same_result(digits, tmp_path):
    (tmp_path / "whole").mkdir()
    whole = run(digits, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="storage is gone"):
        run(Failing(digits, 30, RuntimeError("storage is gone")), tmp_path, save_every=0.0)
    rest = Failing(digits, None, None)
    assert_same(run(rest, tmp_path), whole)
    assert min(rest.read) >= 8, "the images of finished batches are not read again"
    assert max(rest.read) == COUNT - 1
    # A finished pass is not repeated.
    again = Failing(digits, None, None)
    assert_same(run(again, tmp_path), whole)
    assert not again.read


def test_partial_sums_of_another_pass_are_refused(digits, tmp_path):
    run(digits, tmp_path)
    with pytest.raises(UserError, match="partial sums of another command"):
        run(digits, tmp_path, identity="b")


def test_damaged_partial_sums_are_refused(digits, tmp_path):
    run(digits, tmp_path)
    path = tmp_path / "partial.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read.*delete that file"):
        run(digits, tmp_path)


def test_sums_that_are_not_finite_name_the_model(digits, tmp_path):
    with pytest.raises(UserError, match="one: the sum of 'first' is not finite"):
        run(digits, tmp_path, scale=np.inf)


def test_broken_images_do_not_count(digits, tmp_path):
    dataset = Failing(digits, 5, BrokenImageError("cut off"))
    with pytest.raises(DataError, match="cut off"):
        run(dataset, tmp_path)
    totals = run(dataset, tmp_path, max_broken=1)
    assert totals.images == COUNT - 1
    others = datasets.Subset(digits, [i for i in range(COUNT) if i != 5])
    expected = by_hand(others, 1 / 255)
    np.testing.assert_allclose(totals.sums[0]["first"], expected["first"], rtol=1e-6)


def test_a_dataset_without_readable_images_is_refused(digits, tmp_path):
    dataset = Failing(datasets.Subset(digits, [3]), 0, BrokenImageError("cut off"))
    with pytest.raises(DataError, match="no readable image"):
        run(dataset, tmp_path, max_broken=1)
