"""Devices of TPU slices for ahead-of-time compilation; libtpu describes them without the chips."""

from collections.abc import Sequence
import dataclasses
import importlib.metadata
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from fd_jax.cost import hardware
from fd_jax.errors import ConfigError

# Without these, libtpu spends minutes asking a cloud metadata server which TPU it runs on, and only
# one process at a time can load it, because of a lock that protects a TPU; here there is none. The
# accelerator type here is not the one that is compiled for.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice.

    Attributes:
      name: name such as "v5e:4x4".
      chip: limits of its chips.
      chips: number of chips.
      devices: jax devices for a mesh. On v4, libtpu describes two per chip, its TensorCores; a real
        v4 host shows one device per chip, with the memory of both.
    """

    name: str
    chip: hardware.Chip
    chips: int
    devices: Sequence[Any]

    @property
    def devices_per_chip(self) -> int:
        """Number of jax devices per chip: 2 on v4, else 1."""
        return len(self.devices) // self.chips


def describe(name: str) -> Slice:
    """The slice with a name such as "v5e:4x4"; needs libtpu, but no TPU.

    Raises:
      ConfigError: the topology is unknown, or libtpu is missing or does not match this jax.
    """
    chip, shape = hardware.parse_topology(name)
    check_libtpu()
    os.environ.update({key: os.environ.get(key, value) for key, value in _ENVIRONMENT.items()})
    jax.config.update("jax_platforms", "cpu")
    options = {}
    if any(side % host for side, host in zip(shape, (2, 2), strict=False)):
        options["chips_per_host_bounds"] = (1, 1, 1)  # for a single chip, as a host has 2 x 2
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # jax and libtpu raise several types
        text = str(error)
        if "lockfile" in text:
            raise ConfigError(
                "another process holds libtpu's lock, perhaps a run on a TPU of this machine; wait "
                f"for it, or plan elsewhere ({text.strip()})"
            ) from None
        raise ConfigError(
            f"libtpu cannot describe the topology {name!r} ({text.strip()}); use one of "
            f"{', '.join(hardware.topologies())}"
        ) from None
    devices = description.devices
    return Slice(name, chip, len({tuple(device.coords) for device in devices}), devices)


def check_libtpu() -> None:
    """Checks that the installed libtpu is the version that jax requires in its extra "tpu".

    Raises:
      ConfigError: libtpu is missing or has another version.
    """
    required = _required_libtpu()
    remedy = f"pip install 'libtpu=={required}', or 'fd_jax[plan]', which asks for the same"
    try:
        installed = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"planning needs libtpu to compile, and it is missing; {remedy}"
        ) from None
    if not f"{installed}.".startswith(required.removesuffix("*")):
        raise ConfigError(
            f"jax {jax.__version__} compiles for TPUs with libtpu {required}, but {installed} is "
            f"installed; {remedy}"
        )


def _required_libtpu() -> str:
    """Version pattern that jax requires, such as "0.0.42.*"; "*" if it requires none."""
    for requirement in importlib.metadata.requires("jax") or ():
        match = re.match(r"libtpu\s*==\s*([\w.*]+)", requirement)
        if match:
            return match[1]
    return "*"
