"""cuDNN's attention, run on this CPU with XLA in the place of the kernel alone."""

import dataclasses
import functools

import pytest

from fd_jax.models import kernels
from fd_jax.models.kernels import base, cudnn


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """Padding, masks, grouped biases and the mesh are what is tested; the kernel needs its GPU."""
    attend = base.per_device(functools.partial(cudnn.attend, implementation="xla"))
    replaced = dataclasses.replace(cudnn.IMPLEMENTATION, attend=attend)
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, "cudnn", replaced)
