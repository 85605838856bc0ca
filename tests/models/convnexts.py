"""ConvNeXts of toy size, their weights, and the same weights in the names of transformers."""

import functools

from flax import nnx
import jax
import numpy as np
import torch
import transformers

from fd_jax import model_folder
from fd_jax.models import sizes
from fd_jax.models.heads import Classifier
from fd_jax.models.spec import ModelSpec
from tests.convert import oracles

# 77 x 70 pixels have grids of 19 x 17, 9 x 8, 4 x 4 and 2 x 2: something is left over at every
# halving. Widths are no multiples of each other.
SHARED = {
    "image_size": [77, 70],
    "patch_size": 4,
    "widths": [8, 12, 20, 24],
    "depths": [1, 2, 4, 1],
    "kernel_size": 7,
    "activation": "gelu_erf",
    "norm_eps": 1e-6,
}
# transformers' classes have an epsilon of their own in the norm after pooling.
KINDS = {
    "v1": {"grn": False, "layer_scale": 1e-6, "final_norm": False, "final_norm_eps": 1e-12},
    "v2": {"grn": True, "layer_scale": None, "final_norm": False, "final_norm_eps": 1e-12},
    "dinov3": {"grn": False, "layer_scale": 1e-6, "final_norm": True, "final_norm_eps": None},
}
_CONFIGS = {
    "v1": transformers.ConvNextConfig,
    "v2": transformers.ConvNextV2Config,
    "dinov3": transformers.DINOv3ConvNextConfig,
}
MODELS = {
    "v1": transformers.ConvNextModel,
    "v2": transformers.ConvNextV2Model,
    "dinov3": transformers.DINOv3ConvNextModel,
}
CLASSIFIERS = {
    "v1": transformers.ConvNextForImageClassification,
    "v2": transformers.ConvNextV2ForImageClassification,
}


def spec(kind, *, pooling="mean_norm", classes=0, **arch):
    fields = {**SHARED, **KINDS[kind], **arch}
    return ModelSpec("convnext", fields, pooling=pooling, classes=classes, source="tiny")


