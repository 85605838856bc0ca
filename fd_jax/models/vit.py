"""One vision transformer for the whole family: CLIP, DINO, DINOv2/3, SigLIP, EVA-02, students.

What differs between the members is an argument, and every default that libraries disagree on has
to be spelled out by the caller.
"""

import math
from typing import Any, Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fd_jax.errors import ConfigError, check_choice, check_positive
from fd_jax.models import layers, sizes
from fd_jax.models.attention import Attention, QkvBias, RelativePositionBias
from fd_jax.models.backbone import Backbone, Visit, check_remat
from fd_jax.models.block import Block
from fd_jax.models.features import take_patches
from fd_jax.models.resize import PositionResize, resize_pos_embed, resize_rel_pos_table
from fd_jax.models.rotary import Rope, RopeAxes, RopePairs, Rotation
from fd_jax.models.sizes import ImageSize, PartialPatches

Position = Literal["ape", "rpb", "shared_rpb", "rope", "ape_rope", "none"]
ABSOLUTE, ROTARY = ("ape", "ape_rope"), ("rope", "ape_rope")

# Truncation of the 0.02-std normal initialisation (docs/reference.md#quirk-init-truncation): the
# distillation student is cut at one standard deviation, the fine-tuning model at absolute +-2,
# which cuts nothing.
INIT_LIMITS = {"fd_student": 0.02, "finetune": 2.0}


