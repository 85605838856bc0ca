"""Swin V1 with a UPerNet, as transformers' UperNetForSemanticSegmentation: config.json has it all.

That class pads pictures until windows divide their grids, and here the input size is a multiple of
the windows: the one nearest to the 512 pixels of its published networks, unless --image-size says
another. The logits are the same for pictures of such a size.
"""

from collections.abc import Mapping
from typing import Any

from fd_jax.convert import huggingface, networks
from fd_jax.convert.containers.tensors import Container
from fd_jax.convert.families import swin
from fd_jax.convert.family import Family, SelfDescribed
from fd_jax.convert.networks import segmenter
from fd_jax.convert.rules.tables import Drop, Table, prefixed
from fd_jax.convert.source import Part, Source
from fd_jax.models.spec import IMAGENET_MEAN, IMAGENET_STD, ModelSpec

NAME = "upernet_swin_hf"
CLASS = "UperNetForSemanticSegmentation"

_WHY = "the final norm, which no map passes"
_BACKBONE = segmenter.stage_norms("hidden_states_norms.stage", first=1) + Table(
    (), (Drop("layernorm.*", _WHY), Drop("swin.layernorm.*", _WHY))
)
_TABLE = (
    prefixed(swin.HUGGINGFACE + _BACKBONE, "backbone.")
    + segmenter.upernet(norm="batch_norm", classifier="classifier")
    + segmenter.auxiliary(norm="batch_norm", classifier="classifier")
)


def source(container: Container) -> Source:
    """The source of this one file.

    Raises:
      ConversionError: config.json is missing or describes no network that can be had here.
    """
    return huggingface.described(container, CLASS, _source)


def _source(config: Mapping[str, Any], container: Container) -> Source:
    backbone = config["backbone_config"]
    depths = backbone["depths"]
    _check(backbone)
    mean, std = huggingface.statistics(container, (IMAGENET_MEAN, IMAGENET_STD))
    spec = ModelSpec(
        "swin",
        _arch(backbone),
        mean=mean,
        std=std,
        segmenter={
            "neck": "stage_norms",
            "blocks": [sum(depths[: stage + 1]) - 1 for stage in range(segmenter.STAGES)],
            **huggingface.upernet_fields(config, container),
        },
    )
    return Source(
        NAME,
        "a folder of transformers' UperNetForSemanticSegmentation on a Swin",
        {"segmenter": Part(networks.segmenter_table(_TABLE, spec, container), spec)},
        "transformers UperNetForSemanticSegmentation",
    )


def _check(backbone: Mapping[str, Any]) -> None:
    expected = {
        "model_type": "swin",
        "use_absolute_embeddings": False,
        "qkv_bias": True,
        # Its norms of patches and mergings have this epsilon, whatever the config says.
        "layer_norm_eps": 1e-5,
        "out_features": [f"stage{stage + 1}" for stage in range(segmenter.STAGES)],
    }
    huggingface.expect({name: backbone.get(name) for name in expected}, expected)


def _arch(backbone: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image_size": segmenter.windowed_size(backbone["patch_size"], backbone["window_size"]),
        "patch_size": backbone["patch_size"],
        "embed_width": backbone["embed_dim"],
        "depths": list(backbone["depths"]),
        "heads": list(backbone["num_heads"]),
        "window": backbone["window_size"],
        "mlp_ratio": int(backbone["mlp_ratio"]),
        "activation": huggingface.activation(backbone["hidden_act"]),
        "norm_eps": backbone["layer_norm_eps"],
        "final_norm": False,
    }


FAMILY = Family(
    "upernet_swin",
    described=SelfDescribed(
        NAME,
        "openmmlab/upernet-swin-base and other folders of transformers' "
        "UperNetForSemanticSegmentation on a Swin",
        lambda container: huggingface.is_of(container, CLASS),
        source,
    ),
)
