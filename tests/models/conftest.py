"""Kernels for GPUs, run on this CPU with XLA in the place of the kernel alone."""

import dataclasses
import functools

import pytest

from fd_jax.models import kernels
from fd_jax.models.kernels import base, cudnn, tokamax


@pytest.fixture
def kernels_by_xla(monkeypatch):
    """Padding, masks, grouped biases and the mesh are what is tested; the kernel needs its GPU."""
    for module, name, inner in ((cudnn, "cudnn", "xla"), (tokamax, "tokamax", ("xla",))):
        attend = base.per_device(functools.partial(module.attend, implementation=inner))
        replaced = dataclasses.replace(module.IMPLEMENTATION, attend=attend)
        monkeypatch.setitem(kernels.IMPLEMENTATIONS, name, replaced)
