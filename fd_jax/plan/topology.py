"""Devices of TPU slices, as libtpu describes them to its compiler without the chips."""

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

# Without these libtpu asks a cloud's metadata server, for minutes, which TPU it runs on, and one
# process at a time may load it: a lock that guards a TPU, and there is none. The accelerator named
# here is not the one compiled for.
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
      name: as "v5e:4x4".
      chip: its limits.
      chips: how many.
      devices: of jax, for a mesh. On v4 libtpu describes two per chip, its TensorCores; a real v4
        host shows one device for both, with their memory together.
    """

    name: str
    chip: hardware.Chip
    chips: int
    devices: Sequence[Any]

    @property
    def devices_per_chip(self) -> int:
        """2 on v4, else 1."""
        return len(self.devices) // self.chips


def describe(name: str) -> Slice:
    """The devices of a topology such as "v5e:4x4"; needs libtpu and no TPU.

    Raises:
      ConfigError: an unknown topology, no libtpu, or one that this jax does not go with.
    """
    chip, shape = hardware.parse_topology(name)
    check_libtpu()
    os.environ.update({key: os.environ.get(key, value) for key, value in _ENVIRONMENT.items()})
    jax.config.update("jax_platforms", "cpu")
    options = {}
    if any(side % host for side, host in zip(shape, (2, 2), strict=False)):
        options["chips_per_host_bounds"] = (1, 1, 1)  # a single chip; hosts have 2 x 2
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # jax and libtpu raise several kinds
        text = str(error)
        if "lockfile" in text:
            raise ConfigError(
                "another process holds libtpu's lock, perhaps a run on a TPU of this machine; wait "
                f"for it, or plan elsewhere ({text.strip()})"
            ) from None
        raise ConfigError(
            f"libtpu cannot describe the topology {name!r} ({text.strip()}); take one of "
            f"{', '.join(hardware.topologies())}"
        ) from None
    devices = found.devices
    return Slice(name, chip, len({tuple(device.coords) for device in devices}), devices)


def check_libtpu() -> None:
    """Refuses to go on without the libtpu that this jax names in its extra "tpu".

    Raises:
      ConfigError: it is missing or another version.
    """
    wanted = _wanted_libtpu()
    remedy = f"pip install 'libtpu=={wanted}', or 'fd_jax[plan]' where jax is the one it asks for"
    try:
        found = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"planning compiles with libtpu, which is missing; {remedy}") from None
    if not f"{found}.".startswith(wanted.removesuffix("*")):
        raise ConfigError(
            f"jax {jax.__version__} compiles for TPUs with libtpu {wanted}, but {found} is "
            f"installed; {remedy}"
        )


def _wanted_libtpu() -> str:
    """Such as "0.0.42.*"; "*" where jax does not say."""
    for requirement in importlib.metadata.requires("jax") or ():
        found = re.match(r"libtpu\s*==\s*([\w.*]+)", requirement)
        if found:
            return found[1]
    return "*"
