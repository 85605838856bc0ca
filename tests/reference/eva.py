"""EVA-02 and its relatives in plain torch: Perception Encoder, RoPE-ViT and BEiT-3.

Written from the papers (arXiv 2303.11331, 2504.13181, 2403.13298, 2208.10442), under the names of
timm's class `Eva`. A rotation is a product of complex numbers, and its angles are computed patch by
patch.
"""

import cmath
import dataclasses
import math

import torch
from torch.nn import functional

ACTIVATIONS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu_erf": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
}

# From our paths to those names, see `tests.models.torch_names`.
_BLOCK = r"blocks/(\d+)/"
PLAIN = {
    "patch_embed": "patch_embed.proj",
    "cls_token": "cls_token",
    "register_tokens": "reg_token",
    "pos_embed": "pos_embed",
    "ln_pre": "norm_pre",
    "norm": "norm",
    _BLOCK + r"(norm[12])": r"blocks.\1.\2",
    _BLOCK + r"(attn|mlp)/norm": r"blocks.\1.\2.norm",
    _BLOCK + "attn/qkv/kernel": r"blocks.\1.attn.{}_proj.weight",
    _BLOCK + r"attn/([qkv])_bias": r"blocks.\1.attn.\2_proj.bias",
    _BLOCK + "attn/proj": r"blocks.\1.attn.proj",
    _BLOCK + r"mlp/(fc[12])": r"blocks.\1.mlp.\2",
    _BLOCK + r"(gamma_[12])": r"blocks.\1.\2",
}
GATED = {
    _BLOCK + "mlp/gate": r"blocks.\1.mlp.fc1_g",
    _BLOCK + "mlp/fc1": r"blocks.\1.mlp.fc1_x",
    **PLAIN,
}


@dataclasses.dataclass(frozen=True)
class Turns:
    """How queries and keys are rotated.

    Patch (row, column) is at ((row + offset) / rows * reference, (column + offset) / columns *
    reference); without a reference, at (row + offset, column + offset).
    """

    theta: float
    reference: int | None
    offset: float
    columns_first: bool
    neighbours: bool

    def of(self, row, column, rows, columns, pairs):
        """One complex number for each pair of channels, half of them for each axis."""
        place = [row + self.offset, column + self.offset]
        if self.reference is not None:
            place = [place[0] / rows * self.reference, place[1] / columns * self.reference]
        if self.columns_first:
            place.reverse()
        periods = [self.theta ** (k / (pairs // 2)) for k in range(pairs // 2)]
        return [cmath.exp(1j * where / period) for where in place for period in periods]

    def __call__(self, x, prefix, patches, grid):
        """[B, N, A, d] -> [B, N, A, d]; the first `prefix` tokens stay.

        `patches` [B, P] are the numbers of the others, counted row by row on the grid.
        """
        pairs = x.shape[-1] // 2
        turns = [
            [self.of(*divmod(int(patch), grid[1]), *grid, pairs) for patch in row]
            for row in patches
        ]
        parts = x[:, prefix:].unflatten(-1, (pairs, 2) if self.neighbours else (2, pairs))
        axis = -1 if self.neighbours else -2
        numbers = (
            torch.complex(*parts.unbind(axis))
            * torch.tensor(turns, dtype=torch.complex128)[:, :, None]
        )
        turned = torch.stack([numbers.real, numbers.imag], axis).flatten(-2)
        return torch.cat([x[:, :prefix], turned], 1)


@dataclasses.dataclass(frozen=True)
class Network:
    """The network of some tensors.

    Attributes:
      tensors: float64 by name; what is not there is left out of the network.
      patch: side of a patch.
      heads: number of heads.
      eps: of all norms.
      activation: key of ACTIVATIONS.
      turns: of queries and keys, or None.
    """

    tensors: dict
    patch: int
    heads: int
    eps: float
    activation: str
    turns: Turns | None = None

    def __call__(self, images, keep=None):
        """Tokens after the final norm. [B, H, W, 3] -> [B, N, D], float64.

        `keep` [B, P] are the patches that the blocks see; None for all.
        """
        x, prefix, grid = self.embedded(images)
        patches = torch.arange(x.shape[1] - prefix).expand(len(x), -1) if keep is None else keep
        kept = torch.stack([row[prefix + index] for row, index in zip(x, patches, strict=True)])
        x, where = torch.cat([x[:, :prefix], kept], 1), (prefix, patches, grid)
        for index in range(sum(name.endswith("norm1.weight") for name in self.tensors)):
            at = f"blocks.{index}"
            branch = self.attended(self.norm(x, f"{at}.norm1"), f"{at}.attn", where)
            x = x + self.tensors.get(f"{at}.gamma_1", 1) * branch
            branch = self.mlp(self.norm(x, f"{at}.norm2"), f"{at}.mlp")
            x = x + self.tensors.get(f"{at}.gamma_2", 1) * branch
        return self.norm(x, "norm")

    def embedded(self, images):
        """Tokens as they enter the first block, how many are no patches, and (rows, columns)."""
        tensors = self.tensors
        weight, bias = tensors["patch_embed.proj.weight"], tensors.get("patch_embed.proj.bias")
        maps = functional.conv2d(images.permute(0, 3, 1, 2), weight, bias, stride=self.patch)
        x, grid = maps.flatten(2).transpose(1, 2), maps.shape[2:]
        if "cls_token" in tensors:
            x = torch.cat([tensors["cls_token"].expand(len(x), -1, -1), x], 1)
        x = x + tensors.get("pos_embed", 0)
        if "reg_token" in tensors:
            first = int("cls_token" in tensors)
            registers = tensors["reg_token"].expand(len(x), -1, -1)
            x = torch.cat([x[:, :first], registers, x[:, first:]], 1)
        return self.norm(x, "norm_pre"), x.shape[1] - grid[0] * grid[1], grid

    def attended(self, x, name, where):
        split = (self.linear(x, f"{name}.{s}_proj").unflatten(-1, (self.heads, -1)) for s in "qkv")
        q, k, v = split
        if self.turns is not None:
            q, k = self.turns(q, *where), self.turns(k, *where)
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        average = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(-2)
        return self.linear(self.norm(average, f"{name}.norm"), f"{name}.proj")

    def mlp(self, x, name):
        act = ACTIVATIONS[self.activation]
        if f"{name}.fc1_g.weight" in self.tensors:
            hidden = act(self.linear(x, f"{name}.fc1_g")) * self.linear(x, f"{name}.fc1_x")
        else:
            hidden = act(self.linear(x, f"{name}.fc1"))
        return self.linear(self.norm(hidden, f"{name}.norm"), f"{name}.fc2")

    def linear(self, x, name):
        return functional.linear(
            x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        )

    def norm(self, x, name):
        """LayerNorm where the network has this one."""
        if f"{name}.weight" not in self.tensors:
            return x
        pair = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return functional.layer_norm(x, pair[0].shape, *pair, self.eps)