def random_params(made, seed=0, dtype=np.float32):
    """Weights with nothing at its neutral start.

    What leaves the depthwise convolutions is so small that the epsilon of the norm after them
    counts.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        noise = rng.normal(size=leaf.shape)
        if name.endswith("dwconv/kernel"):
            return (0.002 * noise).astype(dtype)
        if name.endswith("dwconv/bias"):
            return (0.001 * noise).astype(dtype)
        if name.endswith("kernel"):
            return (noise / np.sqrt(np.prod(leaf.shape[:-1]))).astype(dtype)
        if name.endswith("scale") and "grn" not in name:
            return (1 + 0.1 * noise).astype(dtype)
        return (0.5 * noise).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, made.abstract()[1])


def head_params(made, seed=1):
    """A classifier head and its norm."""
    rng = np.random.default_rng(seed)
    width = made.arch["widths"][-1]
    draw = functools.partial(rng.normal, size=width)
    return {
        "fc_norm": {"scale": np.float32(1 + 0.1 * draw()), "bias": np.float32(draw())},
        "head": {
            "kernel": rng.normal(size=(width, made.classes)).astype(np.float32),
            "bias": rng.normal(size=made.classes).astype(np.float32),
        },
    }


def save(folder, kind, *, classes=0, **arch):
    """Writes a model folder with random weights, and with a classifier head if `classes` is set."""
    made = spec(kind, classes=classes, **arch)
    head = head_params(made) if classes else {}
    model_folder.save(folder, made, {"encoder": random_params(made), **head})
    return str(folder)


def bind(made, params, **runtime):
    return nnx.merge(made.abstract(**runtime)[0], params)


def classifier(made, params):
    """The head of a network, as tasks make it."""
    head = nnx.eval_shape(
        lambda: Classifier(
            made.arch["widths"][-1],
            made.classes,
            pooling=made.pooling,
            norm_eps=made.head_norm_eps,
            kernel_init=nnx.initializers.zeros_init(),
            rngs=nnx.Rngs(0),
        )
    )
    return nnx.merge(nnx.split(head)[0], params)


def pictures(made, count=2, seed=3, dtype=np.float32):
    shape = (count, *sizes.sides(made.arch["image_size"]), 3)
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def relative(got, want):
    want = np.asarray(want)
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


def config(kind, made, **fields):
    """The configuration of transformers."""
    arch = made.arch
    names = {"gelu_erf": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    common = {
        "hidden_sizes": arch["widths"],
        "depths": arch["depths"],
        "hidden_act": names[arch["activation"]],
        "layer_norm_eps": made.head_norm_eps,
        "drop_path_rate": 0.0,
        **fields,
    }
    if kind != "dinov3":
        common |= {"num_stages": len(arch["depths"]), "patch_size": arch["patch_size"]}
    return _CONFIGS[kind](**common)


def to_hf(kind, tree, arch):
    """Our tree of an encoder -> the names in a file. Works for parameters and for gradients."""
    renamed = _dinov3 if kind == "dinov3" else _convnext
    return {name: np.asarray(value) for name, value in renamed(tree, arch)}


def _convnext(tree, arch):
    yield from _conv("embeddings.patch_embeddings", tree["patch_embed"])
    yield from _norm("embeddings.layernorm", tree["patch_norm"])
    for s, depth in enumerate(arch["depths"]):
        stage, at = tree["stages"][str(s)], f"encoder.stages.{s}"
        if s:
            yield from _norm(f"{at}.downsampling_layer.0", stage["downsample"]["norm"])
            yield from _conv(f"{at}.downsampling_layer.1", stage["downsample"]["conv"])
        for b in range(depth):
            block, here = stage["blocks"][str(b)], f"{at}.layers.{b}"
            yield from _conv(f"{here}.dwconv", block["dwconv"])
            yield from _norm(f"{here}.layernorm", block["norm"])
            yield from _dense(f"{here}.pwconv1", block["mlp"]["fc1"])
            yield from _dense(f"{here}.pwconv2", block["mlp"]["fc2"])
            if "gamma" in block:
                yield f"{here}.layer_scale_parameter", block["gamma"]
            if "grn" in block["mlp"]:
                grn = block["mlp"]["grn"]
                yield f"{here}.grn.weight", np.reshape(grn["scale"], (1, 1, 1, -1))
                yield f"{here}.grn.bias", np.reshape(grn["bias"], (1, 1, 1, -1))


def _dinov3(tree, arch):
    for s, depth in enumerate(arch["depths"]):
        stage, at = tree["stages"][str(s)], f"stages.{s}"
        if s:
            yield from _norm(f"{at}.downsample_layers.0", stage["downsample"]["norm"])
            yield from _conv(f"{at}.downsample_layers.1", stage["downsample"]["conv"])
        else:
            yield from _conv(f"{at}.downsample_layers.0", tree["patch_embed"])
            yield from _norm(f"{at}.downsample_layers.1", tree["patch_norm"])
        for b in range(depth):
            block, here = stage["blocks"][str(b)], f"{at}.layers.{b}"
            yield from _conv(f"{here}.depthwise_conv", block["dwconv"])
            yield from _norm(f"{here}.layer_norm", block["norm"])
            yield from _dense(f"{here}.pointwise_conv1", block["mlp"]["fc1"])
            yield from _dense(f"{here}.pointwise_conv2", block["mlp"]["fc2"])
            yield f"{here}.gamma", block["gamma"]
    yield from _norm("layer_norm", tree["norm"])


def _conv(name, node):
    yield f"{name}.weight", np.transpose(node["kernel"], (3, 2, 0, 1))
    yield f"{name}.bias", node["bias"]


def _dense(name, node):
    yield f"{name}.weight", np.transpose(node["kernel"])
    yield f"{name}.bias", node["bias"]


def _norm(name, node):
    yield f"{name}.weight", node["scale"]
    yield f"{name}.bias", node["bias"]


def hf_model(kind, made, params, folder, *, norm=None):
    """transformers' model with these weights; no key missing, none left over.

    Args:
      norm: the norm after pooling, which V1 and V2 have beside the encoder; ones and zeros if None.
    """
    tensors = to_hf(kind, params, made.arch)
    if kind != "dinov3":
        width = made.arch["widths"][-1]
        tensors |= dict(
            _norm("layernorm", norm or {"scale": np.ones(width), "bias": np.zeros(width)})
        )
    return oracles.pretrained(MODELS[kind], config(kind, made), tensors, folder)


def hf_classifier(kind, made, params, head, folder):
    """transformers' classifier with these weights."""
    tensors = to_hf(kind, params, made.arch) | dict(_norm("layernorm", head["fc_norm"]))
    prefix = "convnext" if kind == "v1" else "convnextv2"
    tensors = {f"{prefix}.{name}": value for name, value in tensors.items()}
    tensors |= dict(_dense("classifier", head["head"]))
    fields = config(kind, made, num_labels=made.classes)
    return oracles.pretrained(CLASSIFIERS[kind], fields, tensors, folder)


def hf_tokens(kind, model, images):
    """The tokens of the last map, as the class of transformers gives its features. [B, N, D]"""

    def tokens(x):
        state = model(x).last_hidden_state
        return state[:, 1:] if kind == "dinov3" else state.flatten(2).transpose(1, 2)

    return oracles.run(tokens, images)


def hf_blocks(model, images):
    """What leaves each block, [B, N, D] each."""
    caught = []

    def keep(module, arguments, output):
        caught.append(output.flatten(2).transpose(1, 2).numpy())

    blocks = [m for name, m in model.named_modules() if type(m).__name__.endswith("Layer")]
    hooks = [block.register_forward_hook(keep) for block in blocks]
    oracles.run(lambda x: model(x).last_hidden_state, images)
    for hook in hooks:
        hook.remove()
    return caught


def torch_images(images):
    """[B, H, W, 3] -> torch [B, 3, H, W]."""
    return torch.from_numpy(np.moveaxis(images, -1, 1).copy())
