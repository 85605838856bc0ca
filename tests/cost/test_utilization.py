"""MFU and memory of devices as accelerators describe themselves."""

import dataclasses

import jax
import numpy as np
import pytest

from fd_jax.cost.utilization import Utilization
from fd_jax.tasks.distill import DistillTask
from tests import tiny


@dataclasses.dataclass
class Device:
    device_kind: str
    memory: dict | None = None
    id: int = 0

    def memory_stats(self):
        return self.memory


@dataclasses.dataclass
class Core(Device):
    coords: tuple = (0, 0, 0)


@pytest.fixture(scope="module")
def task():
    return DistillTask(tiny.config(remat="full"), teacher_spec=tiny.teacher_spec())


def test_mfu_is_model_flops_over_peak(task):
    devices = [Device("NVIDIA H200")] * 4
    rate = 1e6
    # Remat repeats work, which is not counted.
    want = rate * task.flops().model / (4 * 989e12)
    assert Utilization(task.flops(), devices, devices).metrics(rate) == {"mfu": pytest.approx(want)}
    assert task.flops().executed > task.flops().model


def test_two_devices_of_a_v4_are_one_chip(task):
    cores = [Core("TPU v4", coords=(x, 0, 0)) for x in (0, 0, 1, 1)]
    whole = [Core("TPU v4", coords=(x, 0, 0)) for x in (0, 1)]
    found = [
        Utilization(task.flops(), devices, []).metrics(1.0)["mfu"] for devices in (cores, whole)
    ]
    np.testing.assert_allclose(found[0], found[1])
    np.testing.assert_allclose(found[0], task.flops().model / (2 * 275e12))


def test_memory_is_of_the_fullest_device(task):
    gib = 2**30
    local = [
        Device("?", {"bytes_in_use": 3 * gib, "peak_bytes_in_use": 5 * gib}),
        Device("?", {"bytes_in_use": 4 * gib, "peak_bytes_in_use": 4 * gib}),
    ]
    found = Utilization(task.flops(), local, local).metrics(1.0)
    assert found == {"hbm_gib": 4.0, "hbm_peak_gib": 5.0}


def test_nothing_is_said_of_what_is_not_known(task):
    assert Utilization(task.flops(), jax.devices(), jax.local_devices()).metrics(1.0) == {}
    chips = [Device("NVIDIA H200")]
    assert Utilization(None, chips, chips).metrics(1.0) == {}
