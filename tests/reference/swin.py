"""Swin V1 and V2 in plain torch, written from the papers' formulas with slow, simple loops.

It covers what transformers' classes do not: a table for a window that the grid clips (V1), one bias
network per stage, extra norms on the main branch (V2). Tensors have the names of official
checkpoint files. Everything is computed in their dtype and is differentiable.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F


def forward(tensors, arch, images, *, version, final_norm=True):
    """Features after every block, and of the whole network.

    Args:
      tensors: torch tensors by their names in Microsoft's files.
      arch: architecture keywords.
      images: [B, 3, H, W] torch tensor.
      version: 1 or 2.
      final_norm: whether the final norm is applied.

    Returns:
      ([B, N, D] after each block, [B, N, D] of the network).
    """

    def norm(x, name):
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, arch["norm_eps"])

    x = F.conv2d(
        images,
        tensors["patch_embed.proj.weight"],
        tensors["patch_embed.proj.bias"],
        stride=arch["patch_size"],
    )
    grid = x.shape[-1]
    x = norm(x.flatten(2).transpose(1, 2), "patch_embed.norm")
    after_blocks = []
    for stage, depth in enumerate(arch["depths"]):
        for block in range(depth):
            x = one_block(tensors, arch, x, norm, stage, block, grid, version)
            after_blocks.append(x)
        if stage + 1 < len(arch["depths"]):
            x = merge(tensors, x, norm, f"layers.{stage}.downsample", grid, version)
            grid //= 2
    return after_blocks, norm(x, "norm") if final_norm else x


def one_block(tensors, arch, x, norm, stage, block, grid, version):
    at = f"layers.{stage}.blocks.{block}"
    window = min(arch["window"], grid)
    shift = arch["window"] // 2 if block % 2 == 1 and grid > arch["window"] else 0
    heads = arch["heads"][stage]
    bias = position_bias(tensors, arch, stage, block, window, version)

    def attention(y):
        out = torch.zeros_like(y)
        rolled = [(r, c) for r in range(grid) for c in range(grid)]
        # A position of the rolled grid has the token that is `shift` rows down and columns right.
        token = {(r, c): ((r + shift) % grid) * grid + (c + shift) % grid for r, c in rolled}
        for top in range(0, grid, window):
            for left in range(0, grid, window):
                places = [(top + i, left + j) for i in range(window) for j in range(window)]
                rows = torch.tensor([token[place] for place in places])
                mask = region_mask(places, grid, window, shift).to(y)
                out[:, rows] = attend(
                    tensors, f"{at}.attn", y[:, rows], heads, bias + mask, version
                )
        return out

    def mlp(y):
        hidden = F.gelu(linear(tensors, f"{at}.mlp.fc1", y))
        return linear(tensors, f"{at}.mlp.fc2", hidden)

    if version == 1:
        x = x + attention(norm(x, f"{at}.norm1"))
        return x + mlp(norm(x, f"{at}.norm2"))
    x = x + norm(attention(x), f"{at}.norm1")
    x = x + norm(mlp(x), f"{at}.norm2")
    every = arch["extra_norm_every"]
    return norm(x, f"{at}.enorm") if every and (block + 1) % every == 0 else x


def region_mask(places, grid, window, shift):
    if not shift:
        return torch.zeros(len(places), len(places))

    def region(i):
        return 0 if i < grid - window else 1 if i < grid - shift else 2

    labels = [(region(r), region(c)) for r, c in places]
    return torch.tensor([[0.0 if a == b else -100.0 for b in labels] for a in labels])


def attend(tensors, at, x, heads, bias, version):
    batch, tokens, width = x.shape
    bias_vector = tensors.get(f"{at}.qkv.bias")
    if version == 2:
        q_bias, v_bias = tensors[f"{at}.q_bias"], tensors[f"{at}.v_bias"]
        bias_vector = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    qkv = F.linear(x, tensors[f"{at}.qkv.weight"], bias_vector)
    q, k, v = qkv.reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    if version == 1:
        logits = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
    else:
        scale = torch.clamp(tensors[f"{at}.logit_scale"], max=math.log(100)).exp()
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) * scale
    out = (logits + bias).softmax(-1) @ v
    return linear(tensors, f"{at}.proj", out.transpose(1, 2).reshape(batch, tokens, width))


def position_bias(tensors, arch, stage, block, window, version):
    """Position bias of a window. -> [A, N, N]"""
    at = f"layers.{stage}.blocks.{block}.attn"
    places = [(r, c) for r in range(window) for c in range(window)]
    offsets = [[(a[0] - b[0], a[1] - b[1]) for b in places] for a in places]
    if version == 1:
        table = tensors[f"{at}.relative_position_bias_table"]
        side = 2 * window - 1
        rows = [[(r + window - 1) * side + c + window - 1 for r, c in line] for line in offsets]
        return table[torch.tensor(rows)].permute(2, 0, 1)
    if arch["position"] == "shared_rpb":
        at = f"layers.{stage}.rel_pos_bias"
    reach = (arch["pretrained_windows"][stage] or window) - 1
    v = 8 * torch.tensor(offsets).to(tensors[f"{at}.rpe_mlp.0.weight"]) / max(reach, 1)
    coordinates = torch.sign(v) * torch.log2(v.abs() + 1) / np.log2(8)
    hidden = F.relu(linear(tensors, f"{at}.rpe_mlp.0", coordinates))
    out = F.linear(hidden, tensors[f"{at}.rpe_mlp.2.weight"])
    return 16 * torch.sigmoid(out).permute(2, 0, 1)


def merge(tensors, x, norm, at, grid, version):
    batch, _, width = x.shape
    x = x.reshape(batch, grid, grid, width)
    corners = [x[:, r::2, c::2] for c in (0, 1) for r in (0, 1)]
    x = torch.cat(corners, -1).reshape(batch, -1, 4 * width)
    reduction = tensors[f"{at}.reduction.weight"]
    if version == 1:
        return F.linear(norm(x, f"{at}.norm"), reduction)
    return norm(F.linear(x, reduction), f"{at}.norm")


def linear(tensors, name, x):
    return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
