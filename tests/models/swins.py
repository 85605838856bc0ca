"""Swin networks of toy size, their weights, and the same weights in other libraries' names."""

from flax import nnx
import jax
import numpy as np
import torch
import transformers

from fd_jax.models.spec import ModelSpec
from tests.convert import oracles
from tests.reference import swin as reference

# Grids 16, 8, 4 under windows of 4: two stages shift, the last one is a single window.
SHARED = {
    "image_size": 32,
    "patch_size": 2,
    "embed_width": 16,
    "depths": [2, 2, 1],
    "heads": [2, 4, 8],
    "window": 4,
    "mlp_ratio": 2,
    "activation": "gelu_erf",
    "norm_eps": 1e-5,
    "final_norm": True,
}
ONLY_V2 = {
    "position": "rpb",
    "pretrained_windows": [0, 0, 0],
    "residual_scale": 1.0,  # at the original's 1e-5 no test would see a block
    "extra_norm_every": 0,
}


def spec(version, **arch):
    only = ONLY_V2 if version == 2 else {}
    return ModelSpec("swin" if version == 1 else "swin_v2", {**SHARED, **only, **arch})


def own_params(made, seed=0):
    """The network's own initialisation, as numpy."""
    state = nnx.split(made.build(rngs=nnx.Rngs(seed)))[1]
    return jax.tree.map(np.asarray, nnx.to_pure_dict(state))


