"""ResNets of toy size, their weights, and the same weights in the names of transformers."""

from flax import nnx
import jax
import numpy as np
import torch
import transformers

from fd_jax import model_folder, optimizer
from fd_jax.models import sizes
from fd_jax.models.spec import ModelSpec
from tests.convert import oracles
from tests.convert.exported import RESNET
from tests.reference import resnet

# 77 x 70 pixels have grids of 20 x 18, 10 x 9, 5 x 5 and 3 x 3: something is left over at every
# halving. Widths are no multiples of each other; four inner channels of 16 are what classes of
# other libraries assume.
SHARED = {**RESNET, "image_size": [77, 70], "stem_widths": [12]}
BASIC = {"bottleneck": False, "stride_at": "first", "inner_widths": SHARED["widths"]}
KINDS = {
    "v1.5": {},
    "v1": {"stride_at": "first"},
    # The first stage's input has its width, so that its shortcut is no convolution.
    "basic": {**BASIC, "stem_widths": [16]},
    "D": {"stem_widths": [6, 10, 12], "shortcut": "pooled", "activation": "silu"},
}
OF_TRANSFORMERS = ("v1.5", "v1", "basic")


def spec(kind="v1.5", *, pooling="mean", classes=0, **arch):
    fields = {**SHARED, **KINDS[kind], **arch}
    stages = len(fields["depths"])
    fields |= {name: fields[name][:stages] for name in ("widths", "inner_widths")}
    return ModelSpec("resnet", fields, pooling=pooling, classes=classes, source="tiny")


def random_params(made, seed=0, dtype=np.float32):
    """Weights with nothing at its neutral start; variances are so small that the epsilon counts."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, noise = optimizer.path_name(path), rng.normal(size=leaf.shape)
        if name.endswith("kernel"):
            return (0.03 * noise / np.sqrt(np.prod(leaf.shape[:-1]))).astype(dtype)
        if name.endswith("var"):
            return (1e-3 * np.exp(0.3 * noise)).astype(dtype)
        if name.endswith("mean"):
            return (0.01 * noise).astype(dtype)
        return (float(name.endswith("scale")) + 0.2 * noise).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, made.abstract()[1])


def bind(made, params, **runtime):
    return nnx.merge(made.abstract(**runtime)[0], params)


def pictures(made, count=2, seed=3, dtype=np.float32):
    shape = (count, *sizes.sides(made.arch["image_size"]), 3)
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def relative(got, want):
    want = np.asarray(want)
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


def flat(tree):
    return {optimizer.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def in_torch(made, params, images, *, training=False, dtype=torch.float32):
    """The plain PyTorch network with these weights: what it returns, its tensors and the run."""
    tensors = {
        name: torch.tensor(np.asarray(leaf), dtype=dtype) for name, leaf in flat(params).items()
    }
    for name, tensor in tensors.items():
        tensor.requires_grad_(not name.endswith(("/mean", "/var")))
    run = resnet.Run(made.arch, tensors, training=training)
    pixels = torch.tensor(np.moveaxis(images, -1, 1).copy(), dtype=dtype)
    return resnet.tokens(run(pixels)), tensors, run


def config(made, **fields):
    """The configuration of transformers."""
    arch = made.arch
    return transformers.ResNetConfig(
        embedding_size=arch["stem_widths"][0],
        hidden_sizes=arch["widths"],
        depths=arch["depths"],
        layer_type="bottleneck" if arch["bottleneck"] else "basic",
        downsample_in_bottleneck=arch["bottleneck"] and arch["stride_at"] == "first",
        **fields,
    )


def to_hf(params):
    """Our tree of an encoder -> the names in a file of transformers."""
    parts = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    found = {}
    for path, leaf in flat(params).items():
        *place, layer, part = path.split("/")
        if layer.startswith("patch_"):
            at = "embedder.embedder"
        else:
            at = f"encoder.stages.{place[1]}.layers.{place[3]}."
            at += f"layer.{place[5]}" if place[4] == "branch" else "shortcut"
        if part == "kernel":
            found[f"{at}.convolution.weight"] = np.transpose(leaf, (3, 2, 0, 1))
        else:
            found[f"{at}.normalization.{parts[part]}"] = leaf
            found[f"{at}.normalization.num_batches_tracked"] = np.zeros(())
    return found


def hf_model(made, params, folder):
    """transformers' model with these weights; no key missing, none left over."""
    return oracles.pretrained(transformers.ResNetModel, config(made), to_hf(params), folder)


def hf_tokens(model, images):
    """The tokens of the last map. [B, N, D]"""
    return oracles.run(lambda x: model(x).last_hidden_state.flatten(2).transpose(1, 2), images)


def save(folder, kind="v1.5", *, classes=0, **arch):
    """Writes a model folder with random weights, and with a classifier head if `classes` is set."""
    made = spec(kind, classes=classes, **arch)
    rng = np.random.default_rng(1)
    width = made.arch["widths"][-1]
    head = {
        "kernel": rng.normal(size=(width, classes)).astype(np.float32),
        "bias": rng.normal(size=classes).astype(np.float32),
    }
    parts = {"encoder": random_params(made), **({"head": head} if classes else {})}
    model_folder.save(folder, made, parts)
    return str(folder)
