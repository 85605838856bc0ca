"""Facts of a network, read off the module that timm or open_clip makes for it.

Nothing is taken from names or from arguments. Activations are recognised by their values. A module
may be on the meta device, where it has shapes and no numbers.
"""

from collections.abc import Callable, Iterator
import math
from typing import Any

import torch
from torch import nn

Facts = dict[str, Any]


class LackingError(Exception):
    """A network has something that no network here has; the message says what."""


def of_timm(model: nn.Module) -> Facts:
    """The facts of a network of timm.

    Raises:
      LackingError: it has what no network here has.
      KeyError: it is of a class that nothing here resembles.
    """
    return TIMM[type(model).__name__](model)


def style_of_timm(model: nn.Module) -> str:
    """The naming style of a network of timm; raises a KeyError for other classes."""
    return STYLES[type(model).__name__]


def of_open_clip(tower: nn.Module) -> Facts:
    """The facts of open_clip's own vision tower; errors as in `of_timm`."""
    blocks = list(tower.transformer.resblocks)
    first = blocks[0]
    _require(type(first).__name__ == "ResidualAttentionBlock", "other blocks than CLIP's")
    _require(isinstance(first.attn, nn.MultiheadAttention), "another attention than CLIP's")
    final = tower.attn_pool is None and not tower.final_ln_after_pool
    return {
        "image_size": side(tower.image_size),
        "patch_size": side(tower.patch_size),
        "width": tower.conv1.out_channels,
        "depth": len(blocks),
        "heads": first.attn.num_heads,
        "mlp_width": first.mlp.c_fc.out_features,
        "activation": activation(first.mlp.gelu),
        "norm_eps": epsilon(tower),
        **({"ln_pre": True} if _present(tower, "ln_pre") else {}),
        "patch_bias": False,
        "final_norm": final,
        "pooling": {"tok": "cls", "avg": "mean" if final else "mean_norm"}[tower.pool_type]
        if tower.attn_pool is None
        else None,
    }


def activation(module: nn.Module) -> str:
    """Our name of an activation, by its values."""
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    found = module(x.clone())
    for name, function in _ACTIVATIONS.items():
        if torch.allclose(found, function(x), rtol=1e-9, atol=1e-12):
            return name
    raise LackingError(f"the activation {type(module).__name__}")


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_erf": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": lambda x: x * torch.sigmoid(x),
    "relu": torch.relu,
}


def epsilon(module: nn.Module) -> float:
    """The epsilon of all LayerNorms of a network."""
    found = {norm.eps for norm in _norms(module)}
    _require(len(found) == 1, f"norms with the epsilons {sorted(found)}")
    return found.pop()


def _norms(module: nn.Module) -> Iterator[nn.LayerNorm]:
    for part in module.modules():
        name = type(part).__name__
        if isinstance(part, nn.LayerNorm):
            _require(part.weight is not None and part.bias is not None, "LayerNorm without a bias")
            yield part
        elif hasattr(part, "eps"):
            _require(name == "GlobalResponseNorm", _norm_name(name))


def _norm_name(name: str) -> str:
    return {"RmsNorm": "RMSNorm", "RmsNorm2d": "RMSNorm"}.get(name, name)


def _vit(model: Any) -> Facts:
    """The VisionTransformer of timm."""
    first = model.blocks[0]
    _require(type(first).__name__ == "Block", _BLOCKS.get(type(first).__name__, "other blocks"))
    scaled = {"layer_scale": first.ls1.init_values} if hasattr(first.ls1, "gamma") else {}
    return {**_common(model), **scaled, **_pooled(model)}


def _eva(model: Any) -> Facts:
    """The Eva of timm."""
    first = model.blocks[0]
    _require(type(first).__name__ == "EvaBlock", _BLOCKS.get(type(first).__name__, "other blocks"))
    scaled = {"layer_scale": first.init_values} if first.gamma_1 is not None else {}
    bare = isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)
    final = {"final_norm": False} if bare else {}
    return {**_common(model), **scaled, **_rope(model), **_pooled(model), **final}


