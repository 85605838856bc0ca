"""How one vector of a picture is made of an encoder's feature map, as its authors published it."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fd_jax.errors import ConfigError, check_choice
from fd_jax.models import attention, layers
from fd_jax.models.features import FeatureMap
from fd_jax.models.mlp import Mlp

INIT = layers.truncated_normal(0.02, 2.0)  # cut at absolute +-2, which cuts nothing


class ProjectionPool(nnx.Module):
    """The class token times a kernel [D, E] (CLIP)."""

    def __init__(
        self,
        channels: int,
        *,
        class_token: bool,
        width: int,
        bias: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Defines the layer.

        Args:
          channels: D of the encoder.
          class_token: whether the encoder has one.
          width: channels E of the vector.
          bias: whether a bias is added (EVA's CLIP).
          dtype: of the matmul and the result.
          rngs: random keys of the parameters.

        Raises:
          ConfigError: the encoder has no class token.
        """
        if not class_token:
            raise ConfigError("pool.kind='projection' projects a class token, and there is none")
        self.projection = _projection(channels, width, bias, dtype, rngs)

    def __call__(self, features: FeatureMap) -> jax.Array:
        """The vector of every image. -> [B, E]."""
        return self.projection(features.cls_token)


class AttentionPool(nnx.Module):
    """A learned query looks at all tokens, and an MLP follows (SigLIP's MAP head).

    The query's attention is x, and the vector is x + mlp(norm(x)); times a kernel [D, E] where
    there is a `width`.
    """

    def __init__(
        self,
        channels: int,
        *,
        class_token: bool,
        heads: int,
        mlp_width: int,
        activation: layers.Activation,
        norm_eps: float,
        width: int = 0,
        bias: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Defines the layers.

        Args:
          channels: D of the encoder.
          class_token: whether the encoder has one, which the query sees like any other token.
          heads: of the query's attention; they divide D.
          mlp_width: hidden channels of the MLP.
          activation: of the MLP.
          norm_eps: of the norm before the MLP.
          width: channels E of a projection at the end; 0 for none (Perception Encoder has one).
          bias: whether that projection has a bias.
          dtype: of matmuls and the result.
          rngs: random keys of the parameters.

        Raises:
          ConfigError: heads do not divide the channels, or there is no such activation.
        """
        del class_token
        if channels % heads:
            raise ConfigError(f"pool.heads={heads} do not divide the encoder's {channels} channels")
        check_choice("pool.activation", activation, layers.ACTIVATIONS)
        common = {"dtype": dtype, "kernel_init": INIT, "out_init": INIT, "rngs": rngs}
        self.latent = nnx.Param(INIT(rngs.params(), (1, 1, channels)))
        self.attn = _LatentAttention(
            channels, heads, qkv_bias="qkv", rel_pos_bias=None, implementation="xla", **common
        )
        self.norm = layers.LayerNorm(channels, eps=norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(channels, mlp_width, activation=activation, **common)
        self.projection = _projection(channels, width, bias, dtype, rngs) if width else None

    def __call__(self, features: FeatureMap) -> jax.Array:
        """The vector of every image. -> [B, D], or [B, E] with a projection."""
        tokens = features.tokens
        latent = jnp.broadcast_to(self.latent[...], (len(tokens), 1, tokens.shape[-1]))
        x = self.attn.look(latent.astype(tokens.dtype), tokens)[:, 0]
        x = x + self.mlp(self.norm(x))
        return x if self.projection is None else self.projection(x)


Pool = AttentionPool | ProjectionPool
KINDS: dict[str, Any] = {"attention": AttentionPool, "projection": ProjectionPool}


def make_pool(pool: Mapping[str, Any], channels: int, *, class_token: bool, **runtime: Any) -> Pool:
    """The pool that `ModelSpec.pool` describes, with fresh parameters.

    Args:
      pool: "kind", a key of KINDS, and the keywords of its class.
      channels: D of the encoder.
      class_token: whether the encoder has one.
      **runtime: dtype and rngs.

    Raises:
      ConfigError: it cannot be of this encoder.
      TypeError: a keyword is missing, or there is no such one.
    """
    fields = dict(pool)
    kind = fields.pop("kind", "")
    check_choice("pool.kind", kind, KINDS)
    return KINDS[kind](channels, class_token=class_token, **fields, **runtime)


class _LatentAttention(attention.Attention):
    """Attention whose queries come from other tokens than its keys and values."""

    def look(self, x: jax.Array, tokens: jax.Array) -> jax.Array:
        """Queries of `x` [B, M, D] at the keys of `tokens` [B, N, D]. -> [B, M, D]."""
        biases = self._biases()
        q, k, v = (
            self._heads(source, index, biases[index])
            for index, source in enumerate((x, tokens, tokens))
        )
        inputs = attention.AttentionInputs(q, k, v, None, q.shape[-1] ** -0.5)
        return self.output(inputs)

    def _heads(self, x, index, bias):
        """Queries (0), keys (1) or values (2). [B, N, D] -> [B, N, A, d]."""
        kernel, dtypes = self.qkv.kernel[...][:, index], (self.qkv.dtype, self.qkv.grad_dtype)
        part: jax.Array = layers.linear(x.reshape(-1, x.shape[-1]), kernel, bias, *dtypes)
        return part.reshape(*x.shape[:2], self.heads, -1)


def _projection(channels, width, bias, dtype, rngs):
    return layers.Dense(channels, width, use_bias=bias, dtype=dtype, kernel_init=INIT, rngs=rngs)
