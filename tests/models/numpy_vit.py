"""A vision transformer in plain numpy, float64: loops that spell out what patches there are.

It always runs over all patches of the image; those that are not kept are hidden from attention.
"""

import math

import numpy as np

ERF = np.vectorize(math.erf)


def forward(params, arch, images, *, keep=None, places=None):
    """Tokens after the final norm, [B, prefix + P, D].

    Args:
      params: nested dict of a network of `fd_jax.models.vit`.
      arch: its architecture.
      images: [B, H, W, 3].
      keep: [B, P] patches that others can see and that are returned; None for all.
      places: [B, P] where these patches are taken to be; `keep` if not given.
    """
    height, width = (side // arch["patch_size"] for side in images.shape[1:3])
    every = np.arange(height * width)
    if keep is None:
        keep = np.tile(every, (len(images), 1))
    places = keep if places is None else places
    params = _wide(params)
    rows = []
    for image, kept, there in zip(images, keep, places, strict=True):
        place = every.copy()
        place[kept] = there
        rows.append(_one(params, arch, image.astype(np.float64), kept, place, width, height))
    return np.stack(rows)


def _one(params, arch, image, kept, place, width, height):
    p = arch["patch_size"]
    patches = [
        image[r * p : (r + 1) * p, c * p : (c + 1) * p].reshape(-1)
        for r in range(height)
        for c in range(width)
    ]
    kernel = params["patch_embed"]["kernel"].reshape(-1, arch["width"])
    x = np.stack(patches) @ kernel + params["patch_embed"]["bias"]
    cls, registers = int(arch["cls_token"]), arch["registers"]
    if "pos_embed" in params:
        x = x + params["pos_embed"][0, cls:][place]
    first = []
    if cls:
        token = params["cls_token"][0]
        first.append(token + params["pos_embed"][0, :1] if "pos_embed" in params else token)
    if registers:
        first.append(params["register_tokens"][0])
    x = np.concatenate([*first, x])
    prefix = cls + registers
    seen = np.concatenate([np.ones(prefix, bool), np.isin(np.arange(height * width), kept)])
    where = [None] * prefix + [divmod(int(spot), width) for spot in place]
    for index in range(arch["depth"]):
        block = params["blocks"][str(index)]
        table = block["attn"].get("rel_pos_bias", params.get("rel_pos_bias"))
        table = None if table is None else table["table"]
        attended = _attention(
            block["attn"], arch, _norm(block["norm1"], x, arch), where, seen, table, height, width
        )
        x = x + attended * block.get("gamma_1", 1.0)
        hidden = _dense(block["mlp"]["fc1"], _norm(block["norm2"], x, arch))
        hidden = hidden * (1 + ERF(hidden / math.sqrt(2))) / 2
        x = x + _dense(block["mlp"]["fc2"], hidden) * block.get("gamma_2", 1.0)
    x = _norm(params["norm"], x, arch) if "norm" in params else x
    return np.concatenate([x[:prefix], x[prefix:][kept]])


def _attention(attn, arch, x, where, seen, table, height, width):
    heads = arch["heads"]
    kernel = attn["qkv"]["kernel"]
    q, k, v = (
        (x @ kernel[:, i] + attn.get(f"{name}_bias", 0.0)).reshape(len(x), heads, -1)
        for i, name in enumerate("qkv")
    )
    if arch["position"] == "rope":
        q, k = (_rotated(part, where, height, width, arch["rope_theta"]) for part in (q, k))
    logits = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    if table is not None:
        for i, query in enumerate(where):
            for j, key in enumerate(where):
                logits[:, i, j] += table[_table_row(query, key, height, width)]
    logits = np.where(seen, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return _dense(attn["proj"], np.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1))


def _table_row(query, key, height, width):
    pairs = (2 * height - 1) * (2 * width - 1)
    if query is None:
        return pairs + 2 if key is None else pairs
    if key is None:
        return pairs + 1
    down, right = query[0] - key[0] + height - 1, query[1] - key[1] + width - 1
    return down * (2 * width - 1) + right


def _rotated(x, where, height, width, theta):
    """Pairs of channels (i, i + d/2) as complex numbers; the first half of them turns by rows."""
    half = x.shape[-1] // 2
    numbers = x[..., :half] + 1j * x[..., half:]
    periods = theta ** (np.arange(half // 2) / (half // 2))
    for token, place in enumerate(where):
        if place is not None:
            row, column = 2 * (place[0] + 0.5) / height - 1, 2 * (place[1] + 0.5) / width - 1
            angles = 2 * np.pi * np.concatenate([row / periods, column / periods])
            numbers[token] *= np.exp(1j * angles)
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


def _norm(norm, x, arch):
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + arch["norm_eps"])
    return centred / deviation * norm["scale"] + norm["bias"]


def _dense(dense, x):
    return x @ dense["kernel"] + dense["bias"]


def _wide(tree):
    if isinstance(tree, dict):
        return {name: _wide(value) for name, value in tree.items()}
    return np.asarray(tree, np.float64)
