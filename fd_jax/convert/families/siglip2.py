"""SigLIP 2's image tower: big_vision's npz (stacked or per block) and Hugging Face's layout."""

from fd_jax.convert.rules.tables import Drop, Rule, Table
from fd_jax.convert.rules.transforms import (
    MATRIX_TOKENS,
    SPLIT_QKV,
    heads_bias,
    heads_out,
    split_qkv_heads,
)
from fd_jax.convert.source import SIZES, Part, Source, conv, linear, norm
from fd_jax.models.spec import ModelSpec

_BLOCK = "encoder/blocks/{i}"
_BIASES = (f"{_BLOCK}/attn/q_bias", f"{_BLOCK}/attn/k_bias", f"{_BLOCK}/attn/v_bias")
_TEXT = "the text tower"
_POOL = "the attention pooling head"
_SIMILARITY = "scale and bias of the similarity"


def _both(source: str, target: str, names: tuple[str, str]) -> tuple[Rule, Rule]:
    """Rules of a flax layer, whose layout is ours."""
    first, second = (Rule(f"{source}/{name}", f"{target}/{name}") for name in names)
    return first, second


def big_vision(heads: int) -> Table:
    """Rules of big_vision's names; query, key and value are stored per head."""
    block = "img/Transformer/encoderblock_{i}"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    qkv = ("query", "key", "value")
    return Table(
        (
            *_both("img/embedding", "encoder/patch_embed", ("kernel", "bias")),
            Rule("img/pos_embedding", "encoder/pos_embed"),
            *_both(f"{block}/LayerNorm_0", f"{_BLOCK}/norm1", ("scale", "bias")),
            Rule(
                tuple(f"{attention}/{p}/kernel" for p in qkv),
                f"{_BLOCK}/attn/qkv/kernel",
                split_qkv_heads(heads),
            ),
            *(
                Rule(f"{attention}/{p}/bias", bias, heads_bias(heads))
                for p, bias in zip(qkv, _BIASES, strict=True)
            ),
            Rule(f"{attention}/out/kernel", f"{_BLOCK}/attn/proj/kernel", heads_out(heads)),
            Rule(f"{attention}/out/bias", f"{_BLOCK}/attn/proj/bias"),
            *_both(f"{block}/LayerNorm_1", f"{_BLOCK}/norm2", ("scale", "bias")),
            *_both(f"{block}/MlpBlock_0/Dense_0", f"{_BLOCK}/mlp/fc1", ("kernel", "bias")),
            *_both(f"{block}/MlpBlock_0/Dense_1", f"{_BLOCK}/mlp/fc2", ("kernel", "bias")),
            *_both("img/Transformer/encoder_norm", "encoder/norm", ("scale", "bias")),
        ),
        (
            Drop("img/MAPHead_0/*", _POOL),
            Drop("txt/*", _TEXT),
            Drop("t", _SIMILARITY),
            Drop("b", _SIMILARITY),
        ),
    )


_LAYER = "vision_model.encoder.layers.{i}"
_QKV = ("q_proj", "k_proj", "v_proj")
HUGGINGFACE = Table(
    (
        *conv("vision_model.embeddings.patch_embedding", "encoder/patch_embed"),
        Rule(
            "vision_model.embeddings.position_embedding.weight", "encoder/pos_embed", MATRIX_TOKENS
        ),
        *norm(f"{_LAYER}.layer_norm1", f"{_BLOCK}/norm1"),
        Rule(
            tuple(f"{_LAYER}.self_attn.{p}.weight" for p in _QKV),
            f"{_BLOCK}/attn/qkv/kernel",
            SPLIT_QKV,
        ),
        *(
            Rule(f"{_LAYER}.self_attn.{p}.bias", bias)
            for p, bias in zip(_QKV, _BIASES, strict=True)
        ),
        *linear(f"{_LAYER}.self_attn.out_proj", f"{_BLOCK}/attn/proj"),
        *norm(f"{_LAYER}.layer_norm2", f"{_BLOCK}/norm2"),
        *linear(f"{_LAYER}.mlp.fc1", f"{_BLOCK}/mlp/fc1"),
        *linear(f"{_LAYER}.mlp.fc2", f"{_BLOCK}/mlp/fc2"),
        *norm("vision_model.post_layernorm", "encoder/norm"),
    ),
    (
        Drop("vision_model.head.*", _POOL),
        Drop("text_model.*", _TEXT),
        Drop("logit_scale", _SIMILARITY),
        Drop("logit_bias", _SIMILARITY),
        Drop("vision_model.embeddings.position_ids", "a constant buffer"),
    ),
)

SPEC = ModelSpec(
    "vit",
    {
        "image_size": 224,
        "patch_size": 16,
        **SIZES["B"],
        "position": "ape",
        "cls_token": False,
        "registers": 0,
        "ln_pre": False,
        "final_norm": True,
        "activation": "gelu_tanh",
        "norm_eps": 1e-6,
        "layer_scale": None,
        "qkv_bias": "qkv",
        "patch_bias": True,
    },
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)

_ORACLE = "transformers SiglipVisionModel"

SOURCES = (
    Source(
        "siglip2_base_patch16_224_bigvision",
        "siglip2_b16_224.npz",
        {"image": Part(big_vision(SIZES["B"]["heads"]), SPEC, ("params/",))},
        _ORACLE,
        "no class token; blocks stacked on a leading axis or one by one",
        unstack="img/Transformer/encoderblock",
    ),
    Source(
        "siglip2_base_patch16_224_hf",
        "google/siglip2-base-patch16-224 model.safetensors",
        {"image": Part(HUGGINGFACE, SPEC)},
        _ORACLE,
        "no class token",
        hf=True,
    ),
)
