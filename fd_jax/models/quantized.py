"""Networks whose linear layers multiply int8 or float8 numbers; for teachers, which do not train.

What is quantised are the linear layers of attention and MLPs. The patch embedding, norms,
activations, attention itself, positions, what is between stages and heads stay as they are. Like
low-rank updates, this is no part of an architecture: model folders hold float32 kernels, which are
rounded when a run reads them.
"""

from typing import Any

from flax import nnx
import jax.numpy as jnp
import numpy as np

from fd_jax.errors import ConfigError, check_choice
from fd_jax.models import linear_layers
from fd_jax.models.narrow import KINDS, is_narrow, quantize
from fd_jax.typing import PyTree

KERNEL, SCALE = "kernel", "kernel_scale"


def hold(network: nnx.Module, matmuls: str) -> None:
    """Gives the linear layers of a network narrow kernels and their factors.

    Args:
      network: network, which is changed; its kernels are not read, since this makes the definition
        for the parameters of `rounded`.
      matmuls: key of `narrow.KINDS`.

    Raises:
      ConfigError: there is no such kind, or the network has no linear layers in its blocks.
    """
    check_choice("teacher.matmuls", matmuls, KINDS)
    found = [layer for _, layer in linear_layers.of(network)]
    if not found:
        raise ConfigError(
            f"teacher.matmuls={matmuls!r} is for the linear layers of attention and MLPs, and a "
            f"{type(network).__name__} has none; set it to ''"
        )
    for layer in found:
        layer.kernel = nnx.Param(jnp.zeros(layer.kernel.shape, KINDS[matmuls].dtype))
        layer.kernel_scale = nnx.Param(jnp.ones(layer.kernel.shape[1:], jnp.float32))


def rounded(params: PyTree, matmuls: str, *path: str) -> PyTree:
    """The parameters for a network of `hold`: narrow kernels beside their factors.

    Args:
      params: nested dict of host arrays, those of the plain network; not changed.
      matmuls: key of `narrow.KINDS`.
      *path: names of the dicts around this one.
    """
    if not isinstance(params, dict):
        return params
    result = {name: rounded(value, matmuls, *path, name) for name, value in params.items()}
    if linear_layers.is_one("/".join(path)):
        kernel, scale = quantize(np.asarray(result[KERNEL]), KINDS[matmuls], axis=0, xp=np)
        result |= {KERNEL: kernel, SCALE: scale[0]}
    return result


def held_dtype(path: str, leaf: Any, dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which a run holds one of these parameters, or one of a plain network.

    Args:
      path: of the parameter.
      leaf: array or shape with a dtype.
      dtype: compute dtype, of all that is not quantised.
    """
    return leaf.dtype if is_narrow(leaf.dtype) or path.endswith(SCALE) else dtype
