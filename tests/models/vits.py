"""Vision transformers of toy size, their weights, and the same weights as transformers' BEiT."""

from flax import nnx
import jax
import numpy as np
import transformers

from configs import base
from fd_jax.convert.formats import FORMATS
from fd_jax.models import sizes
from fd_jax.models.spec import ModelSpec
from tests.convert import oracles

# Depth 11: list indices as text sort 0, 1, 10, 2, ..., and blocks must not.
SMALL = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 11, "heads": 4, "mlp_width": 64}


def student_spec(shape, position):
    arch = base.student(shape, image_size=shape["image_size"], position=position)
    return ModelSpec("vit", arch)


def random_params(spec, seed=0):
    """Weights at a trained network's scale, with no bias, table or gamma at its neutral start."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        noise = rng.normal(size=leaf.shape)
        if name.endswith("scale"):
            return (1 + 0.1 * noise).astype(np.float32)
        if "gamma" in name:
            return (0.5 + 0.1 * noise).astype(np.float32)
        if name.endswith("kernel"):
            fan_in = np.prod(leaf.shape[:-1]) if "patch" in name else leaf.shape[0]
            return (noise / np.sqrt(fan_in)).astype(np.float32)
        return (0.3 * noise).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, spec.abstract()[1])


def to_hf(tree, depth, *, shared):
    """Our tree -> BeitModel's names on disk. Works for parameters and for gradients."""
    out = {
        "embeddings.cls_token": tree["cls_token"],
        "embeddings.patch_embeddings.projection.weight": np.transpose(
            tree["patch_embed"]["kernel"], (3, 2, 0, 1)
        ),
        "embeddings.patch_embeddings.projection.bias": tree["patch_embed"]["bias"],
        "layernorm.weight": tree["norm"]["scale"],
        "layernorm.bias": tree["norm"]["bias"],
    }
    if shared:
        name = "encoder.relative_position_bias.relative_position_bias_table"
        out[name] = tree["rel_pos_bias"]["table"]
    for i in range(depth):
        block, at = tree["blocks"][str(i)], f"encoder.layer.{i}"
        attn = block["attn"]
        for j, name in enumerate(("query", "key", "value")):
            out[f"{at}.attention.attention.{name}.weight"] = attn["qkv"]["kernel"][:, j].T
        out[f"{at}.attention.attention.query.bias"] = attn["q_bias"]
        out[f"{at}.attention.attention.value.bias"] = attn["v_bias"]
        if not shared:
            name = f"{at}.attention.attention.relative_position_bias.relative_position_bias_table"
            out[name] = attn["rel_pos_bias"]["table"]
        for name, dense in (
            ("attention.output.dense", attn["proj"]),
            ("intermediate.dense", block["mlp"]["fc1"]),
            ("output.dense", block["mlp"]["fc2"]),
        ):
            out[f"{at}.{name}.weight"] = np.transpose(dense["kernel"])
            out[f"{at}.{name}.bias"] = dense["bias"]
        for ours, theirs in (("norm1", "layernorm_before"), ("norm2", "layernorm_after")):
            out[f"{at}.{theirs}.weight"] = block[ours]["scale"]
            out[f"{at}.{theirs}.bias"] = block[ours]["bias"]
        out[f"{at}.lambda_1"], out[f"{at}.lambda_2"] = block["gamma_1"], block["gamma_2"]
    return {name: np.asarray(value) for name, value in out.items()}


def beit(spec, params, folder, *, shared, **overrides):
    arch = spec.arch
    config = transformers.BeitConfig(
        **{**oracles.config_fields(arch), **overrides},
        use_shared_relative_position_bias=shared,
        use_relative_position_bias=not shared,
        use_mask_token=False,
        use_mean_pooling=False,
        layer_scale_init_value=0.1,
        drop_path_rate=0.0,
    )
    tensors = to_hf(params, arch["depth"], shared=shared)
    return oracles.pretrained(
        transformers.BeitModel, config, tensors, folder, add_pooling_layer=False
    )


def pictures(spec, count, seed=3):
    shape = (count, *sizes.sides(spec.arch["image_size"]), 3)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def bind(spec, params, **runtime):
    return nnx.merge(spec.abstract(**runtime)[0], params)


def relative(got, want):
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


def hugging_face(spec, params, folder):
    """transformers' model of a converted network."""
    flat = {
        f"encoder/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    FORMATS["huggingface"].write(spec, flat, folder)
    return transformers.AutoModel.from_pretrained(folder).eval()