def _beit(model: Any) -> Facts:
    """The Beit of timm."""
    first = model.blocks[0]
    scaled = {"layer_scale": first.init_values} if first.gamma_1 is not None else {}
    return {**_common(model), **scaled, **_pooled(model)}


_BLOCKS = {
    "ResPostBlock": "norms after attention and MLP",
    "EvaBlockPostNorm": "norms after attention and MLP",
    "ParallelScalingBlock": "attention beside the MLP",
    "DiffParallelScalingBlock": "attention beside the MLP",
    "ParallelThingsBlock": "several attentions beside each other",
    "RelPosBlock": "relative positions without a class token's",
    "ResPostRelPosBlock": "norms after attention and MLP",
}


def _common(model: Any) -> Facts:
    """What the vision transformers of timm share."""
    embed, first, width = model.patch_embed, model.blocks[0], model.embed_dim
    eps = epsilon(model)
    _require(type(embed).__name__ == "PatchEmbed", f"a stem of the kind {type(embed).__name__}")
    _require(isinstance(embed.norm, nn.Identity), "a norm of the patches")
    _require(embed.proj.kernel_size == embed.proj.stride, "patches that overlap")
    _check_attention(first.attn, width)
    has_class = model.cls_token is not None
    registers = getattr(model, "num_prefix_tokens", 1) - int(has_class)
    return {
        "image_size": side(embed.img_size),
        "patch_size": side(embed.patch_size),
        "width": width,
        "depth": len(model.blocks),
        "heads": first.attn.num_heads,
        **_mlp(first.mlp),
        **({"attn_norm": True} if _present(first.attn, "norm") else {}),
        "norm_eps": eps,
        **({} if has_class else {"cls_token": False}),
        **({"registers": registers} if registers > 0 else {}),
        **({"ln_pre": True} if _present(model, "norm_pre") else {}),
        **({} if embed.proj.bias is not None else {"patch_bias": False}),
    }


def _check_attention(attn: Any, width: int) -> None:
    normed = _present(attn, "q_norm") or _present(attn, "k_norm")
    _require(not normed, "norms of queries and keys")
    _require(getattr(attn, "gate", None) is None, "a gate of the attention")
    kinds = ("Attention", "EvaAttention", "AttentionRope")
    _require(type(attn).__name__ in kinds, f"an attention of the kind {type(attn).__name__}")
    _require(attn.proj.in_features == width, "attention of another width than the tokens")
    _require(attn.proj.bias is not None, "an attention without biases")


def _present(module: Any, name: str) -> bool:
    """Whether a module has a part that does something."""
    return not isinstance(getattr(module, name, None), nn.Identity | type(None))


def _mlp(mlp: Any) -> Facts:
    """Hidden width, activation and kind of an MLP of timm."""
    name = type(mlp).__name__
    gated = name in ("GluMlp", "SwiGLU")
    _require(gated or name == "Mlp", f"an MLP of the kind {name}")
    _require(mlp.fc2.bias is not None, "an MLP without biases")
    _require(not getattr(mlp, "gate_last", False), "an MLP whose gate comes last")
    return {
        "mlp_width": mlp.fc2.in_features,
        "activation": activation(mlp.act),
        **({"gated_mlp": True} if gated else {}),
        **({"mlp_norm": True} if _present(mlp, "norm") else {}),
    }


