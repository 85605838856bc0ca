"""Synthetic weight files of exactly the structure of the public ones.

`structures/*.json` lists, per source, the container and every tensor: "blocks.{i}.x" stands for as
many names as its count says. Values are random; files can be shrunk by a table of sizes.
"""

import argparse
import contextlib
import dataclasses
import json
import math
from pathlib import Path
import re
import sys
import types

import numpy as np

from fd_jax.convert import families
from fd_jax.convert.families import siglip2
from fd_jax.convert.source import Source

# Tests put shrunk sources into the registry; here the real ones are meant.
REAL = dict(families.SOURCES)
STRUCTURES = Path(__file__).parent / "structures"
SMALL = {"width": 32, "depth": 2, "heads": 2, "mlp_width": 128, "patch_size": 4}


@dataclasses.dataclass(frozen=True)
class Structure:
    """A container and its trees ("model", "" for the file itself): name -> shape and dtype.

    `arch` is that of the source's first part, at the size of the trees.
    """

    source: str
    arch: dict
    container: str
    extra: tuple[str, ...]
    trees: dict[str, dict[str, tuple[tuple[int, ...], str]]]


def names():
    """All sources there is a structure of."""
    return sorted(path.stem for path in STRUCTURES.glob("*.json"))


def structure(name, *, small=True, variant=None, optional=False) -> Structure:
    """Reads a structure, shrunk to `SMALL` unless told otherwise."""
    raw = json.loads((STRUCTURES / f"{name}.json").read_text())
    spec = _spec(REAL[name])
    arch = small_arch(spec) if small else spec.arch
    vit = spec.family == "vit"
    shrink = _vit_shrinker(REAL[name], small) if vit else _swin_shrinker(spec.arch, arch)
    trees = dict(raw["trees"])
    if variant is not None:
        trees[""] = raw["variants"][variant]
    if optional:
        trees[""] = trees[""] | raw["optional"]
    expanded = {}
    for tree, tensors in trees.items():
        expanded[tree] = {}
        for template, (count, shape, dtype) in tensors.items():
            for i in range(count or 1):
                found = shrink(template.replace("{i}", str(i)), i, shape)
                if found is not None:
                    expanded[tree][found[0]] = tuple(found[1]), dtype
    return Structure(name, arch, raw["container"], tuple(raw["extra"]), expanded)


def _spec(source):
    return source.parts[source.default_part].spec


def small_arch(spec):
    """The same network, small: grid 3, or 5 where positions are stored for 518 pixels."""
    arch = spec.arch
    if spec.family != "vit":
        return _small_swin(arch)
    grid = 5 if arch["image_size"] == 518 else 4 if arch["image_size"] == 336 else 3
    return {**arch, **SMALL, "image_size": grid * SMALL["patch_size"]}


def _small_swin(arch):
    """Grids 16, 8, 4, 2, under windows that shift, fit and are clipped in the stages they were.

    The giant keeps a norm on the main branch in the third stage alone.
    """
    last = arch["image_size"] // arch["patch_size"] // 8
    small = {
        **arch,
        "image_size": 64,
        "embed_width": 8,
        "heads": [2, 4, 8, 16],
        "window": 2 if arch["window"] == last else 4,
        "depths": [2, 1, 1, 1],
    }
    if "windows_at" in arch:
        small["windows_at"] = small["image_size"]
    if arch.get("extra_norm_every"):
        small |= {"extra_norm_every": 2, "depths": [1, 1, 2, 1]}
    if any(arch.get("pretrained_windows", ())):
        small["pretrained_windows"] = [6, 6, 6, 3]
    return small


def _vit_shrinker(source, small):
    sizes = _sizes(source)

    def shrink(name, block, shape):
        if not small:
            return name, shape
        return None if block >= SMALL["depth"] else (name, [_shrunk(n, sizes) for n in shape])

    return shrink


