"""FLOPs per image in closed form, counting only matmuls, with two FLOPs per multiply-add.

A task adds up the FLOPs of its step from the functions here.

Norms, softmax, activations, the optimizer and work that does not grow with the batch (the bias
networks of SwinV2) are left out; they are about 1 % of a ViT-B step.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

from fd_jax.models import sizes, swin
from fd_jax.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one image.

    Attributes:
      forward: forward passes of all networks.
      backward: gradients of weights and inputs, for the networks that train.
      recomputed: forward work that remat repeats in the backward pass. MFU leaves it out, because
        the model itself does not need it.
    """

    forward: float
    backward: float = 0.0
    recomputed: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.forward + other.forward,
            self.backward + other.backward,
            self.recomputed + other.recomputed,
        )

    @property
    def model(self) -> float:
        """FLOPs that MFU counts: forward and backward."""
        return self.forward + self.backward

    @property
    def executed(self) -> float:
        """FLOPs that the chip executes, including recomputed ones."""
        return self.model + self.recomputed


@dataclasses.dataclass(frozen=True)
class _Block:
    """Forward FLOPs of one block, and how many of them remat repeats."""

    weights: float  # matmuls with a parameter
    attention: float  # q k^T and probabilities times v
    last: float  # fc2; the backward pass needs its result only for a layer scale

    def recomputed(self, remat: str | None) -> float:
        if remat == "full":
            return self.weights + self.attention - self.last
        return self.attention if remat == "dots" else 0.0


def network(spec: ModelSpec, *, trains: bool, remat: str | None = None) -> Flops:
    """FLOPs of an encoder for one image.

    Args:
      spec: spec of the encoder.
      trains: whether its weights get gradients (its input, the image, never does).
      remat: value of `config.remat`.
    """
    embedding, blocks, merging = _FAMILIES[spec.family](spec.arch)
    inner = sum(block.weights + block.attention for block in blocks) + merging
    if not trains:
        return Flops(embedding + inner)
    recomputed = sum(block.recomputed(remat or None) for block in blocks)
    return Flops(embedding + inner, backward=embedding + 2 * inner, recomputed=recomputed)


def linear(rows: float, width: int, out: int, *, input_gradient: bool = True) -> Flops:
    """FLOPs of a trained linear layer that is applied to `rows` vectors per image."""
    forward = 2.0 * rows * width * out
    return Flops(forward, backward=forward * (2 if input_gradient else 1))


def resize(side: int, new_side: int) -> Flops:
    """FLOPs to resize an image [side, side, 3] on the device by two matmuls, rows first."""
    return Flops(2.0 * 3 * (new_side * side * side + new_side * new_side * side))


def _vit(arch: dict[str, Any]) -> tuple[float, list[_Block], float]:
    width, hidden = arch["width"], arch["mlp_width"]
    patches = math.prod(sizes.patch_grid(arch["image_size"], arch["patch_size"]))
    tokens = patches + int(arch["cls_token"]) + arch["registers"]
    embedding = 2.0 * patches * 3 * arch["patch_size"] ** 2 * width
    block = _block(tokens, tokens, width, hidden, scaled=arch["layer_scale"] is not None)
    return embedding, [block] * arch["depth"], 0.0


def _swin(arch: dict[str, Any]) -> tuple[float, list[_Block], float]:
    grids = swin.grids(arch["image_size"], arch["patch_size"], len(arch["depths"]))
    embedding = 2.0 * grids[0] ** 2 * 3 * arch["patch_size"] ** 2 * arch["embed_width"]
    blocks, merging = [], 0.0
    for stage, (grid, depth) in enumerate(zip(grids, arch["depths"], strict=True)):
        width = arch["embed_width"] * swin.MERGE**stage
        window = min(arch["window"], grid) ** 2
        hidden = arch["mlp_ratio"] * width
        # SwinV2 ends its branches with a norm; like a layer scale, its gradient needs their result.
        scaled = "residual_scale" in arch
        blocks += [_block(grid**2, window, width, hidden, scaled=scaled)] * depth
        if stage < len(grids) - 1:
            merging += 2.0 * grids[stage + 1] ** 2 * 4 * width * 2 * width
    return embedding, blocks, merging


def _block(tokens: int, keys: int, width: int, hidden: int, *, scaled: bool) -> _Block:
    last = 2.0 * tokens * hidden * width
    return _Block(
        weights=2.0 * tokens * width * (4 * width + hidden) + last,
        attention=4.0 * tokens * keys * width,
        last=0.0 if scaled else last,
    )


# Forward FLOPs of (patch embedding, each block, matmuls between stages), for each family.
_FAMILIES: dict[str, Callable[[dict[str, Any]], tuple[float, list[_Block], float]]] = {
    "vit": _vit,
    "swin": _swin,
    "swin_v2": _swin,
}
