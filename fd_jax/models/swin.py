"""What the two Swin Transformers share: stages of windowed blocks, the grid halved in between.

swin_v1.py has the one of EsViT and other teachers, swin_v2.py the one of students up to SwinV2-G.
V1 normalises before each branch and before the reduction of a merging, V2 after them; their
attentions and position biases differ.
"""

from collections.abc import Mapping, Sequence
import functools
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from fd_jax.errors import ConfigError, check_choice
from fd_jax.models import layers, sizes, windows
from fd_jax.models.attention import Attention, AttentionInputs
from fd_jax.models.backbone import Backbone, Visit, check_remat
from fd_jax.models.mlp import Mlp
from fd_jax.models.sizes import ImageSize

MERGE = 2  # tokens per axis that become one between stages
KERNEL_INIT = layers.truncated_normal(0.02, 2.0)  # cut at absolute +-2, which cuts nothing


class PatchMerging(nnx.Module):
    """Four neighbouring tokens become one of twice the channels.

    Attributes:
      norm_first: V1 normalises the 4 D channels before the reduction, V2 the 2 D after it.
    """

    def __init__(
        self,
        width: int,
        *,
        norm: layers.LayerNorm,
        norm_first: bool,
        dtype: DTypeLike,
        grad_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.norm_first = norm_first
        self.norm = norm
        self.reduction = layers.Dense(
            4 * width,
            2 * width,
            use_bias=False,
            dtype=dtype,
            grad_dtype=grad_dtype,
            kernel_init=KERNEL_INIT,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, grid: int) -> jax.Array:
        """[B, g*g, D] -> [B, g*g/4, 2D]; channels by (column, row) parity, row fastest."""
        batch, _, width = x.shape
        half = grid // MERGE
        x = x.reshape(batch, half, MERGE, half, MERGE, width).transpose(0, 1, 3, 4, 2, 5)
        x = x.reshape(batch, half * half, MERGE * MERGE * width)
        return self.reduction(self.norm(x)) if self.norm_first else self.norm(self.reduction(x))


class Block(nnx.Module):
    """Windowed attention and an MLP, each in a residual branch with its own drop path.

    V1: x += attn(norm1(x)); x += mlp(norm2(x)). V2: x += norm1(attn(x)); x += norm2(mlp(x)), and
    in some blocks of the giant a further `extra_norm` on x itself.
    """

    def __init__(
        self,
        *,
        grid: int,
        window: int,
        shift: int,
        norm1: layers.LayerNorm,
        attn: Attention,
        norm2: layers.LayerNorm,
        mlp: Mlp,
        norm_first: bool,
        extra_norm: layers.LayerNorm | None,
        drop_path: float,
    ):
        self.grid, self.window, self.shift = grid, window, shift
        self.norm_first = norm_first
        self.drop_path = drop_path
        self.norm1 = norm1
        self.attn = attn
        self.norm2 = norm2
        self.mlp = mlp
        self.extra_norm = extra_norm

    def __call__(
        self, x: jax.Array, drops: jax.Array | None, shared_bias: jax.Array | None
    ) -> jax.Array:
        """[B, g*g, D] -> [B, g*g, D]; `drops` is [B, 2] uniform numbers (attn, mlp) or None."""
        drop_attn, drop_mlp = (None, None) if drops is None else (drops[:, 0], drops[:, 1])
        shape = x.shape
        x = x.reshape(-1, shape[-1])  # one row per token outside attention, see block.Block

        def attend(rows):
            return self._attend(rows.reshape(shape), shared_bias).reshape(x.shape)

        branch = self._branch(x, self.norm1, attend)
        x = x + layers.drop_path(branch, drop_attn, rate=self.drop_path)
        branch = self._branch(x, self.norm2, self.mlp)
        x = x + layers.drop_path(branch, drop_mlp, rate=self.drop_path)
        x = x if self.extra_norm is None else self.extra_norm(x)
        return x.reshape(shape)

    def _branch(self, x, norm, layer):
        return layer(norm(x)) if self.norm_first else norm(layer(x))

    def attention_inputs(self, x: jax.Array, shared_bias: jax.Array | None) -> AttentionInputs:
        """What this block's attention is computed from; arguments as in `__call__`."""
        rows = x.reshape(-1, x.shape[-1])
        rows = self.norm1(rows) if self.norm_first else rows
        return self._attention_inputs(rows.reshape(x.shape), shared_bias)

    def _attend(self, x: jax.Array, shared_bias: jax.Array | None) -> jax.Array:
        out = self.attn.output(self._attention_inputs(x, shared_bias))
        return windows.join(out, self.grid, self.window, self.shift)

    def _attention_inputs(self, x, shared_bias):
        size = (self.grid, self.window, self.shift)
        mask = jnp.asarray(windows.shift_mask(*size)) if self.shift else None
        return self.attn.inputs(windows.partition(x, *size), shared_bias=shared_bias, mask=mask)


class Stage(nnx.Module):
    """Blocks on one grid, and the merging that ends all stages but the last."""

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        rel_pos_bias: windows.ContinuousBias | None,
        downsample: PatchMerging | None,
    ):
        # Text keys: see the note on nnx.merge in vit.py.
        self.blocks = nnx.Dict({str(index): block for index, block in enumerate(blocks)})
        self.rel_pos_bias = rel_pos_bias
        self.downsample = downsample


