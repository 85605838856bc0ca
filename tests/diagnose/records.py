"""Records of small made-up models, with every figure that is defined for them."""

import copy

import numpy as np

GRID = (3, 4)
LONG = "_clip_vit_large_patch14_distilled_imagenet_300_epochs_shared_rpb_drop_path_0.1_seed_{}"


def about(family, heads, grids, *, patch=8, prefix=1, window=None):
    return {
        "family": family,
        "source": "made up",
        "layers": len(heads),
        "heads": heads,
        "grid": [list(grid) for grid in grids],
        "patch": [patch] * len(heads),
        "prefix": prefix,
        "window": [window] * len(heads),
    }


def attention(rng, tokens):
    """A map with a diagonal, columns and noise. -> [tokens, tokens]."""
    weights = np.eye(tokens) + rng.random(tokens) + 0.1 * rng.random((tokens, tokens))
    return weights / weights.sum(1, keepdims=True)


def statistics(rng, heads, tokens):
    """What every model has: numbers by layer and head, and maps."""
    layers = len(heads)
    return {
        "distance": [(50 * rng.random(count)).tolist() for count in heads],
        "dropped": [(0.3 * rng.random(count)).tolist() for count in heads],
        "similarity": rng.random(layers).tolist(),
        "entropy": [(5 * rng.random(count)).tolist() for count in heads],
        "divergence": rng.random(layers).tolist(),
        "maps": [attention(rng, count).tolist() for count in tokens],
        "shares": {"offset": rng.random(layers).tolist(), "key": rng.random(layers).tolist()},
        "rank": (100 * rng.random(layers)).tolist(),
    }


def landscape(rng, directions=2, points=5):
    position = np.linspace(-1, 1, points)
    slopes = 1 + rng.random((directions, 1))
    return {
        "position": position.tolist(),
        "loss": (0.5 + slopes * position**2).tolist(),
        "accuracy": (0.9 - 0.2 * slopes * position**2).tolist(),
        "tables": "zeroed",
        "augmentation": "none (evaluation transform)",
    }


def vit(seed, layers=3, heads=4, grid=GRID, prefix=1):
    rng = np.random.default_rng(seed)
    tokens = grid[0] * grid[1]
    return {
        "about": about("vit", [heads] * layers, [grid] * layers, prefix=prefix),
        **statistics(rng, [heads] * layers, [tokens] * layers),
        "class_row": rng.dirichlet(np.ones(tokens), layers).tolist(),
        "class_column": rng.dirichlet(np.ones(tokens), layers).tolist(),
        "landscape": landscape(rng),
        "pca": rng.random((*grid, 3)).tolist(),
        "rollout": rng.random(grid).tolist(),
        "heads": rng.random((heads, *grid)).tolist(),
        "picture": {"name": "cat.jpg", "layer": layers - 1, "query": "class"},
    }


def swin(seed):
    """Layers with different numbers of heads, and maps of a window rather than of the grid."""
    rng = np.random.default_rng(seed)
    heads = [2, 2, 4]
    model = {
        "about": about("swin", heads, [(8, 8), (8, 8), (4, 4)], prefix=0, window=2),
        **statistics(rng, heads, [4, 4, 4]),
    }
    model["dropped"] = [[0.0] * count for count in heads]
    return model


def record(models=None):
    """The content of a figures.json, of a ViT before and after and of a Swin."""
    rng = np.random.default_rng(7)
    models = models or {"clip": vit(0), "student": vit(1), "swin": swin(2)}
    first, second, *others = models
    layers = min(model["about"]["layers"] for model in models.values())
    pairs = [
        {
            "models": [first, second],
            "cka": rng.random(layers).tolist(),
            "rows": "patches",
            "cosine": rng.random(layers).tolist(),
        },
        # Of different widths, so that there is no cosine.
        *(
            {"models": [first, other], "cka": rng.random(layers).tolist(), "rows": "images"}
            for other in others
        ),
    ]
    pixels = rng.integers(0, 256, (24, 32, 3))
    return {
        "version": 1,
        "command": ["python", "-m", "fd_jax.diagnose", *(f"--model={name}" for name in models)],
        "data": "digits/test",
        "images": 512,
        "image_size": [24, 32],
        "settings": {"normalize": "patches", "compare": "rows", "transform": "centre crop"},
        "models": models,
        "pairs": pairs,
        "picture": {"name": "cat.jpg", "pixels": pixels.tolist()},
    }


def large(layers=24):
    """Four models with many heads and long names, two of which differ little."""
    deep = {"layers": layers, "heads": 16, "grid": (4, 4)}
    return record(
        {
            LONG.format(0): vit(0, **deep),
            LONG.format(1): vit(1, **deep),
            "esvit <swin_tiny> & $t$": swin(2),
            "dino": vit(3, layers=layers // 2, heads=12),
        }
    )


# Where a record holds the numbers of a figure, if not in a list of its own name.
PLACES = {"shares": ("shares", "key"), "landscape": ("landscape", "accuracy")}


def changed(record, name):
    """A copy of a record in which one number of a figure is another one."""
    other = copy.deepcopy(record)
    holder = other["pairs"][0] if name in ("cka", "cosine") else other["models"]["clip"]
    values = holder
    for key in PLACES.get(name, (name,)):
        values = values[key]
    while isinstance(values[1], list):
        values = values[1]
    values[1] *= 0.5
    return other
