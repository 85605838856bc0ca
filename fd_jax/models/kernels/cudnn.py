"""NVIDIA's fused attention through `jax.nn.dot_product_attention(implementation="cudnn")`.

cuDNN trains with a bias only where queries and keys are even in number; a ViT has 197 or 257. One
token is added, whose key no query can see, and taken off again: here, or by a caller that adds it
before it computes queries, keys and values.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from fd_jax.models.kernels.base import (
    Implementation,
    fold_groups,
    mask_keys,
    per_device,
    unfold_groups,
)

AMPERE = 8.0  # compute capability from which on there is this kernel
HOPPER = 9.0  # compute capability from which on heads may be twice as wide


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Softmax attention, see `fd_jax.models.attention.attend`.

    The bias is rounded to the dtype of `q`, and its gradient is summed over the examples of a
    device in cuDNN before it returns to float32.

    Args:
      q: [B, N, A, d] bfloat16 or float16; `k` and `v` have the same shape.
      k: keys.
      v: values.
      bias: [A, N, N] or [G, A, N, N], or None.
      scale: factor on q k^T.
      implementation: "xla" runs everything but the kernel itself without a GPU, for tests.
    """
    shape, tokens = q.shape, q.shape[1]
    q, k, v, bias = fold_groups(q, k, v, bias)
    added = _padding(tokens, bias is not None)
    if bias is not None and added:
        q, k, v = (jnp.pad(x, ((0, 0), (0, added), (0, 0), (0, 0))) for x in (q, k, v))
        bias = mask_keys(bias, added)
    out = jax.nn.dot_product_attention(
        q, k, v, bias=bias, scale=scale, implementation=implementation
    )
    return unfold_groups(out[:, :tokens], shape)


def _padding(tokens: int, biased: bool) -> int:
    return tokens % 2 if biased else 0


def _refuses(platform: str, dtype: jnp.dtype, head_widths: Sequence[int]) -> str | None:
    if platform != "gpu":
        return f"needs an NVIDIA GPU, and this run computes on {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 or float16, and dtype is {jnp.dtype(dtype).name}"
    capability = _capability()
    if capability and (not capability[0].isdigit() or float(capability) < AMPERE):
        return f"needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later, not {capability}"
    limit = 256 if capability and float(capability) >= HOPPER else 128
    wrong = sorted({width for width in head_widths if width > limit or width % 8})
    if wrong:
        return (
            f"takes heads of up to {limit} channels on this GPU, in multiples of 8, and this "
            f"network's have {', '.join(map(str, wrong))}"
        )
    return None


def _capability() -> str:
    """This process's GPU: "9.0", or "gfx942" of AMD; "" in compilation ahead of time."""
    return str(getattr(jax.local_devices()[0], "compute_capability", ""))


IMPLEMENTATION = Implementation("cudnn", per_device(attend), _refuses, _padding)
