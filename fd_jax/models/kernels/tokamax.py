"""Attention by tokamax, whose kernels for NVIDIA GPUs take a bias and any number of tokens.

On Hopper and Blackwell its Mosaic kernel runs, on Ampere and where Mosaic declines its Triton
kernel; never XLA, which is an implementation of its own here. The package is optional
(`pip install 'fd_jax[tokamax]'`) and imported when a network first runs with it.
"""

from collections.abc import Sequence
import importlib.util
from typing import Literal

from absl import flags
import jax
import jax.numpy as jnp

from fd_jax.models.kernels.base import Implementation, fold_groups, per_device, unfold_groups

Kernel = Literal["mosaic", "triton", "xla"]
KERNELS: tuple[Kernel, ...] = ("mosaic", "triton")
TRITON = 8.0  # compute capability from which on tokamax's Triton kernel runs


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None,
    scale: float,
    implementation: Sequence[Kernel] = KERNELS,
) -> jax.Array:
    """Softmax attention, see `fd_jax.models.attention.attend`.

    The bias is rounded to the dtype of `q`, as the kernels take it.

    Args:
      q: [B, N, A, d] bfloat16 or float16; `k` and `v` have the same shape.
      k: keys.
      v: values.
      bias: [A, N, N] or [G, A, N, N], or None.
      scale: factor on q k^T.
      implementation: kernels of tokamax in the order they are tried; ("xla",) runs everything but
        the kernel itself without a GPU, for tests.
    """
    import tokamax

    # tokamax reads its settings from absl's flags, and parses the command line of whatever
    # program it runs in if nobody has; a command with flags of its own would end there.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    shape = q.shape
    q, k, v, bias = fold_groups(q, k, v, bias)
    out = tokamax.dot_product_attention(
        q, k, v, bias=bias, scale=scale, implementation=implementation
    )
    return unfold_groups(out, shape)


def _refuses(platform: str, dtype: jnp.dtype, head_widths: Sequence[int]) -> str | None:
    del head_widths  # both kernels pad them
    if platform != "gpu":
        return f"needs an NVIDIA GPU, and this run computes on {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 or float16, and dtype is {jnp.dtype(dtype).name}"
    if importlib.util.find_spec("tokamax") is None:
        return "needs the package tokamax, which is not installed: pip install 'fd_jax[tokamax]'"
    capability = float(getattr(jax.local_devices()[0], "compute_capability", TRITON))
    if capability < TRITON:
        return f"needs a GPU of compute capability {TRITON} or above, and this one has {capability}"
    return None


IMPLEMENTATION = Implementation("tokamax", per_device(attend), _refuses)
