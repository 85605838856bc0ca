"""Prediction of several of a teacher's maps from all of a student's: MaskAlign's dynamic alignment.

See arXiv 2211.08887 and docs/masked_students.md#several-levels.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

# Added to every weight at the start, as in the authors' code, so that each level sees all others.
SHARED = 0.01
# Spared from weight decay, as in the authors' code.
NO_DECAY = (r"^projector/(\w+/)*mixing$",)


class LevelAdaptor(nnx.Module):
    """A learned mixture of the student's maps for each of the teacher's, and a projector for each.

    Attributes:
      mixing: [L, K] float32, the share of each of the student's L maps in the prediction of each of
        the teacher's K.
      projectors: by the number of the teacher's block, as text.
    """

    def __init__(
        self,
        levels: int,
        blocks: Sequence[int],
        depth: int,
        make: Callable[[nnx.Rngs], Any],
        *,
        rngs: nnx.Rngs,
    ):
        """Makes the adaptor.

        Args:
          levels: number of the student's blocks.
          blocks: the teacher's blocks that are predicted, counted from 0.
          depth: number of the teacher's blocks.
          make: makes a projector.
          rngs: random numbers for the projectors.
        """
        self.blocks = tuple(blocks)
        self.mixing: Any = nnx.Param(jnp.asarray(first_mixing(levels, blocks, depth)))
        self.projectors = nnx.Dict({str(block): make(rngs) for block in blocks})

    def mixed(self, levels: Sequence[jax.Array]) -> jax.Array:
        """The mixtures of the student's maps. L x [B, N, D] -> [K, B, N, D] in their dtype."""
        stacked = jnp.stack(levels)
        # In float32, in which gradients are summed over devices.
        mixed = jnp.einsum("lk,lbnd->kbnd", self.mixing[...], stacked.astype(jnp.float32))
        return mixed.astype(stacked.dtype)

    def each(self) -> Iterator[Any]:
        """The projectors, in the order of the teacher's blocks."""
        return (self.projectors[str(block)] for block in self.blocks)


def first_mixing(levels: int, blocks: Sequence[int], depth: int) -> np.ndarray:
    """The weights before training: 1 for the map at the same height, and a little for all.

    That is the identity if both networks have as many blocks. If they have not, the student's block
    is the one that ends at the same share of the depth, rounded up (ours: the authors' networks are
    equally deep).

    Returns:
      [levels, len(blocks)] float32.
    """
    weights = np.full((levels, len(blocks)), SHARED, np.float32)
    for column, block in enumerate(blocks):
        weights[-(-(block + 1) * levels // depth) - 1, column] += 1
    return weights
