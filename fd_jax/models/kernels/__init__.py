"""Implementations of softmax attention: one file each, one line of `IMPLEMENTATIONS` each.

All of them compute softmax(scale * q k^T + bias) v and its gradients, equal within rounding. They
differ in where they run and in what they keep in memory. A name is settled once, by `choose`,
before a network is built; nothing here falls back to another implementation in silence.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from fd_jax.errors import ConfigError, check_choice
from fd_jax.models.kernels import cudnn, pallas_tpu, xla
from fd_jax.models.kernels.base import (
    Implementation,
    compiling_for,
    device_kind,
    mask_keys,
    platform,
    split_over,
)

__all__ = [
    "IMPLEMENTATIONS",
    "NONE",
    "PREFERRED",
    "choose",
    "compiling_for",
    "device_kind",
    "mask_keys",
    "split_over",
]

# What a network without attention has in the place of an implementation.
NONE = "none"

IMPLEMENTATIONS: dict[str, Implementation] = {
    implementation.name: implementation
    for implementation in (
        xla.IMPLEMENTATION,
        cudnn.IMPLEMENTATION,
        pallas_tpu.IMPLEMENTATION,
    )
}

# What "auto" takes: the first that a network's dtype and head width allow. Only implementations
# that were measured on a platform and won are listed for it; docs/performance.md has the figures.
PREFERRED = {"cpu": ("xla",), "gpu": ("cudnn", "xla"), "tpu": ("xla",)}

# Names of earlier versions, and what to write now.
REMOVED = {
    "dot_product": "it ran XLA's own attention on every device: write 'xla' for the same "
    "computation, or 'cudnn' for NVIDIA's fused kernel"
}


def choose(name: str, *, dtype: jnp.dtype, head_widths: Sequence[int]) -> str:
    """Settles which implementation a network uses.

    Args:
      name: `config.attention`: "auto" or a key of IMPLEMENTATIONS.
      dtype: of the network's activations.
      head_widths: channels per attention head, of every stage of the network; none of a network
        without attention, for which every name is as good.

    Returns:
      A key of IMPLEMENTATIONS, or NONE.

    Raises:
      ConfigError: there is no such implementation, or it cannot do this; the message says why.
    """
    if not head_widths:
        return NONE
    target = platform()
    if name == "auto":
        return next(
            candidate
            for candidate in PREFERRED[target]
            if IMPLEMENTATIONS[candidate].refuses(target, dtype, head_widths) is None
        )
    if name in REMOVED:
        raise ConfigError(f"attention={name!r} was removed, since {REMOVED[name]}")
    check_choice("attention", name, ("auto", *IMPLEMENTATIONS))
    reason = IMPLEMENTATIONS[name].refuses(target, dtype, head_widths)
    if reason is not None:
        raise ConfigError(f"attention={name!r} {reason}; set attention='xla', which has no limits")
    return name
