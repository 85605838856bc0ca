"""Swin Transformer V2, from the distilled SwinV2-B to SwinV2-G."""

from collections.abc import Sequence
from typing import Any, Literal

from flax import nnx
import jax.numpy as jnp

from fd_jax.errors import ConfigError, check_choice
from fd_jax.models import windows
from fd_jax.models.swin import KERNEL_INIT, Swin

Position = Literal["rpb", "shared_rpb"]


class SwinV2(Swin):
    """Swin Transformer V2: res-post-norm, cosine attention, continuous position bias.

    Architecture beside `Swin`'s:
      position: "rpb" a bias network per block; "shared_rpb" one for each stage.
      pretrained_windows: per stage, the window whose scale the bias networks' coordinates have; 0
        for the stage's own, which is what the original always takes
        (docs/reference.md#quirk-window-scale).
      residual_scale: start of norm1's and norm2's scales; 1e-5 in the original, 0 in Microsoft's
        SwinV2.
      extra_norm_every: every so many blocks of a stage end with a norm on the main branch (6 in the
        giant); 0 for none.
      windows_at: side of the input whose grids decide where a window is clipped and whether it is
        shifted; None for `image_size`. transformers decides it when a network is made, and keeps it
        for inputs of other sizes.
    """

    norm_first = False

    NO_DECAY = (r"rel_pos_bias/", r"logit_scale$")

    def __init__(
        self,
        *,
        depths: Sequence[int],
        position: Position,
        pretrained_windows: Sequence[int],
        residual_scale: float,
        extra_norm_every: int,
        windows_at: int | None = None,
        **kwargs: Any,
    ):
        check_choice("position", position, Position.__args__)
        if len(pretrained_windows) != len(depths):
            raise ConfigError(
                f"pretrained_windows={list(pretrained_windows)} has {len(pretrained_windows)} "
                f"entries for {len(depths)} stages; give one per stage, 0 for the stage's own"
            )
        self.position = position
        self.pretrained_windows = tuple(pretrained_windows)
        self.residual_scale = residual_scale
        self.extra_norm_every = extra_norm_every
        self.windows_at = windows_at
        super().__init__(depths=depths, **kwargs)

    @staticmethod
    def untied(arch: dict[str, Any]) -> dict[str, Any]:
        """The architecture in which every block has a position bias of its own."""
        return {**arch, "position": "rpb"}

    @staticmethod
    def untie_positions(params: dict[str, Any], arch: dict[str, Any]) -> dict[str, Any]:
        """Copies each stage's shared bias network into its blocks.

        See docs/reference.md#fine-tune-loading.
        """
        if arch["position"] != "shared_rpb":
            return params
        stages = {}
        for number, stage in params["stages"].items():
            shared = stage["rel_pos_bias"]
            rest = {name: value for name, value in stage.items() if name != "rel_pos_bias"}
            rest["blocks"] = {
                index: {**block, "attn": {**block["attn"], "rel_pos_bias": shared}}
                for index, block in stage["blocks"].items()
            }
            stages[number] = rest
        return {**params, "stages": stages}

    def _attention(self, stage, width, heads, **kwargs):
        own = None
        if self.position == "rpb":
            own = self._bias(stage, heads, kwargs["rngs"])
        return windows.CosineAttention(width, heads, qkv_bias="qv", rel_pos_bias=own, **kwargs)

    def _stage_bias(self, stage, heads, rngs):
        return self._bias(stage, heads, rngs) if self.position == "shared_rpb" else None

    def _bias(self, stage: int, heads: int, rngs: nnx.Rngs) -> windows.ContinuousBias:
        return windows.ContinuousBias(
            self.window_sides[stage],
            heads,
            pretrained=self.pretrained_windows[stage],
            dtype=self.dtype,
            kernel_init=KERNEL_INIT,
            rngs=rngs,
        )

    def _branch_norm(self, norm):
        norm.scale = nnx.Param(jnp.full((norm.scale.shape[0],), self.residual_scale, jnp.float32))
        return norm

    def _ends_with_norm(self, index):
        return bool(self.extra_norm_every) and (index + 1) % self.extra_norm_every == 0
