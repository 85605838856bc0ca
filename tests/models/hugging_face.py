"""From our paths to the names of transformers' models in memory, see `torch_names`."""

import numpy as np

_BLOCK = r"blocks/(\d+)/"


def _blocks(at, *, attn, out, norms, mlp, scales=None):
    names = {
        _BLOCK + "norm1": f"{at}.{norms[0]}",
        _BLOCK + "norm2": f"{at}.{norms[1]}",
        _BLOCK + "attn/qkv/kernel": f"{at}.{attn}.{{}}_proj.weight",
        _BLOCK + "attn/([qkv])_bias": rf"{at}.{attn}.\2_proj.bias",
        _BLOCK + "attn/proj": f"{at}.{attn}.{out}",
    }
    names |= {_BLOCK + f"mlp/{ours}": f"{at}.mlp.{theirs}" for ours, theirs in mlp.items()}
    if scales is not None:
        names[_BLOCK + "gamma_([12])"] = rf"{at}.{scales}\2.lambda1"
    return names


_GATED = {"gate": "gate_proj", "fc1": "up_proj", "fc2": "down_proj"}
_PLAIN = {"fc1": "fc1", "fc2": "fc2"}
_DINO = {"attn": "attention", "out": "o_proj", "norms": ("norm1", "norm2")}
_DINO |= {"mlp": _GATED, "scales": "layer_scale"}
_CLIP = {"attn": "self_attn", "out": "out_proj", "norms": ("layer_norm1", "layer_norm2")}
_CLIP |= {"mlp": _PLAIN}

DINOV2 = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    **_blocks(r"encoder.layer.\1", **_DINO),
}
DINOV3 = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed": "embeddings.patch_embeddings",
    "norm": "norm",
    **_blocks(r"model.layer.\1", **_DINO),
}
SIGLIP = {
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed": "embeddings.patch_embedding",
    "norm": "post_layernorm",
    **_blocks(r"encoder.layers.\1", **_CLIP),
}
CLIP = {
    "cls_token": "vision_model.embeddings.class_embedding",
    "pos_embed": "vision_model.embeddings.position_embedding.weight",
    "patch_embed": "vision_model.embeddings.patch_embedding",
    "ln_pre": "vision_model.pre_layrnorm",
    "norm": "vision_model.post_layernorm",
    **_blocks(r"vision_model.encoder.layers.\1", **_CLIP),
}


def siglip_head(pool):
    """The pool of a SigLIP under transformers' names, whose attention is torch's own."""
    attn = pool["attn"]
    weights = [attn["qkv"]["kernel"][:, index].T for index in range(3)]
    tensors = {
        "probe": pool["latent"],
        "attention.in_proj_weight": np.concatenate(weights),
        "attention.in_proj_bias": np.concatenate([attn[f"{letter}_bias"] for letter in "qkv"]),
        "layernorm.weight": pool["norm"]["scale"],
        "layernorm.bias": pool["norm"]["bias"],
    }
    for theirs, layer in (
        ("attention.out_proj", attn["proj"]),
        ("mlp.fc1", pool["mlp"]["fc1"]),
        ("mlp.fc2", pool["mlp"]["fc2"]),
    ):
        tensors[f"{theirs}.weight"], tensors[f"{theirs}.bias"] = layer["kernel"].T, layer["bias"]
    return {f"head.{name}": value for name, value in tensors.items()}
