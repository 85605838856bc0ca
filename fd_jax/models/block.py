"""The block of a vision transformer: attention and MLP, each on a residual branch."""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fd_jax.models import layers
from fd_jax.models.attention import Attention, AttentionInputs
from fd_jax.models.mlp import Mlp
from fd_jax.models.rotary import Rotation


class Block(nnx.Module):
    """x += gamma_1 * attn(norm1(x)); x += gamma_2 * mlp(norm2(x)), each with its own drop path."""

    def __init__(
        self,
        width: int,
        mlp_width: int,
        *,
        attn: Attention,
        activation: layers.Activation,
        gated_mlp: bool,
        mlp_norm: bool,
        norm_eps: float,
        layer_scale: float | None,
        drop_path: float,
        dtype: DTypeLike,
        grad_dtype: DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer,
        out_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ):
        self.drop_path = drop_path
        self.norm1 = layers.LayerNorm(width, eps=norm_eps, dtype=dtype, rngs=rngs)
        self.attn = attn
        self.norm2 = layers.LayerNorm(width, eps=norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(
            width,
            mlp_width,
            activation=activation,
            gated=gated_mlp,
            norm_eps=norm_eps if mlp_norm else None,
            dtype=dtype,
            grad_dtype=grad_dtype,
            kernel_init=kernel_init,
            out_init=out_init,
            rngs=rngs,
        )
        scaled = layer_scale is not None
        self.gamma_1 = nnx.Param(jnp.full((width,), layer_scale, jnp.float32)) if scaled else None
        self.gamma_2 = nnx.Param(jnp.full((width,), layer_scale, jnp.float32)) if scaled else None

    def __call__(
        self,
        x: jax.Array,
        drops: jax.Array | None,
        shared_bias: jax.Array | None,
        rotate: Rotation | None,
        indices: jax.Array | None = None,
    ) -> jax.Array:
        """[B, N, D] -> [B, N, D]; `drops` is [B, 2] uniform numbers (attn, mlp) or None.

        `shared_bias`, `rotate` and `indices` are those of `Attention`.
        """
        drop_attn, drop_mlp = (None, None) if drops is None else (drops[:, 0], drops[:, 1])
        # One row per token everywhere but inside attention: TPUs pad the 197 tokens of [B, N, D]
        # to a multiple of eight and [B * N, D] not, so that a change between them is a copy.
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        branch = self.attn(
            self.norm1(x).reshape(shape), shared_bias=shared_bias, rotate=rotate, indices=indices
        ).reshape(x.shape)
        x = x + layers.drop_path(_scale(branch, self.gamma_1), drop_attn, rate=self.drop_path)
        branch = self.mlp(self.norm2(x))
        x = x + layers.drop_path(_scale(branch, self.gamma_2), drop_mlp, rate=self.drop_path)
        return x.reshape(shape)

    def attention_inputs(
        self,
        x: jax.Array,
        shared_bias: jax.Array | None,
        rotate: Rotation | None,
        indices: jax.Array | None = None,
    ) -> AttentionInputs:
        """What this block's attention is computed from; arguments as in `__call__`."""
        tokens = self.norm1(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        return self.attn.inputs(tokens, shared_bias=shared_bias, rotate=rotate, indices=indices)


def _scale(branch: jax.Array, gamma: nnx.Param | None) -> jax.Array:
    return branch if gamma is None else layers.scale_by_parameter(branch, gamma[...])
