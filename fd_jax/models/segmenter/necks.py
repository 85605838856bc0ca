"""From the maps of an encoder's blocks to the levels that a decoder takes.

Maps and levels are [B, H, W, C].
"""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fd_jax.errors import ConfigError
from fd_jax.models import layers
from fd_jax.models.batch_norm import BatchNorm, Statistics
from fd_jax.models.segmenter.convolution import Deconv

STAGE_NORM_EPS = 1e-5


class FourTimes(nnx.Module):
    """Deconvolution, BatchNorm, GELU, deconvolution: a map of four times the height and width."""

    def __init__(
        self, width: int, *, dtype: DTypeLike, grad_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        common = {"dtype": dtype, "grad_dtype": grad_dtype, "rngs": rngs}
        self.deconv1 = Deconv(width, width, **common)
        self.norm = BatchNorm(width, dtype=dtype)
        self.deconv2 = Deconv(width, width, **common)

    def __call__(self, x: jax.Array, statistics: Statistics) -> jax.Array:
        """[B, H, W, C] -> [B, 4H, 4W, C]."""
        x = self.norm(self.deconv1(x), statistics["norm"])
        return self.deconv2(layers.activate(x, "gelu_erf"))


class Pyramid(nnx.Module):
    """Four levels out of four maps of a ViT (docs/reference.md#ade20k-pyramid).

    With patches of 16 the strides are 4, 8, 16 and 32. The third level is the map itself. The
    fourth takes the maximum of 2x2 tokens; a last row or column without a partner is left out.
    """

    def __init__(
        self, width: int, *, dtype: DTypeLike, grad_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        common = {"dtype": dtype, "grad_dtype": grad_dtype, "rngs": rngs}
        self.stride4 = FourTimes(width, **common)
        self.stride8 = nnx.Dict({"deconv": Deconv(width, width, **common)})

    def __call__(self, maps: Sequence[jax.Array], statistics: Statistics) -> list[jax.Array]:
        """Four maps [B, H, W, C] -> [B, 4H, 4W, C], [B, 2H, 2W, C], [B, H, W, C], [B, H/2, W/2, C].

        Raises:
          ConfigError: the maps have fewer than 2x2 tokens.
        """
        first, second, third, fourth = maps
        return [
            self.stride4(first, statistics["stride4"]),
            self.stride8["deconv"](second),
            third,
            max_pool(fourth),
        ]


class StageNorms(nnx.Module):
    """The maps of a network's stages, each with a LayerNorm of its own."""

    def __init__(self, widths: Sequence[int], *, dtype: DTypeLike, rngs: nnx.Rngs):
        norms = [
            layers.LayerNorm(width, eps=STAGE_NORM_EPS, dtype=dtype, rngs=rngs) for width in widths
        ]
        self.norms = nnx.Dict({str(index): norm for index, norm in enumerate(norms)})

    def __call__(self, maps: Sequence[jax.Array]) -> list[jax.Array]:
        """Maps [B, H, W, C] of any sizes and widths -> the same shapes."""
        return [self.norms[str(index)](x) for index, x in enumerate(maps)]


def max_pool(x: jax.Array) -> jax.Array:
    """The maximum of each 2x2 pixels, [B, H, W, C] -> [B, H // 2, W // 2, C].

    The gradient goes to the first of equal values, as in PyTorch.

    Raises:
      ConfigError: there are fewer than 2x2 pixels.
    """
    height, width = x.shape[1:3]
    if min(height, width) < 2:
        raise ConfigError(
            f"a grid of {height} x {width} patches has no level of half its size; use a larger "
            "image_size, so that the grid has at least 2 x 2 patches"
        )
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    # The gradient of jnp.max divides by how many inputs equal the maximum. A compiler may compute
    # the inputs a second time for that, and round them in another way: then it is 0 / 0.
    top = _larger(x[:, ::2, ::2], x[:, ::2, 1::2])
    return _larger(top, _larger(x[:, 1::2, ::2], x[:, 1::2, 1::2]))


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where((a >= b) | jnp.isnan(a), a, b)