class ViT(Backbone):
    """Vision transformer that returns its whole feature map.

    Architecture:
      image_size: side of a square input in pixels, or a pair of height and width; fixed at
        construction.
      patch_size: side of a patch; divides both sides of the image, see partial_patches.
      width, depth, heads, mlp_width: the usual numbers; heads divide the width.
      position: "ape" learned absolute table added to the tokens; "rpb" a relative bias table per
        block; "shared_rpb" one table for all blocks; "rope" axial rotary; "ape_rope" a table and
        rotary; "none".
      cls_token: whether a class token comes first.
      registers: number of register tokens after it; they carry no position.
      ln_pre: LayerNorm between the embedding and the blocks (CLIP).
      final_norm: whether the encoder ends with a LayerNorm.
      activation, norm_eps, qkv_bias, patch_bias: as the family has them.
      layer_scale: start value of gamma_1, gamma_2; None where the family has no layer scale.
      rope_theta, rope_pairs, rope_reference, rope_offset, rope_axes: of rotary positions, see
        `rotary.Rope`.
      gated_mlp: whether the MLP has a gate (SwiGLU), see `mlp.Mlp`.
      mlp_norm: whether a LayerNorm stands before the MLP's second layer.
      attn_norm: whether a LayerNorm stands before the output projection of attention.
      last_width: channels of the last block, to which a linear layer widens the tokens before it;
        it has as many more heads and hidden channels (arXiv 2511.15572, "WideLast"). None where
        all blocks have one width.
      partial_patches: "refuse" image sides that patches do not fill, or "crop" them: what remains
        at the right and at the bottom is not read.

    Run time:
      drop_path: rate of the last block; block i has drop_path * i / (depth - 1).
      init: "fd_student" or "finetune", see INIT_LIMITS.
      dtype: of matmuls and activations; parameters stay float32 as created.
      grad_dtype: of weight gradients until they are summed over devices.
      attention: key of `kernels.IMPLEMENTATIONS`, as `kernels.choose` settles it.
      remat: None, "full" or "dots": what a block recomputes in the backward pass.
    """

    def __init__(
        self,
        *,
        image_size: ImageSize,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int,
        position: Position,
        cls_token: bool,
        registers: int,
        ln_pre: bool,
        final_norm: bool,
        activation: layers.Activation,
        norm_eps: float,
        layer_scale: float | None,
        qkv_bias: QkvBias,
        patch_bias: bool,
        rope_theta: float = 100.0,
        rope_pairs: RopePairs = "halves",
        rope_reference: int | None = None,
        rope_offset: float = 0.0,
        rope_axes: RopeAxes = "yx",
        gated_mlp: bool = False,
        mlp_norm: bool = False,
        attn_norm: bool = False,
        last_width: int | None = None,
        partial_patches: PartialPatches = "refuse",
        drop_path: float = 0.0,
        init: str = "finetune",
        dtype: DTypeLike = jnp.float32,
        grad_dtype: DTypeLike = jnp.float32,
        attention: str = "xla",
        remat: str | None = None,
        rngs: nnx.Rngs,
    ):
        _check(width, heads, activation, position, qkv_bias, remat)
        check_positive("patch_size", patch_size)
        sizes.check_patches(image_size, patch_size, partial=partial_patches)
        if registers and position in ("rpb", "shared_rpb"):
            raise ConfigError(
                f"position={position!r} has no bias for register tokens; set registers=0"
            )
        last = last_width or width
        if last_width is not None:
            _check_last(last, width, heads, mlp_width, depth, position)
        height, wide = sizes.sides(image_size)
        self.image_size = height if height == wide else (height, wide)
        self.grid = sizes.patch_grid(image_size, patch_size)
        self.cls = int(cls_token)
        self.registers = registers
        self.position = position
        self.head_width = width // heads
        self.rope = None
        if position in ROTARY:
            self.rope = Rope(rope_theta, rope_pairs, rope_reference, rope_offset, rope_axes)
            self.rope.check(self.head_width)
        self.remat = remat
        self.dtype = dtype
        self.width = last
        self.depth = depth
        one = last == width
        self.depths, self.widths = ((depth,), (width,)) if one else ((depth - 1, 1), (width, last))

        def init_kernel(key, shape, dtype=jnp.float32, **_):
            return layers.truncated_normal(0.02, INIT_LIMITS[init])(key, shape, dtype)

        def embedding(*shape):
            return nnx.Param(init_kernel(rngs.params(), shape))

        def position_table(heads=heads):
            return RelativePositionBias(self.grid, heads, cls_token=cls_token)

        dtypes: dict[str, Any] = {"dtype": dtype, "grad_dtype": grad_dtype}
        self.patch_embed = layers.PatchEmbed(
            patch_size, width, use_bias=patch_bias, kernel_init=init_kernel, rngs=rngs, **dtypes
        )
        self.cls_token = embedding(1, 1, width) if cls_token else None
        self.register_tokens = embedding(1, registers, width) if registers else None
        tokens = self.cls + self.grid[0] * self.grid[1]
        self.pos_embed = embedding(1, tokens, width) if position in ABSOLUTE else None
        self.rel_pos_bias = position_table() if position == "shared_rpb" else None
        self.ln_pre = (
            layers.LayerNorm(width, eps=norm_eps, dtype=dtype, rngs=rngs) if ln_pre else None
        )

        def block(index):
            # The residual branches of deep blocks start smaller (BEiT's rescaling).
            out_init = layers.scaled(init_kernel, 1 / math.sqrt(2 * (index + 1)))
            common = {"kernel_init": init_kernel, "out_init": out_init, "rngs": rngs, **dtypes}
            own = last if index == depth - 1 else width
            own_heads = heads * own // width
            attn = Attention(
                own,
                own_heads,
                qkv_bias=qkv_bias,
                rel_pos_bias=position_table(own_heads) if position == "rpb" else None,
                norm_eps=norm_eps if attn_norm else None,
                implementation=attention,
                **common,
            )
            return Block(
                own,
                mlp_width * own // width,
                attn=attn,
                activation=activation,
                gated_mlp=gated_mlp,
                mlp_norm=mlp_norm,
                norm_eps=norm_eps,
                layer_scale=layer_scale,
                drop_path=drop_path * index / max(depth - 1, 1),
                **common,
            )

        # Text keys, as in the parameter tree: `nnx.merge` pairs both sides in sorted order, and
        # for text that is 0, 1, 10, 11, 2, ... An nnx.List (sorted by number) would get its
        # blocks permuted, without an error, from depth 11 on.
        self.blocks = nnx.Dict({str(index): block(index) for index in range(depth)})
        self.norm = (
            layers.LayerNorm(last, eps=norm_eps, dtype=dtype, rngs=rngs) if final_norm else None
        )
        self.widen = (
            None if one else layers.Dense(width, last, kernel_init=init_kernel, rngs=rngs, **dtypes)
        )

    # Spared from weight decay although they have more than one dimension. Position bias tables are
    # decayed, as in the original (docs/reference.md#quirk-bias-table-decay).
    NO_DECAY = (r"(^|/)cls_token$", r"(^|/)pos_embed$", r"(^|/)register_tokens$")

    @staticmethod
    def head_widths(arch: dict[str, Any]) -> tuple[int, ...]:
        """Channels per attention head: what implementations of attention have limits on."""
        return (arch["width"] // arch["heads"],)

    @staticmethod
    def layer_id(path: str, arch: dict[str, Any]) -> int:
        """Layer of an encoder parameter for layer-wise decay (docs/reference.md#layer-decay).

        0 for what comes before the blocks, i + 1 for block i, depth + 1 for what comes after.
        """
        first, _, rest = path.partition("/")
        if first in ("cls_token", "pos_embed", "register_tokens", "patch_embed", "ln_pre"):
            return 0
        if first == "blocks":
            return int(rest.split("/")[0]) + 1
        return arch["depth"] + (first != "widen")  # which belongs to the last block

    @staticmethod
    def block_of(path: str, arch: dict[str, Any]) -> int:
        """See `Backbone`; a position bias that all blocks share is read by the first one."""
        if path.startswith("rel_pos_bias/"):
            return 0
        return ViT.layer_id(path, arch) - 1

    def embed(self, images: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Tokens as they enter the first block; arguments as in `__call__`. -> [B, N, D]."""
        self._check_images(images)
        x = self.patch_embed(images)
        batch = x.shape[0]
        if self.cls_token is not None:
            x = jnp.concatenate([_tile(self.cls_token, batch, self.dtype), x], axis=1)
        if self.pos_embed is not None:
            x = layers.add_parameter(x, self.pos_embed[...])
        if keep is not None:
            _check_indices(keep, batch)
            kept = take_patches(x[:, self.cls :], keep)
            x = jnp.concatenate([x[:, : self.cls], kept], axis=1)
        if self.register_tokens is not None:
            registers = _tile(self.register_tokens, batch, self.dtype)
            x = jnp.concatenate([x[:, : self.cls], registers, x[:, self.cls :]], axis=1)
        return x if self.ln_pre is None else self.ln_pre(x)

    @staticmethod
    def resize_positions(
        params: dict[str, Any],
        arch: dict[str, Any],
        image_size: ImageSize,
        *,
        method: PositionResize,
    ) -> dict[str, Any]:
        """Parameters of the same network for another image size.

        Args:
          params: nested dict of numpy arrays; a new dict comes back, arrays are shared.
          arch: the architecture keywords of `params`.
          image_size: wanted side of a square in pixels, or (height, width).
          method: see `resize.resize_pos_embed` and `resize.resize_rel_pos_table`.
        """
        cls = int(arch["cls_token"])
        source, target = (
            sizes.patch_grid(size, arch["patch_size"]) for size in (arch["image_size"], image_size)
        )

        def resized(tree):
            out = {}
            for name, value in tree.items():
                if name == "pos_embed":
                    out[name] = resize_pos_embed(value, source, target, prefix=cls, method=method)
                elif name == "rel_pos_bias":
                    table = resize_rel_pos_table(
                        value["table"], source, target, extra=3 * cls, method=method
                    )
                    out[name] = {"table": table}
                else:
                    out[name] = resized(value) if isinstance(value, dict) else value
            return out

        return resized(params)

    @staticmethod
    def untied(arch: dict[str, Any]) -> dict[str, Any]:
        """The architecture in which every block has a position bias of its own."""
        shared = arch["position"] == "shared_rpb"
        return {**arch, "position": "rpb"} if shared else arch

    @staticmethod
    def untie_positions(params: dict[str, Any], arch: dict[str, Any]) -> dict[str, Any]:
        """Copies a shared bias table into every block, for `untied(arch)`.

        See docs/reference.md#fine-tune-loading.
        """
        if arch["position"] != "shared_rpb":
            return params
        rest = {name: value for name, value in params.items() if name != "rel_pos_bias"}
        table = params["rel_pos_bias"]
        rest["blocks"] = {
            index: {**block, "attn": {**block["attn"], "rel_pos_bias": table}}
            for index, block in params["blocks"].items()
        }
        return rest

    def _visits(self, images, drops, keep):
        x = self.embed(images, keep)
        shared_bias = None if self.rel_pos_bias is None else self.rel_pos_bias(keep)
        rotate = None
        if self.rope is not None:
            rotate = Rotation(self.rope, self.grid, self.cls + self.registers, self.head_width)
            rotate = rotate if keep is None else rotate.at(keep)
        positions = (shared_bias, rotate, keep)
        for index in range(self.depth):
            block = self.blocks[str(index)]
            if self.widen is not None and index == self.depth - 1:
                x = self.widen(x)
            before, block_drops = x, None if drops is None else drops[:, index]
            x = self._run_block(block, x, block_drops, *positions)
            sent = yield Visit(block, before, x, positions, self.grid, keep)
            x = x if sent is None else sent


def _check(width, heads, activation, position, qkv_bias, remat):
    if width % heads:
        raise ConfigError(f"width {width} is not divisible by {heads} heads")
    check_choice("activation", activation, layers.ACTIVATIONS)
    check_choice("position", position, Position.__args__)
    check_choice("qkv_bias", qkv_bias, QkvBias.__args__)
    check_remat(remat)


def _check_last(last, width, heads, mlp_width, depth, position):
    alike = heads * last % width == 0 and mlp_width * last % width == 0
    if last <= width or not alike or depth < 2:
        step = width // math.gcd(heads, mlp_width, width)
        raise ConfigError(
            f"last_width={last}: expected more than the width {width} of the blocks before the "
            f"last of at least two, and a multiple of {step}, so that the last block has whole "
            f"heads ({heads} per {width} channels) and hidden channels"
        )
    if position == "shared_rpb":
        raise ConfigError(
            f"last_width={last}, but position='shared_rpb' is one table for the heads of all "
            "blocks, of which the last one has more; use position='rpb'"
        )


def _check_indices(keep: jax.Array, batch: int) -> None:
    if keep.ndim != 2 or keep.shape[0] != batch or not jnp.issubdtype(keep.dtype, jnp.integer):
        raise ValueError(
            f"keep is {keep.dtype.name} {list(keep.shape)}; expected whole numbers [B, P], the "
            f"patches to keep of each of the {batch} images"
        )


def _tile(token: nnx.Param, batch: int, dtype: DTypeLike) -> jax.Array:
    value = token[...]
    return jnp.broadcast_to(value, (batch, *value.shape[1:])).astype(dtype)
