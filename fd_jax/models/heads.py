"""Layers on top of an encoder: the projectors of distillation and the classifier."""

from collections.abc import Callable
import math
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fd_jax.errors import check_choice
from fd_jax.models import layers
from fd_jax.models.features import FeatureMap

Pooling = Literal["cls", "mean", "mean_norm", "norm_mean"]


class Projector(nnx.Module):
    """The 1x1 map from student to teacher width, trained with the student and then set aside.

    Weight and bias start uniform in +-1/sqrt(D_s), torch's default for the 1x1 convolution of the
    original (docs/reference.md#projector).
    """

    def __init__(
        self,
        width: int,
        out: int,
        *,
        dtype: DTypeLike = jnp.float32,
        grad_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        bound = 1 / math.sqrt(width)

        def init(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        self.dtype = dtype
        self.grad_dtype = grad_dtype
        self.kernel: Any = nnx.Param(init(rngs.params(), (width, out)))
        self.bias = nnx.Param(init(rngs.params(), (out,)))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[..., D_s] -> [..., D_t] in `dtype`."""
        rows = tokens.reshape(-1, tokens.shape[-1])
        out: jax.Array = layers.linear(
            rows, self.kernel[...], self.bias[...], self.dtype, self.grad_dtype
        )
        return out.reshape(*tokens.shape[:-1], -1)


class MlpProjector(nnx.Module):
    """Two layers with GELU between them, each of which starts like `Projector`."""

    def __init__(
        self,
        width: int,
        hidden: int,
        out: int,
        *,
        dtype: DTypeLike = jnp.float32,
        grad_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.hidden = Projector(width, hidden, dtype=dtype, grad_dtype=grad_dtype, rngs=rngs)
        self.out = Projector(hidden, out, dtype=dtype, grad_dtype=grad_dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[..., D_s] -> [..., D_t] in `dtype`."""
        return self.out(layers.activate(self.hidden(tokens), "gelu_erf"))


class SeparateProjectors(nnx.Module):
    """A projector for the class token, which comes first, and another one for the patches."""

    def __init__(self, make: Callable[[nnx.Rngs], Any], *, rngs: nnx.Rngs):
        self.cls, self.patch = make(rngs), make(rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, 1 + P, D_s] -> [B, 1 + P, D_t]."""
        parts = self.cls(tokens[:, :1]), self.patch(tokens[:, 1:])
        return jnp.concatenate(parts, axis=1)


class Classifier(nnx.Module):
    """Pools a feature map into one vector and maps it to class logits.

    Attributes:
      pooling: "cls" the class token, "mean" the mean patch token, "mean_norm" LayerNorm `fc_norm`
        of that mean (fine-tuning in the original, docs/reference.md#fine-tune-head), "norm_mean"
        the mean of the patch tokens after `fc_norm` (FT-CLIP, docs/reference.md#ft-clip).
      affine: whether `fc_norm` has scale and bias to train.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        pooling: Pooling,
        norm_eps: float,
        affine: bool = True,
        kernel_init: nnx.Initializer,
        grad_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_choice("pooling", pooling, Pooling.__args__)
        self.pooling = pooling
        self.fc_norm = (
            nnx.LayerNorm(
                width,
                epsilon=norm_eps,
                use_bias=affine,
                use_scale=affine,
                use_fast_variance=False,
                rngs=rngs,
            )
            if "norm" in pooling
            else None
        )
        self.head = layers.Dense(
            width,
            classes,
            dtype=jnp.float32,
            grad_dtype=grad_dtype,
            kernel_init=kernel_init,
            rngs=rngs,
        )

    def pool(self, features: FeatureMap) -> jax.Array:
        """The vector of each image. -> [B, D] float32."""
        if self.pooling == "cls":
            return features.cls_token.astype(jnp.float32)
        patches = features.patches.astype(jnp.float32)
        if self.pooling == "norm_mean" and self.fc_norm is not None:
            return jnp.mean(self.fc_norm(patches), axis=1)
        mean = jnp.mean(patches, axis=1)
        return mean if self.fc_norm is None else self.fc_norm(mean)

    def __call__(self, features: FeatureMap) -> jax.Array:
        """-> [B, K] logits, float32."""
        return self.head(self.pool(features))