def _swin_shrinker(full, small):
    """Names and shapes of the small network, from those of the full one and their meaning."""
    factor = full["embed_width"] // small["embed_width"]
    classes = {1000: 5, 21841: 5, 65536: 8} if factor > 1 else {}

    def shrink(name, _, shape):
        if "enorm" in name:  # the norm's block is the last of as many
            name = re.sub(r"blocks\.(\d+)", lambda at: f"blocks.{_renumbered(int(at[1]))}", name)
        at = re.search(r"layers\.(\d+)\.(?:blocks\.(\d+)\.)?(.*)", name)
        if at is None:
            return name, [n if n <= 4 else classes.get(n, n // factor) for n in shape]
        stage, leaf = int(at[1]), at[3]
        if at[2] is not None and int(at[2]) >= small["depths"][stage]:
            return None
        grid = small["image_size"] // small["patch_size"] >> stage
        side = min(small["window"], grid)
        heads, offsets = small["heads"][stage], 2 * side - 1
        for ending, size in {
            "relative_position_index": [side**2, side**2],
            "relative_coords_table": [1, offsets, offsets, 2],
            "relative_position_bias_table": [offsets**2, heads],
            "attn_mask": [(grid // side) ** 2, side**2, side**2],
            "logit_scale": [heads, 1, 1],
            "mlp.0.weight": [512, 2],
            "mlp.0.bias": [512],
            "mlp.2.weight": [heads, 512],
        }.items():
            if leaf.endswith(ending):
                return name, size
        return name, [n if n <= 4 else n // factor for n in shape]

    def _renumbered(block):
        every = full["extra_norm_every"]
        return (block + 1) // every * small["extra_norm_every"] - 1

    return shrink


def small_source(name) -> Source:
    """The source for shrunk files."""
    source = REAL[name]
    parts = {}
    for key, part in source.parts.items():
        table = part.table
        if name.endswith("_bigvision"):  # the number of heads stands in the table
            table = siglip2.big_vision(SMALL["heads"])
        spec = dataclasses.replace(part.spec, arch=small_arch(part.spec))
        parts[key] = dataclasses.replace(part, table=table, spec=spec)
    return dataclasses.replace(source, parts=parts)


def _sizes(source: Source) -> dict[int, int]:
    sizes: dict[int, int] = {1000: 5}
    for part in source.parts.values():
        full, small = (_measures(arch) for arch in (part.spec.arch, small_arch(part.spec)))
        for before, after in zip(full, small, strict=True):
            assert sizes.setdefault(before, after) == after, (before, after, sizes)
    return sizes


def _measures(arch):
    width, heads = arch["width"], arch["heads"]
    grid = arch["image_size"] // arch["patch_size"]
    table = (2 * grid - 1) ** 2 + 3
    head = width // heads
    return [
        width,
        3 * width,
        arch["mlp_width"],
        heads,
        head,
        arch["patch_size"],
        grid**2,
        grid**2 + 1,
        table,
        *([head // 4] if arch["position"] == "rope" else []),
    ]


def _shrunk(size, sizes):
    return sizes.get(size, size if size <= 4 else 8)


def values(given: Structure, seed=0) -> dict[str, dict[str, np.ndarray]]:
    """Random values per tree; what follows from the architecture has its true value."""
    rng = np.random.default_rng(seed)
    return {
        tree: {
            name: value(rng, name, shape, dtype, given.arch)
            for name, (shape, dtype) in tensors.items()
        }
        for tree, tensors in given.trees.items()
    }


def value(rng, name, shape, dtype, arch):
    """Random, at the scale of a trained network; the true value of what the architecture gives."""
    if name.endswith("relative_position_index") and "layers." in name:
        return window_index(math.isqrt(shape[0]))
    if name.endswith("attn_mask"):
        return shift_mask(math.isqrt(shape[0]), shape[1])
    if name.endswith("relative_coords_table"):
        stage = int(re.search(r"layers\.(\d+)", name)[1])
        return coordinates((shape[1] + 1) // 2, arch["pretrained_windows"][stage])
    if name.endswith("relative_position_index"):
        return _beit_index(math.isqrt(shape[0] - 1))
    if dtype == "int64":
        return np.full(shape, 224, np.int64)
    if name.endswith("qkv.bias_mask"):
        return np.repeat(np.float32([1, 0, 1]), shape[0] // 3)
    if name.endswith("periods"):
        count = shape[0]
        return (100.0 ** (2 * np.arange(count) / (2 * count))).astype(np.float32)
    noise = np.asarray(rng.standard_normal(shape), dtype)
    if name.endswith("logit_scale") and len(shape) == 3:
        # Near its start of log 10: at the clamp of log 100 logits reach the mask's -100, which
        # transformers adds twice.
        return (2.3 + 0.3 * noise).astype(dtype)
    if len(shape) == 1 and name.endswith(
        ("weight", "scale", "gamma", "gamma_1", "gamma_2", "lambda1")
    ):
        return (1 + 0.2 * noise).astype(dtype)
    fan_in = math.prod(shape[1:]) if len(shape) in (2, 4) else 4
    if name.endswith("kernel"):  # flax: inputs first, perhaps behind the block number
        fan_in = 32
    return np.asarray(noise / np.sqrt(max(fan_in, 1)), dtype)


def window_index(side):
    """Swin's construction, with meshgrid."""
    coords = np.stack(np.meshgrid(range(side), range(side), indexing="ij")).reshape(2, -1)
    relative = (coords[:, :, None] - coords[:, None]).transpose(1, 2, 0) + side - 1
    relative[:, :, 0] *= 2 * side - 1
    return relative.sum(-1).astype(np.int64)


def shift_mask(count, area):
    """Swin's construction for `count` windows a side, with slices."""
    window = math.isqrt(area)
    grid = count * window
    labels = np.zeros((grid, grid))
    cuts = (slice(0, -window), slice(-window, -(window // 2)), slice(-(window // 2), None))
    for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
        labels[rows, columns] = number
    labels = labels.reshape(count, window, count, window).transpose(0, 2, 1, 3).reshape(-1, area)
    return np.where(labels[:, None] != labels[:, :, None], -100, 0).astype(np.float32)


def coordinates(side, pretrained):
    """SwinV2's construction, in float32."""
    axis = np.arange(1 - side, side, dtype=np.float32)
    table = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)[None]
    table = table / np.float32(max((pretrained or side) - 1, 1)) * np.float32(8)
    return np.sign(table) * np.log2(np.abs(table) + np.float32(1)) / np.log2(np.float32(8))


def _beit_index(grid):
    """BEiT's construction: Swin's, and three rows for the class token."""
    count = (2 * grid - 1) ** 2
    index = np.zeros((grid * grid + 1,) * 2, np.int64)
    index[1:, 1:] = window_index(grid)
    index[0, 0:], index[0:, 0], index[0, 0] = count, count + 1, count + 2
    return index


def write(given: Structure, arrays, folder: Path) -> Path:
    """Writes the file with its container, nesting, extra entries and classes."""
    if given.container == "npz":
        np.savez(folder / "weights.npz", **arrays[""])
        return folder / "weights.npz"
    if given.container == "safetensors":
        from safetensors.numpy import save_file

        save_file(arrays[""], folder / "model.safetensors", {"format": "pt"})
        return folder / "model.safetensors"
    if given.container == "torchscript":
        return write_torchscript(arrays[""], folder / "model.pt")
    return write_torch(given, arrays, folder / "model.pth")


def write_torch(given: Structure, arrays, path: Path, **options) -> Path:
    """A `torch.save` file; `options` go to it."""
    import torch

    tree = {}
    for key, tensors in arrays.items():
        torched = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
        if key == "":
            tree.update(torched)
        else:
            tree[key] = torched
    with foreign_class("yacs.config", "CfgNode", dict) as cfg_node:
        for entry in given.extra:
            tree[entry.split(":")[0]] = _extra(entry, cfg_node)
        torch.save(tree, path, **options)
    return path


def _extra(entry, cfg_node):
    import torch

    moments = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    if entry.endswith("CfgNode"):
        node = cfg_node(NAME="vit")
        node.__dict__["__immutable__"] = True
        outer = cfg_node(MODEL=node, EPOCHS=300, BASE=[""])
        outer.__dict__.update(__deprecated_keys__=set(), __renamed_keys__={}, __new_allowed__=False)
        return outer
    return {
        "args:argparse.Namespace": argparse.Namespace(arch="vit_base", lr=1e-3, betas=(0.9, 0.95)),
        "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "lr_scheduler": {"base_values": [1e-3], "metric": None, "noise_range_t": None},
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7},
        "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7},
        "max_accuracy": 84.9,
        "epoch": 299,
    }[entry]


@contextlib.contextmanager
def foreign_class(module, name, base):
    """A class of a package that is not installed, importable only inside the block."""
    made = type(name, (base,), {"__module__": module})
    inserted = []
    for depth in range(1, module.count(".") + 2):
        path = ".".join(module.split(".")[:depth])
        if path not in sys.modules:
            sys.modules[path] = types.ModuleType(path)
            inserted.append(path)
    setattr(sys.modules[module], name, made)
    try:
        yield made
    finally:
        for path in inserted:
            del sys.modules[path]


def write_torchscript(arrays, path: Path) -> Path:
    """A scripted module whose state dict has exactly the given names, as OpenAI ships CLIP."""
    import torch

    root = torch.nn.Module()
    for name, value in arrays.items():
        *parents, leaf = name.split(".")
        node = root
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, torch.nn.Module())
            node = getattr(node, parent)
        tensor = torch.from_numpy(np.array(value))
        if tensor.is_floating_point():
            node.register_parameter(leaf, torch.nn.Parameter(tensor))
        else:
            node.register_buffer(leaf, tensor)
    torch.jit.save(torch.jit.script(root), path)
    return path
