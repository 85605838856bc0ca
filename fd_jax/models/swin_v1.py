"""Swin Transformer, the EsViT teacher's network."""

from typing import Any

from fd_jax.models import windows
from fd_jax.models.resize import PositionResize, resize_rel_pos_table
from fd_jax.models.sizes import ImageSize
from fd_jax.models.swin import Swin, grids


class SwinV1(Swin):
    """Swin Transformer: pre-norm, scaled dot products, a bias table per block."""

    norm_first = True

    # Spared from weight decay although they have more than one dimension
    # (docs/reference.md#weight-decay).
    NO_DECAY = (r"rel_pos_bias/table$",)

    @staticmethod
    def resize_positions(
        params: dict[str, Any],
        arch: dict[str, Any],
        image_size: ImageSize,
        *,
        method: PositionResize,
    ) -> dict[str, Any]:
        """Parameters of the same network for another image size.

        The window stays; a table changes where the grid is smaller than the window before or after.
        Arguments as in `ViT.resize_positions`.
        """
        before, after = (
            grids(size, arch["patch_size"], len(arch["depths"]))
            for size in (arch["image_size"], image_size)
        )
        stages = {}
        for number, stage in params["stages"].items():
            old, new = (min(arch["window"], sides[int(number)]) for sides in (before, after))
            blocks = {}
            for index, block in stage["blocks"].items():
                own = block["attn"]["rel_pos_bias"]["table"]
                table = resize_rel_pos_table(own, (old, old), (new, new), extra=0, method=method)
                attn = {**block["attn"], "rel_pos_bias": {"table": table}}
                blocks[index] = {**block, "attn": attn}
            stages[number] = {**stage, "blocks": blocks}
        return {**params, "stages": stages}

    def _attention(self, stage, width, heads, **kwargs):
        bias = windows.WindowBias(self.window_sides[stage], heads)
        return windows.WindowAttention(width, heads, qkv_bias="qkv", rel_pos_bias=bias, **kwargs)
