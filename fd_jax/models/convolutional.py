"""What networks of convolutions share: a map without class token, and no attention."""

from typing import Any

import jax

from fd_jax.errors import ConfigError
from fd_jax.models.backbone import Backbone


class Convolutional(Backbone):
    """A network whose blocks are convolutions on the whole map.

    Attributes:
      KIND: its name, for people.
    """

    KIND = ""

    cls = 0
    registers = 0

    # Spared from weight decay although they have more than one dimension.
    NO_DECAY: tuple[str, ...] = ()

    @staticmethod
    def head_widths(arch: dict[str, Any]) -> tuple[int, ...]:
        """Channels per attention head: none, as there are no heads."""
        del arch
        return ()

    def attention_maps(self, images, blocks, *, keep=None):
        """There are none.

        Raises:
          ConfigError: always.
        """
        raise ConfigError(self._no_attention())

    def measure_attention(self, images, measure):
        """See `attention_maps`."""
        raise ConfigError(self._no_attention())

    def _no_attention(self) -> str:
        return (
            f"a {self.KIND} has no attention, as its blocks are convolutions; take its features "
            "instead (intermediates, or the figures rank, cka, cosine, pca and landscape), or a "
            "ViT or Swin"
        )

    def _check_all_kept(self, keep: jax.Array | None) -> None:
        if keep is not None:
            raise ConfigError(
                f"a {self.KIND} sees all patches, since its convolutions need their neighbours; "
                "use a ViT where only some patches are kept"
            )


def tokens_of(x: jax.Array) -> jax.Array:
    """[B, H, W, D] -> [B, H * W, D]."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height * width, channels)
