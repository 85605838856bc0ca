"""BEiT with a UPerNet, as transformers' BeitForSemanticSegmentation: the spec is in config.json."""

from collections.abc import Mapping
from typing import Any

from fd_jax.convert import huggingface, networks
from fd_jax.convert.containers.tensors import Container
from fd_jax.convert.families import beit
from fd_jax.convert.family import Family, SelfDescribed
from fd_jax.convert.networks import segmenter
from fd_jax.convert.rules.tables import Derived, Drop, Table, prefixed
from fd_jax.convert.source import Part, Source
from fd_jax.models.spec import ModelSpec

NAME = "beit_segmentation_hf"
CLASS = "BeitForSemanticSegmentation"

_INDEX = "relative_position_bias.relative_position_index"
_TABLE = (
    prefixed(
        beit.HUGGINGFACE
        + Table(
            (),
            (Drop("layernorm.*", "the final norm, which no map passes"),),
            (
                Derived(f"encoder.layer.{{i}}.attention.attention.{_INDEX}", beit.index),
                Derived(f"encoder.{_INDEX}", beit.index),
            ),
        ),
        "beit.",
    )
    + segmenter.pyramid()
    + segmenter.upernet(norm="bn", classifier="classifier")
    + segmenter.auxiliary(norm="bn", classifier="classifier")
)


def source(container: Container) -> Source:
    """The source of this one file.

    Raises:
      ConversionError: config.json is missing or describes no network that can be had here.
    """
    return huggingface.described(container, CLASS, _source)


def _source(config: Mapping[str, Any], container: Container) -> Source:
    mean, std = huggingface.statistics(container, ((0.5,) * 3, (0.5,) * 3))
    spec = ModelSpec(
        "vit",
        _arch(config),
        mean=mean,
        std=std,
        segmenter={
            "neck": "pyramid",
            # Index n names hidden state n - 1, and the first of these is the embedding.
            "blocks": [index - 2 for index in config["out_indices"]],
            **huggingface.upernet_fields(config, container),
        },
    )
    return Source(
        NAME,
        "a folder of transformers' BeitForSemanticSegmentation",
        {"segmenter": Part(networks.segmenter_table(_TABLE, spec, container), spec)},
        "transformers BeitForSemanticSegmentation",
        hf=True,
    )


def _arch(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image_size": config["image_size"],
        "patch_size": config["patch_size"],
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_width": config["intermediate_size"],
        "position": _position(config),
        "cls_token": True,
        "registers": 0,
        "ln_pre": False,
        "final_norm": False,
        "activation": huggingface.activation(config["hidden_act"]),
        "norm_eps": huggingface.epsilon(config["layer_norm_eps"]),
        "layer_scale": float(config["layer_scale_init_value"]) or None,
        "qkv_bias": "qv",
        "patch_bias": True,
    }


def _position(config: Mapping[str, Any]) -> str:
    kinds = {
        "use_relative_position_bias": "rpb",
        "use_shared_relative_position_bias": "shared_rpb",
        "use_absolute_position_embeddings": "ape",
    }
    (position,) = [kind for field, kind in kinds.items() if config.get(field)]
    return position


FAMILY = Family(
    "beit_segmentation",
    described=SelfDescribed(
        NAME,
        "microsoft/beit-base-finetuned-ade-640-640 and other folders of transformers' "
        "BeitForSemanticSegmentation",
        lambda container: huggingface.is_of(container, CLASS),
        source,
    ),
)