def _rope(model: Any) -> Facts:
    """The rotary facts of an Eva."""
    rope = model.rope
    if rope is None:
        return {}
    _require(not model.rope_mixed, "learned rotary frequencies of every head")
    kind = type(rope).__name__
    half = getattr(model.blocks[0].attn, "rotate_half", False)
    facts = {
        "position": "rope" if model.pos_embed is None else "ape_rope",
        "rope_theta": rope.temperature,
        "rope_pairs": "halves" if half else "neighbours",
        **({"rope_axes": "xy"} if rope.grid_indexing == "xy" else {}),
    }
    if kind == "RotaryEmbeddingDinoV3":
        plain = rope.normalize_coords == "separate" and not rope.grid_offset
        _require(
            plain and rope.min_period is None, "another grid of rotary positions than DINOv3's"
        )
        return facts
    _require(kind == "RotaryEmbeddingCat" and not rope.in_pixels, f"positions of the kind {kind}")
    reference = rope.ref_feat_shape
    return {
        **facts,
        "rope_reference": 0 if reference is None else side(reference),
        **({"rope_offset": rope.grid_offset} if rope.grid_offset else {}),
    }


def _pooled(model: Any) -> Facts:
    """How one vector is made of the tokens."""
    norm_after = not isinstance(model.fc_norm, nn.Identity)
    both = norm_after and not isinstance(model.norm, nn.Identity)
    if model.global_pool == "map" and not norm_after:
        return {"pooling": None, "pool": _latent(model.attn_pool)}
    names = {("token", False): "cls", ("avg", False): "mean", ("avg", True): "mean_norm"}
    pooling = names.get((model.global_pool, norm_after))
    unlike = both or getattr(model, "pool_include_prefix", False)
    bare = {} if norm_after or not isinstance(model.norm, nn.Identity) else {"final_norm": False}
    return {"pooling": None if unlike else pooling, **bare}


def _latent(pool: Any) -> Facts | None:
    """`ModelSpec.pool` of timm's AttentionPoolLatent; None for one of another kind."""
    plain = pool.pos_embed is None and pool.pool == "token" and pool.latent_len == 1
    if not plain or not all(isinstance(n, nn.Identity) for n in (pool.q_norm, pool.k_norm)):
        return None
    if isinstance(pool.q, nn.Identity) or not isinstance(pool.norm, nn.LayerNorm):
        return None
    return {
        "kind": "attention",
        "heads": pool.num_heads,
        "mlp_width": pool.mlp.fc1.out_features,
        "activation": activation(pool.mlp.act),
        "norm_eps": pool.norm.eps,
    }


def _swin(model: Any) -> Facts:
    """The SwinTransformer and SwinTransformerV2 of timm."""
    layers = list(model.layers)
    first = layers[0].blocks[0]
    widths = [layer.blocks[0].dim for layer in layers]
    _require(widths == [widths[0] << i for i in range(len(layers))], "stages of other widths")
    ratios = {layer.blocks[0].mlp.fc1.out_features / layer.blocks[0].dim for layer in layers}
    _require(len(ratios) == 1 and ratios == {round(*ratios)}, "MLPs of broken ratios")
    facts = {
        "image_size": side(model.patch_embed.img_size),
        "patch_size": side(model.patch_embed.patch_size),
        "embed_width": widths[0],
        "depths": [len(layer.blocks) for layer in layers],
        "heads": [layer.blocks[0].attn.num_heads for layer in layers],
        "window": side(first.window_size),
        "mlp_ratio": round(*ratios),
        "activation": activation(first.mlp.act),
        "norm_eps": epsilon(model),
        "pooling": {"avg": "mean"}.get(model.head.global_pool.pool_type),
    }
    if hasattr(first.attn, "pretrained_window_size"):
        windows = [side(layer.blocks[0].attn.pretrained_window_size) for layer in layers]
        facts["pretrained_windows"] = windows
    return facts


def _convnext(model: Any) -> Facts:
    """The ConvNeXt of timm, whose input has no fixed size."""
    stem, stages = model.stem, list(model.stages)
    first = stages[0].blocks[0]
    _require(len(stem) == 2 and stem[0].kernel_size == stem[0].stride, "an overlapping stem")
    _require(stem[0].bias is not None, "convolutions without biases")
    _require(first.conv_dw.kernel_size == (7, 7), "kernels of another size than 7")
    eps = epsilon(model)
    grn = type(first.mlp).__name__ == "GlobalResponseNormMlp"
    after = isinstance(model.norm_pre, nn.Identity)
    return {
        "patch_size": side(stem[0].kernel_size),
        "widths": [stage.blocks[0].conv_dw.out_channels for stage in stages],
        "depths": [len(stage.blocks) for stage in stages],
        "activation": activation(first.mlp.act),
        "norm_eps": eps,
        **({"grn": True} if grn else {}),
        "pooling": "mean_norm" if after else "mean",
    }


