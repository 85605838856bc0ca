"""What a ResNet is made of: convolutions with BatchNorm, and blocks of them with a shortcut."""

from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fd_jax.models import layers
from fd_jax.models.batch_norm import KeptBatchNorm, Statistics
from fd_jax.models.convolution import Conv, he_normal_fan_out, mean_of_squares
from fd_jax.typing import PyTree

# Which convolution of a block's branch leaves out every second pixel.
StrideAt = Literal["first", "second"]
# How the shortcut does: by a convolution that does not read it, or by the mean of four.
Shortcut = Literal["strided", "pooled"]

# Sides of the kernels of a branch, without a bottleneck and with one.
SIZES = {False: (3, 3), True: (1, 3, 1)}


class NormedConv(nnx.Module):
    """A convolution without bias, and BatchNorm.

    Args of the constructor are those of `Conv`; `scale` is the start of the norm's scale, and
    `pooled` takes the mean of squares of pixels first, in place of a stride of 2.
    """

    def __init__(
        self,
        width: int,
        out: int,
        *,
        size: int,
        stride: int = 1,
        pooled: bool = False,
        scale: float = 1.0,
        norm_eps: float,
        dtype: DTypeLike,
        grad_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.pooled = pooled and stride > 1
        self.conv = Conv(
            width,
            out,
            size=size,
            stride=1 if pooled else stride,
            use_bias=False,
            kernel_init=he_normal_fan_out,
            dtype=dtype,
            grad_dtype=grad_dtype,
            rngs=rngs,
        )
        self.norm = KeptBatchNorm(out, dtype=dtype, eps=norm_eps, scale=scale)

    def __call__(self, x: jax.Array, statistics: Statistics) -> jax.Array:
        """[B, H, W, in] -> [B, ceil(H / stride), ceil(W / stride), out]."""
        x = mean_of_squares(x) if self.pooled else x
        return self.norm(self.conv(x), statistics["norm"])


class Block(nnx.Module):
    """act(shortcut(x) + branch(x)), with drop path on the branch.

    The last norm of the branch starts at zero, so that a fresh block passes its shortcut on
    (arXiv 1706.02677; timm's default).
    """

    def __init__(
        self,
        width: int,
        inner: int,
        out: int,
        *,
        bottleneck: bool,
        stride: int,
        stride_at: StrideAt,
        shortcut: Shortcut,
        activation: layers.Activation,
        norm_eps: float,
        drop_path: float,
        dtype: DTypeLike,
        grad_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.activation: layers.Activation = activation
        self.drop_path = drop_path
        common: dict[str, Any] = {"norm_eps": norm_eps, "dtype": dtype, "grad_dtype": grad_dtype}
        sizes = SIZES[bottleneck]
        self.convolutions = len(sizes)
        ends = [width, *[inner] * (len(sizes) - 1), out]
        strided = StrideAt.__args__.index(stride_at)
        self.branch = nnx.Dict(
            {
                str(i): NormedConv(
                    ends[i],
                    ends[i + 1],
                    size=size,
                    stride=stride if i == strided else 1,
                    scale=float(i < len(sizes) - 1),
                    rngs=rngs,
                    **common,
                )
                for i, size in enumerate(sizes)
            }
        )
        self.shortcut = (
            NormedConv(
                width,
                out,
                size=1,
                stride=stride,
                pooled=shortcut == "pooled",
                rngs=rngs,
                **common,
            )
            if has_shortcut(width, out, stride)
            else None
        )

    def __call__(
        self, x: jax.Array, drops: jax.Array | None, running: PyTree, training: bool
    ) -> tuple[jax.Array, PyTree]:
        """[B, H, W, D] -> [B, h, w, out], and the running statistics after it.

        Args:
          x: a map.
          drops: [B, 2] uniform numbers of which the first decides, since there is one branch; None
            in evaluation.
          running: the running statistics of the block before it.
          training: whether the batch is normalised with its own statistics.
        """
        statistics = Statistics(running, training=training)
        branch = x
        for number in range(self.convolutions):
            if number:
                branch = layers.activate(branch, self.activation)
            part = str(number)
            branch = self.branch[part](branch, statistics["branch"][part])
        if self.shortcut is not None:
            x = self.shortcut(x, statistics["shortcut"])
        uniform = None if drops is None else drops[:, 0]
        branch = layers.drop_path(branch, uniform, rate=self.drop_path)
        return layers.activate(x + branch, self.activation), statistics.updated()


def has_shortcut(width: int, out: int, stride: int) -> bool:
    """Whether a block's shortcut is a convolution: where its input cannot be added as it is."""
    return stride > 1 or width != out