class Swin(Backbone):
    """What both versions share; returns the feature map of the last stage.

    Architecture:
      image_size: side of the square input in pixels, fixed at construction.
      patch_size: side of a patch; the grid of stage s is image_size / patch_size / 2^s.
      embed_width: channels of the first stage; each stage doubles them.
      depths, heads: blocks and attention heads of each stage. Three stages end at 1/16 of the
        input's side, as a ViT with patches of 16 does.
      window: tokens on a side of the square window. Where the grid is no larger, the window is the
        grid and nothing is shifted.
      mlp_ratio: hidden width of the MLPs per channel.
      activation, norm_eps: as the source has them.
      final_norm: whether the encoder ends with a LayerNorm.

    Run time: drop_path (of the last block, linear in depth from 0), dtype, grad_dtype, attention
    and remat as in `vit.ViT`. `init` is taken for the sake of that interface and changes nothing:
    students and fine-tuned networks of this family start alike.
    """

    cls = 0
    registers = 0
    norm_first: bool  # whether a norm comes before its layer (V1) or after it (V2)
    windows_at: int | None = None  # side of the input whose grids clip windows; None for its own

    def __init__(
        self,
        *,
        image_size: ImageSize,
        patch_size: int,
        embed_width: int,
        depths: Sequence[int],
        heads: Sequence[int],
        window: int,
        mlp_ratio: int,
        activation: layers.Activation,
        norm_eps: float,
        final_norm: bool,
        drop_path: float = 0.0,
        init: str = "finetune",
        dtype: DTypeLike = jnp.float32,
        grad_dtype: DTypeLike = jnp.float32,
        attention: str = "xla",
        remat: str | None = None,
        rngs: nnx.Rngs,
    ):
        del init
        _check(image_size, patch_size, embed_width, depths, heads, window, activation, remat)
        self.image_size = square_side(image_size)
        used = stage_windows(image_size, patch_size, len(depths), window, self.windows_at)
        self.window_sides = tuple(side for side, _ in used)
        self.depths, self.depth = tuple(depths), sum(depths)
        self.widths = tuple(embed_width * MERGE**stage for stage in range(len(depths)))
        self.width = self.widths[-1]
        self.grids = grids(image_size, patch_size, len(depths))
        self.grid = (self.grids[-1], self.grids[-1])
        self.remat = remat
        self.dtype = dtype
        dtypes: dict[str, Any] = {"dtype": dtype, "grad_dtype": grad_dtype}

        def norm(width: int) -> layers.LayerNorm:
            return layers.LayerNorm(width, eps=norm_eps, dtype=dtype, rngs=rngs)

        def block(stage: int, index: int) -> Block:
            width, grid = embed_width * MERGE**stage, self.grids[stage]
            number = sum(depths[:stage]) + index
            # The residual branches of deep blocks start smaller, as in the ViT.
            out_init = layers.scaled(KERNEL_INIT, 1 / math.sqrt(2 * (number + 1)))
            common = {"kernel_init": KERNEL_INIT, "out_init": out_init, **dtypes, "rngs": rngs}
            heads_here = {"heads": heads[stage], "implementation": attention}
            return Block(
                grid=grid,
                window=used[stage].side,
                shift=window // 2 if index % 2 and used[stage].shifts else 0,
                norm1=self._branch_norm(norm(width)),
                attn=self._attention(stage, width, **heads_here, **common),
                norm2=self._branch_norm(norm(width)),
                mlp=Mlp(width, mlp_ratio * width, activation=activation, **common),
                norm_first=self.norm_first,
                extra_norm=norm(width) if self._ends_with_norm(index) else None,
                drop_path=drop_path * number / max(self.depth - 1, 1),
            )

        def stage(number: int) -> Stage:
            width, last = embed_width * MERGE**number, number == len(depths) - 1
            return Stage(
                [block(number, index) for index in range(depths[number])],
                rel_pos_bias=self._stage_bias(number, heads[number], rngs),
                downsample=None
                if last
                else PatchMerging(
                    width,
                    norm=norm((4 if self.norm_first else 2) * width),
                    norm_first=self.norm_first,
                    **dtypes,
                    rngs=rngs,
                ),
            )

        self.patch_embed = layers.PatchEmbed(
            patch_size,
            embed_width,
            use_bias=True,
            kernel_init=KERNEL_INIT,
            rngs=rngs,
            **dtypes,
        )
        self.patch_norm = norm(embed_width)
        self.stages = nnx.Dict({str(number): stage(number) for number in range(len(depths))})
        self.norm = norm(self.width) if final_norm else None

    @staticmethod
    def head_widths(arch: dict[str, Any]) -> tuple[int, ...]:
        """Channels per attention head of each stage."""
        heads = arch["heads"]
        return tuple(arch["embed_width"] * MERGE**i // heads[i] for i in range(len(heads)))

    @staticmethod
    def layer_id(path: str, arch: dict[str, Any]) -> int:
        """Layer of an encoder parameter for layer-wise decay (docs/reference.md#layer-decay).

        0 for the patch embedding; 1 + blocks before it for a block; the id of its stage's last
        block for a merging and for a bias that a stage shares; depth + 1 for what comes after.
        """
        parts = path.split("/")
        if parts[0] in ("patch_embed", "patch_norm"):
            return 0
        if parts[0] != "stages":
            return sum(arch["depths"]) + 1
        stage = int(parts[1])
        if parts[2] == "blocks":
            return sum(arch["depths"][:stage]) + int(parts[3]) + 1
        return sum(arch["depths"][: stage + 1])

    @staticmethod
    def block_of(path: str, arch: dict[str, Any]) -> int:
        """See `Backbone`; a merging belongs to the last block before it."""
        parts = path.split("/")
        if parts[0] == "stages" and parts[2] == "rel_pos_bias":
            return sum(arch["depths"][: int(parts[1])])
        return Swin.layer_id(path, arch) - 1

    @staticmethod
    def first_stages(arch: dict[str, Any], stages: int) -> dict[str, Any]:
        """The architecture of the first stages; three end at 1/16 of the input's side."""
        per_stage = ("depths", "heads", "pretrained_windows")
        return {k: v[:stages] if k in per_stage else v for k, v in arch.items()}

    @staticmethod
    def first_stages_params(
        params: dict[str, Any], arch: dict[str, Any], stages: int
    ) -> dict[str, Any]:
        """The parameters for `first_stages(arch, stages)`; the final norm starts anew.

        As the original does for its three-stage teacher: that norm was trained for the last
        stage's channels, so it is replaced by one of scale 1 and bias 0
        (docs/reference.md#stage-3-target).
        """
        if stages == len(arch["depths"]):
            return params
        kept = {str(number): params["stages"][str(number)] for number in range(stages)}
        last = str(stages - 1)
        kept[last] = {k: v for k, v in kept[last].items() if k != "downsample"}
        params = {**params, "stages": kept}
        if "norm" in params:
            width = arch["embed_width"] * MERGE ** (stages - 1)
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
        if keep is not None:
            raise ConfigError(
                "a Swin network sees all patches, since its windows have to be full; use a ViT "
                "where only some patches are kept"
            )
        x = self.embed(images)
        number = 0
        for index, depth in enumerate(self.depths):
            stage, side = self.stages[str(index)], self.grids[index]
            shared_bias = None if stage.rel_pos_bias is None else stage.rel_pos_bias()
            for name in map(str, range(depth)):
                block = stage.blocks[name]
                before, block_drops = x, None if drops is None else drops[:, number]
                x = self._run_block(block, x, block_drops, shared_bias)
                number += 1
                sent = yield Visit(
                    block,
                    before,
                    x,
                    positions=(shared_bias,),
                    grid=(side, side),
                    window=block.window,
                    shift=block.shift,
                )
                x = x if sent is None else sent
            if stage.downsample is not None:
                x = stage.downsample(x, side)

    def _attention(self, stage: int, width: int, heads: int, **kwargs) -> Attention:
        raise NotImplementedError

    def _branch_norm(self, norm: layers.LayerNorm) -> layers.LayerNorm:
        """The norm of a residual branch as it starts."""
        return norm

    def _stage_bias(self, stage: int, heads: int, rngs: nnx.Rngs) -> windows.ContinuousBias | None:
        """The bias that the blocks of a stage share, if they do."""
        del stage, heads, rngs

    def _ends_with_norm(self, index: int) -> bool:
        """Whether a block (counted in its stage) normalises the main branch."""
        del index
        return False


def grids(image_size: ImageSize, patch_size: int, stages: int) -> tuple[int, ...]:
    """Side of the grid of each stage."""
    side = square_side(image_size)
    return tuple(side // patch_size // MERGE**stage for stage in range(stages))


class Window(NamedTuple):
    """The windows of a stage: tokens on a side, and whether every second block shifts them."""

    side: int
    shifts: bool


def stage_windows(
    image_size: ImageSize, patch_size: int, stages: int, window: int, windows_at: int | None = None
) -> tuple[Window, ...]:
    """The windows of each stage; arguments as in `Swin` and `SwinV2`.

    Raises:
      ConfigError: they do not divide the grids of the image.
    """
    sides = grids(image_size, patch_size, stages)
    deciding = grids(windows_at or image_size, patch_size, stages)
    found = tuple(Window(min(window, side), side > window) for side in deciding)
    for stage, (side, (used, _)) in enumerate(zip(sides, found, strict=True)):
        if not used or side % used:
            unit = patch_size * window * MERGE ** (stages - 1)
            at = f", which an input of {windows_at} px decides," if windows_at else ""
            raise ConfigError(
                f"the grid of stage {stage} is {side} x {side}, which windows of {used}{at} do not "
                f"divide; set window to a divisor, or image_size to a multiple of {unit}"
            )
    return found


def windows_of(arch: Mapping[str, Any]) -> tuple[Window, ...]:
    """The windows of each stage of an architecture; errors as in `stage_windows`."""
    size = arch["image_size"], arch["patch_size"], len(arch["depths"])
    return stage_windows(*size, arch["window"], arch.get("windows_at"))


square_side = functools.partial(sizes.square_side, network="a Swin network")


def _check(image_size, patch_size, embed_width, depths, heads, window, activation, remat):
    side = square_side(image_size)
    for name, value in (("patch_size", patch_size), ("window", window)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"{name}={value!r}: a side of a square is expected, a whole number above 0; "
                "patches and windows that are not square are not supported"
            )
    if len(depths) != len(heads):
        raise ConfigError(
            f"depths={list(depths)} has {len(depths)} stages, heads={list(heads)} has {len(heads)}"
        )
    unit = patch_size * MERGE ** (len(depths) - 1)
    if side < unit or side % unit:
        lower = max(side // unit, 1) * unit
        raise ConfigError(
            f"image_size {side} is not divisible by patch_size {patch_size} x "
            f"{MERGE ** (len(depths) - 1)} (the stages halve the grid); use {lower} or "
            f"{lower + unit}"
        )
    for stage in range(len(depths)):
        if embed_width * MERGE**stage % heads[stage]:
            raise ConfigError(
                f"width {embed_width * MERGE**stage} of stage {stage} is not divisible by "
                f"{heads[stage]} heads"
            )
    check_choice("activation", activation, layers.ACTIVATIONS)
    check_remat(remat)
