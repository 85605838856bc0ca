"""ConvNeXt V1 and V2, and the ConvNeXt of DINOv3: stages of convolutions, the grid halved between.

What differs between the three are arguments. V1 and DINOv3's have a layer scale, V2 has a global
response normalisation inside its MLPs. The features of V1 and V2 are the last map as it is; their
classifiers normalise its mean (pooling "mean_norm"). DINOv3 normalises every token.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from fd_jax.errors import ConfigError, check_choice, check_positive
from fd_jax.models import kernels, layers, sizes
from fd_jax.models.backbone import Visit, check_remat
from fd_jax.models.convnext_blocks import HALF, KERNEL_INIT, Block, Downsample
from fd_jax.models.convolutional import Convolutional, tokens_of
from fd_jax.models.sizes import ImageSize

GROUP = 3  # blocks that have one learning rate under layer-wise decay


class Stage(nnx.Module):
    """Blocks on one grid, after the halving of the one before where there is one."""

    def __init__(self, downsample: Downsample | None, blocks: Sequence[Block]):
        self.downsample = downsample
        # Text keys: see the note on nnx.merge in vit.py.
        self.blocks = nnx.Dict({str(index): block for index, block in enumerate(blocks)})


class ConvNeXt(Convolutional):
    """ConvNeXt that returns the map of its last stage as tokens; there is no class token.

    Architecture:
      image_size: side of a square input in pixels, or a pair of height and width; fixed at
        construction. Sides need no divisor: what a stride leaves over at the right and at the
        bottom is not read, as in other libraries.
      patch_size: side of a patch; the grid of stage s is image_size // patch_size // 2^s.
      widths, depths: channels and blocks of each stage.
      kernel_size: side of the depthwise convolutions, odd.
      grn: whether the MLPs have a global response normalisation (V2).
      layer_scale: start value of each block's gamma; None where there is none (V2).
      activation, norm_eps: as the source has them.
      final_norm: whether the tokens are normalised at the end (DINOv3).
      final_norm_eps: epsilon of that norm or, without one, of the norm in a head on the mean token;
        None for `norm_eps`. transformers has 1e-12 there for V1 and V2, and 1e-6 elsewhere.

    Run time: drop_path (of the last block, linear in depth from 0), dtype, grad_dtype and remat as
    in `vit.ViT`. `init` and `attention` are taken for the sake of that interface and change
    nothing: all networks of this family start alike, and none has attention.
    """

    KIND = "ConvNeXt"

    def __init__(
        self,
        *,
        image_size: ImageSize,
        patch_size: int,
        widths: Sequence[int],
        depths: Sequence[int],
        kernel_size: int,
        grn: bool,
        layer_scale: float | None,
        activation: layers.Activation,
        norm_eps: float,
        final_norm: bool,
        final_norm_eps: float | None,
        drop_path: float = 0.0,
        init: str = "finetune",
        dtype: DTypeLike = jnp.float32,
        grad_dtype: DTypeLike = jnp.float32,
        attention: str = kernels.NONE,
        remat: str | None = None,
        rngs: nnx.Rngs,
    ):
        del init, attention
        _check(image_size, patch_size, widths, depths, kernel_size, activation, remat)
        height, wide = sizes.sides(image_size)
        self.image_size = height if height == wide else (height, wide)
        self.widths, self.depths = tuple(widths), tuple(depths)
        self.width, self.depth = widths[-1], sum(depths)
        self.grids = grids(image_size, patch_size, len(depths))
        self.grid = self.grids[-1]
        self.remat = remat
        self.dtype = dtype
        dtypes: dict[str, Any] = {"dtype": dtype, "grad_dtype": grad_dtype}

        def stage(number: int) -> Stage:
            before = sum(depths[:number])
            downsample = (
                Downsample(
                    widths[number - 1], widths[number], norm_eps=norm_eps, rngs=rngs, **dtypes
                )
                if number
                else None
            )
            blocks = [
                Block(
                    widths[number],
                    kernel_size=kernel_size,
                    grn=grn,
                    activation=activation,
                    norm_eps=norm_eps,
                    layer_scale=layer_scale,
                    drop_path=drop_path * (before + index) / max(self.depth - 1, 1),
                    rngs=rngs,
                    **dtypes,
                )
                for index in range(depths[number])
            ]
            return Stage(downsample, blocks)

        self.patch_embed = layers.PatchEmbed(
            patch_size, widths[0], use_bias=True, kernel_init=KERNEL_INIT, rngs=rngs, **dtypes
        )
        self.patch_norm = layers.LayerNorm(widths[0], eps=norm_eps, dtype=dtype, rngs=rngs)
        self.stages = nnx.Dict({str(number): stage(number) for number in range(len(depths))})
        eps = norm_eps if final_norm_eps is None else final_norm_eps
        self.norm = (
            layers.LayerNorm(self.width, eps=eps, dtype=dtype, rngs=rngs) if final_norm else None
        )

    @staticmethod
    def layer_id(path: str, arch: dict[str, Any]) -> int:
        """Layer of an encoder parameter for layer-wise decay (docs/reference.md#layer-decay).

        0 for the patch embedding; then one for each `GROUP` consecutive blocks of a stage, the
        first of which has the halving before it; one more for what comes after the blocks. That
        is the rule of ConvNeXt's own code, which gives 12 groups for depths 3/3/27/3.
        """
        parts = path.split("/")
        if parts[0] in ("patch_embed", "patch_norm"):
            return 0
        groups = [-(-depth // GROUP) for depth in arch["depths"]]
        if parts[0] != "stages":
            return sum(groups) + 1
        block = int(parts[3]) if parts[2] == "blocks" else 0
        return sum(groups[: int(parts[1])]) + block // GROUP + 1

    @staticmethod
    def block_of(path: str, arch: dict[str, Any]) -> int:
        """See `Backbone`; a halving belongs to the first block after it."""
        parts = path.split("/")
        if parts[0] in ("patch_embed", "patch_norm"):
            return -1
        if parts[0] != "stages":
            return sum(arch["depths"])
        block = int(parts[3]) if parts[2] == "blocks" else 0
        return sum(arch["depths"][: int(parts[1])]) + block

    @staticmethod
    def first_stages(arch: dict[str, Any], stages: int) -> dict[str, Any]:
        """The architecture of the first stages; three end at 1/16 of the input's side."""
        return {k: v[:stages] if k in ("widths", "depths") else v for k, v in arch.items()}

    @staticmethod
    def first_stages_params(
        params: dict[str, Any], arch: dict[str, Any], stages: int
    ) -> dict[str, Any]:
        """The parameters for `first_stages(arch, stages)`; the final norm starts anew.

        As in `swin.Swin`: that norm was trained for the channels of the last stage.
        """
        if stages == len(arch["depths"]):
            return params
        kept = {str(number): params["stages"][str(number)] for number in range(stages)}
        params = {**params, "stages": kept}
        if "norm" in params:
            width = arch["widths"][stages - 1]
            params["norm"] = {
                "scale": np.ones(width, np.float32),
                "bias": np.zeros(width, np.float32),
            }
        return params

    def embed(self, images: jax.Array) -> jax.Array:
        """Tokens as they enter the first block. [B, H, W, 3] -> [B, N, D]."""
        self._check_images(images)
        return self.patch_norm(self.patch_embed(images))

    def _visits(self, images, drops, keep):
        self._check_all_kept(keep)
        tokens = self.embed(images)
        x = tokens.reshape(tokens.shape[0], *self.grids[0], self.widths[0])
        number = 0
        for index, depth in enumerate(self.depths):
            stage, grid = self.stages[str(index)], self.grids[index]
            if stage.downsample is not None:
                x = stage.downsample(x)
            for name in map(str, range(depth)):
                block_drops = None if drops is None else drops[:, number]
                before, x = x, self._run_block(stage.blocks[name], x, block_drops, None)
                number += 1
                sent = yield Visit(stage.blocks[name], tokens_of(before), tokens_of(x), (), grid)
                x = x if sent is None else sent.reshape(x.shape)


def grids(image_size: ImageSize, patch_size: int, stages: int) -> tuple[tuple[int, int], ...]:
    """(H, W) of the grid of each stage."""
    first = sizes.patch_grid(image_size, patch_size)
    return tuple(sizes.patch_grid(first, HALF**stage) for stage in range(stages))


def _check(image_size, patch_size, widths, depths, kernel_size, activation, remat):
    check_positive("patch_size", patch_size)
    if not widths or len(widths) != len(depths):
        raise ConfigError(
            f"widths={list(widths)} has {len(widths)} stages, depths={list(depths)} has "
            f"{len(depths)}; expected one width and one depth for each stage"
        )
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ConfigError(
            f"kernel_size={kernel_size!r}: expected an odd whole number, so that the convolution "
            "has a centre; 7 in all published networks"
        )
    sizes.check_halved(image_size, patch_size, len(depths) - 1)
    check_choice("activation", activation, layers.ACTIVATIONS)
    check_remat(remat)
