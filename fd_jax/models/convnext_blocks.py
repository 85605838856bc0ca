"""What a ConvNeXt is made of: its blocks, and the halving of the grid between its stages."""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fd_jax.models import layers
from fd_jax.models.depthwise import DepthwiseConv
from fd_jax.models.mlp import Mlp

HALF = 2  # side of the squares of tokens that become one between stages
MLP_RATIO = 4  # hidden channels of an MLP per channel
RESPONSE_EPS = 1e-6  # added to the mean response of all channels
KERNEL_INIT = layers.truncated_normal(0.02, 2.0)  # cut at absolute +-2, which cuts nothing


class ResponseNorm(nnx.Module):
    """Global response normalisation: channels that respond more than others are made stronger.

    x + scale * x * g / mean(g) + bias, where g is the norm of a channel over the picture.
    """

    def __init__(self, width: int):
        self.scale = layers.zeros(width)
        self.bias = layers.zeros(width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D], the tokens of a picture along N -> [B, N, D], computed in float32."""
        wide = x.astype(layers.at_least_float32(x.dtype))
        squares = jnp.sum(jnp.square(wide), axis=1, keepdims=True)
        # The root's slope at zero is infinite. A channel that is zero everywhere gets the gradient
        # zero through its norm, as in PyTorch.
        silent = squares == 0
        norms = jnp.where(silent, 0, jnp.sqrt(jnp.where(silent, 1, squares)))
        responses = norms / (jnp.mean(norms, axis=-1, keepdims=True) + RESPONSE_EPS)
        y = wide + self.scale[...] * (wide * responses) + self.bias[...]
        return y.astype(x.dtype)


class ResponseMlp(Mlp):
    """An MLP with a `ResponseNorm` after its activation."""

    def __init__(self, width: int, hidden: int, **kwargs):
        super().__init__(width, hidden, **kwargs)
        self.grn = ResponseNorm(hidden)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        return self.fc2(self.grn(layers.activate(self.fc1(x), self.activation)))


class Block(nnx.Module):
    """x += gamma * mlp(norm(dwconv(x))), with drop path."""

    def __init__(
        self,
        width: int,
        *,
        kernel_size: int,
        grn: bool,
        activation: layers.Activation,
        norm_eps: float,
        layer_scale: float | None,
        drop_path: float,
        dtype: DTypeLike,
        grad_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.drop_path = drop_path
        common = {"dtype": dtype, "grad_dtype": grad_dtype, "kernel_init": KERNEL_INIT}
        self.dwconv = DepthwiseConv(width, size=kernel_size, rngs=rngs, **common)
        self.norm = layers.LayerNorm(width, eps=norm_eps, dtype=dtype, rngs=rngs)
        mlp = ResponseMlp if grn else Mlp
        self.mlp = mlp(
            width,
            MLP_RATIO * width,
            activation=activation,
            out_init=KERNEL_INIT,
            rngs=rngs,
            **common,
        )
        scaled = layer_scale is not None
        self.gamma = nnx.Param(jnp.full((width,), layer_scale, jnp.float32)) if scaled else None

    def __call__(
        self, x: jax.Array, drops: jax.Array | None, shared_bias: jax.Array | None = None
    ) -> jax.Array:
        """[B, H, W, D] -> [B, H, W, D].

        Args:
          x: a map.
          drops: [B, 2] uniform numbers of which the first decides, since there is one branch; None
            in evaluation.
          shared_bias: of an attention, so None here.
        """
        del shared_bias
        branch = self.norm(self.dwconv(x))
        batch, height, width, channels = x.shape
        branch = self.mlp(branch.reshape(batch, height * width, channels)).reshape(x.shape)
        if self.gamma is not None:
            branch = layers.scale_by_parameter(branch, self.gamma[...])
        uniform = None if drops is None else drops[:, 0]
        return x + layers.drop_path(branch, uniform, rate=self.drop_path)


class Downsample(nnx.Module):
    """A norm, and a convolution that makes one token of a square of `HALF` x `HALF`."""

    def __init__(
        self,
        width: int,
        out: int,
        *,
        norm_eps: float,
        dtype: DTypeLike,
        grad_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.out = out
        self.norm = layers.LayerNorm(width, eps=norm_eps, dtype=dtype, rngs=rngs)
        self.conv = layers.PatchEmbed(
            HALF,
            out,
            channels=width,
            use_bias=True,
            dtype=dtype,
            grad_dtype=grad_dtype,
            kernel_init=KERNEL_INIT,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, D] -> [B, H // 2, W // 2, out]; an odd last row or column is not read."""
        batch, height, width, _ = x.shape
        return self.conv(self.norm(x)).reshape(batch, height // HALF, width // HALF, self.out)