def _resnet(model: Any) -> Facts:
    """The ResNet of timm, whose input has no fixed size."""
    stages = [getattr(model, f"layer{number}") for number in range(1, len(model.feature_info))]
    first = stages[0][0]
    bottleneck = hasattr(first, "conv3")
    _require(all(block.se is None for stage in stages for block in stage), "attention of channels")
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    _require(all(m.groups == 1 for m in convolutions), "convolutions of groups of channels")
    _require(all(m.bias is None for m in convolutions), "convolutions with biases")
    _require(isinstance(model.maxpool, nn.MaxPool2d), "another pooling of the stem")
    pooled = (_present(block, "aa") for stage in stages for block in stage)
    _require(not any(pooled), "a pooling in its blocks")
    deep = isinstance(model.conv1, nn.Sequential)
    stem = [m.out_channels for m in model.conv1.modules() if isinstance(m, nn.Conv2d)]
    inner = [stage[0].conv1.out_channels for stage in stages]
    if bottleneck:
        second = [stage[0].conv2.out_channels for stage in stages]
        _require(inner == second, "bottlenecks of two widths")
    shortcut = stages[-1][0].downsample
    _require(shortcut[-2].kernel_size == (1, 1), "shortcuts of larger kernels")
    last = [stage[0].conv3 if bottleneck else stage[0].conv2 for stage in stages]
    norms = [module for module in model.modules() if hasattr(module, "eps")]
    kinds = {type(norm).__name__ for norm in norms}
    _require(kinds == {"BatchNorm2d"}, f"norms of the kinds {', '.join(sorted(kinds))}")
    eps = {norm.eps for norm in norms}
    _require(len(eps) == 1, f"norms with the epsilons {sorted(eps)}")
    return {
        "patch_size": 4,
        "stem_widths": stem if deep else [model.conv1.out_channels],
        "widths": [conv.out_channels for conv in last],
        "inner_widths": inner,
        "depths": [len(stage) for stage in stages],
        "bottleneck": bottleneck,
        "stride_at": "second" if bottleneck else "first",
        "shortcut": "pooled" if len(shortcut) == 3 else "strided",
        "activation": activation(first.act1),
        "norm_eps": eps.pop(),
        "pooling": {"avg": "mean"}.get(model.global_pool.pool_type),
    }


def side(size: Any) -> Any:
    """One number for a square, else [height, width]."""
    if isinstance(size, int):
        return size
    height, width = size
    return height if height == width else [height, width]


def _require(holds: Any, otherwise: str) -> None:
    if not holds:
        raise LackingError(otherwise)


TIMM: dict[str, Callable[[Any], Facts]] = {
    "VisionTransformer": _vit,
    "VisionTransformerDistilled": _vit,
    "VisionTransformerRelPos": _vit,
    "Eva": _eva,
    "Beit": _beit,
    "SwinTransformer": _swin,
    "SwinTransformerV2": _swin,
    "ConvNeXt": _convnext,
    "ResNet": _resnet,
}
STYLES = {
    "VisionTransformer": "timm_vit",
    "VisionTransformerDistilled": "timm_vit",
    "VisionTransformerRelPos": "timm_vit",
    "Eva": "timm_eva",
    "Beit": "timm_beit",
    "SwinTransformer": "timm_swin",
    "SwinTransformerV2": "timm_swin_v2",
    "ConvNeXt": "timm_convnext",
    "ResNet": "timm_resnet",
}