def random_params(made, seed=0, dtype=np.float32):
    """Weights at a trained network's scale, with nothing at its neutral start."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        noise = rng.normal(size=leaf.shape)
        if name.endswith("logit_scale"):  # some heads above the clamp of log 100
            return (3.5 + 2 * noise).astype(dtype)
        if name.endswith("/scale"):
            return (1 + 0.1 * noise).astype(dtype)
        if name.endswith("kernel"):
            fan_in = np.prod(leaf.shape[:-1]) if "patch" in name else leaf.shape[0]
            return (noise / np.sqrt(fan_in)).astype(dtype)
        return (0.3 * noise).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, made.abstract()[1])


def bind(made, params, **runtime):
    return nnx.merge(made.abstract(**runtime)[0], params)


def pictures(made, count, seed=3, dtype=np.float32):
    size = made.arch["image_size"]
    return np.random.default_rng(seed).normal(size=(count, size, size, 3)).astype(dtype)


def relative(got, want):
    want = np.asarray(want)
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


def to_official(tree, arch):
    """Our tree -> Microsoft's names, the bias network by the original's name rpe_mlp."""
    out = {}

    def put(name, value):
        out[name] = np.asarray(value)

    def norm(name, node):
        put(f"{name}.weight", node["scale"])
        put(f"{name}.bias", node["bias"])

    def dense(name, node):
        put(f"{name}.weight", np.transpose(node["kernel"]))
        if "bias" in node:
            put(f"{name}.bias", node["bias"])

    def network(name, node):
        dense(f"{name}.rpe_mlp.0", node["fc1"])
        dense(f"{name}.rpe_mlp.2", node["fc2"])

    put("patch_embed.proj.weight", np.transpose(tree["patch_embed"]["kernel"], (3, 2, 0, 1)))
    put("patch_embed.proj.bias", tree["patch_embed"]["bias"])
    norm("patch_embed.norm", tree["patch_norm"])
    for s, depth in enumerate(arch["depths"]):
        stage = tree["stages"][str(s)]
        if "rel_pos_bias" in stage:
            network(f"layers.{s}.rel_pos_bias", stage["rel_pos_bias"])
        for b in range(depth):
            block, at = stage["blocks"][str(b)], f"layers.{s}.blocks.{b}"
            attn = block["attn"]
            for name in ("norm1", "norm2"):
                norm(f"{at}.{name}", block[name])
            if "extra_norm" in block:
                norm(f"{at}.enorm", block["extra_norm"])
            kernel = np.asarray(attn["qkv"]["kernel"])
            put(f"{at}.attn.qkv.weight", kernel.reshape(len(kernel), -1).T)
            if "k_bias" in attn:
                rows = [np.asarray(attn[name]) for name in ("q_bias", "k_bias", "v_bias")]
                put(f"{at}.attn.qkv.bias", np.concatenate(rows))
                put(f"{at}.attn.relative_position_bias_table", attn["rel_pos_bias"]["table"])
            else:
                put(f"{at}.attn.q_bias", attn["q_bias"])
                put(f"{at}.attn.v_bias", attn["v_bias"])
                put(f"{at}.attn.logit_scale", np.asarray(attn["logit_scale"])[:, None, None])
                if "rel_pos_bias" in attn:
                    network(f"{at}.attn", attn["rel_pos_bias"])
            dense(f"{at}.attn.proj", attn["proj"])
            dense(f"{at}.mlp.fc1", block["mlp"]["fc1"])
            dense(f"{at}.mlp.fc2", block["mlp"]["fc2"])
        if "downsample" in stage:
            dense(f"layers.{s}.downsample.reduction", stage["downsample"]["reduction"])
            norm(f"layers.{s}.downsample.norm", stage["downsample"]["norm"])
    if "norm" in tree:
        norm("norm", tree["norm"])
    return out


def to_hf(official):
    """Microsoft's names -> those of transformers' files. Splits qkv."""
    renames = (
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ("patch_embed.norm", "embeddings.norm"),
        ("layers.", "encoder.layers."),
        (".blocks.", ".blocks."),
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
        (".attn.proj.", ".attention.output.dense."),
        (".attn.rpe_mlp.", ".attention.self.continuous_position_bias_mlp."),
        (".attn.q_bias", ".attention.self.query.bias"),
        (".attn.v_bias", ".attention.self.value.bias"),
        (".attn.", ".attention.self."),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
    )
    out = {}
    for name, value in official.items():
        new = f"layernorm.{name[5:]}" if name.startswith("norm.") else name
        for old, text in renames:
            new = new.replace(old, text)
        if ".self.qkv." in new:
            rows = zip(("query", "key", "value"), np.split(value, 3), strict=True)
            out |= {new.replace("qkv", part): row for part, row in rows}
        else:
            out[new] = value
    return out


def hf_config(arch):
    """transformers' configuration of a network; V2's where the architecture has a position kind."""
    common = {
        "image_size": arch["image_size"],
        "patch_size": arch["patch_size"],
        "embed_dim": arch["embed_width"],
        "depths": arch["depths"],
        "num_heads": arch["heads"],
        "window_size": arch["window"],
        "mlp_ratio": float(arch["mlp_ratio"]),
        "layer_norm_eps": arch["norm_eps"],
        "hidden_act": {"gelu_erf": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[arch["activation"]],
        "drop_path_rate": 0.0,
    }
    if "position" not in arch:
        return transformers.SwinConfig(**common)
    return transformers.Swinv2Config(**common, pretrained_window_sizes=arch["pretrained_windows"])


def hf_model(made, params, folder):
    """transformers' model with these weights; no key missing, none left over."""
    network = transformers.SwinModel if made.family == "swin" else transformers.Swinv2Model
    tensors = to_hf(to_official(params, made.arch))
    config = hf_config(made.arch)
    return oracles.pretrained(network, config, tensors, folder, add_pooling_layer=False)


def plain_torch(made, params, images, **options):
    """tests/reference/swin.py with these weights. -> (per block, result), numpy."""
    version = 1 if made.family == "swin" else 2
    tensors = {k: torch.from_numpy(np.array(v)) for k, v in to_official(params, made.arch).items()}
    pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
    with torch.no_grad():
        seen, out = reference.forward(tensors, made.arch, pixels, version=version, **options)
    return [x.numpy() for x in seen], out.numpy()
