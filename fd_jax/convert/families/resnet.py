"""ResNets in the names of timm (which are torchvision's) and Hugging Face.

The features are the last map, of 1/32 of the image's side; a classifier reads its mean. A file has
the running statistics of every BatchNorm, which are parameters here. How many batches they are of,
`num_batches_tracked`, changes nothing: it is left behind, and written as 0.
"""

from collections.abc import Callable, Mapping, Set
import re
from typing import Any

import numpy as np

from fd_jax.convert.containers.tensors import Tensor
from fd_jax.convert.family import Family
from fd_jax.convert.huggingface import HAS_HEAD_ON_MEAN, HuggingFace
from fd_jax.convert.layout import EPSILON_1E5
from fd_jax.convert.networks.resnet import (
    BLOCK,
    ONE_BASE_WIDTH,
    PLAIN_STEM,
    RELU,
    STRIDED_SHORTCUT,
    STRIDES_IN_3X3,
    WIDTHS_OF_4,
    is_bottleneck,
    projects,
)
from fd_jax.convert.rules.tables import (
    Drop,
    Rule,
    Table,
    Where,
    linear,
    only_where,
    optional,
    prefixed,
    steps,
)
from fd_jax.convert.rules.transforms import CONV
from fd_jax.convert.style import Style
from fd_jax.convert.timm import Timm, arguments
from fd_jax.models.spec import ModelSpec

_COUNTER = "num_batches_tracked"
_COUNTERS = Table((), (Drop(f"*.{_COUNTER}", "how many batches running statistics are of"),))


def _batch_norm(name: str, path: str) -> tuple[Rule, ...]:
    """A BatchNorm with its running statistics."""
    parts = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return tuple(Rule(f"{name}.{theirs}", f"{path}/{ours}") for theirs, ours in parts.items())


def _normed(conv: str, norm: str, path: str, where: Where | None = None) -> tuple[Rule, ...]:
    """A convolution without bias, and its BatchNorm."""
    kernel = Rule(f"{conv}.weight", f"{path}/conv/kernel", CONV)
    rules = (kernel, *_batch_norm(norm, f"{path}/norm"))
    return rules if where is None else only_where(rules, where)


def _stem(conv: str, norm: str) -> tuple[Rule, ...]:
    """The convolution that reads pixels, and its BatchNorm."""
    kernel = Rule(f"{conv}.weight", "encoder/patch_embed/kernel", CONV)
    return (kernel, *_batch_norm(norm, "encoder/patch_norm"))


# --- timm and torchvision

_AT = "layer{s+1}.{b}"
_BRANCH = Table(
    (
        *_normed(f"{_AT}.conv1", f"{_AT}.bn1", f"{BLOCK}/branch/0"),
        *_normed(f"{_AT}.conv2", f"{_AT}.bn2", f"{BLOCK}/branch/1"),
        *_normed(f"{_AT}.conv3", f"{_AT}.bn3", f"{BLOCK}/branch/2", is_bottleneck),
        *optional(linear("fc", "head")),
    )
)
_PLAIN_STEM = Table(_stem("conv1", "bn1"))
_DEEP_STEM = Table(
    (
        *_stem("conv1.0", "conv1.1"),
        *_normed("conv1.3", "conv1.4", "encoder/stem/0"),
        *_normed("conv1.6", "bn1", "encoder/stem/1"),
    )
)


def _shortcut(conv: str, norm: str) -> Table:
    at = f"{_AT}.downsample"
    return Table(_normed(f"{at}.{conv}", f"{at}.{norm}", f"{BLOCK}/shortcut", projects))


# The shortcut's convolution is the first module, or the second after a pooling.
_STRIDED, _POOLED = _shortcut("0", "1"), _shortcut("1", "2")
_DEEP, _AVERAGED = arguments.DEEP_STEM, arguments.POOLED_SHORTCUT
_SECOND = re.compile(r"layer\d+\.0\.downsample\.1\.weight")


def _averaged(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the second module of a shortcut is a convolution, and so the first one a pooling."""
    return any(_SECOND.fullmatch(name) and len(t.shape) == 4 for name, t in tensors.items())


def _timm_pick(tensors: Mapping[str, Tensor]) -> str:
    found = {_DEEP: "conv1.0.weight" in tensors, _AVERAGED: _averaged(tensors)}
    return "+".join(name for name, holds in found.items() if holds)


def _timm_code(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"shortcut": "pooled" if _averaged(tensors) else "strided"}


TIMM_STYLE = Style(
    "timm_resnet",
    "timm's and torchvision's ResNet",
    "resnet",
    {
        "": _PLAIN_STEM + _BRANCH + _STRIDED + _COUNTERS,
        _DEEP: _DEEP_STEM + _BRANCH + _STRIDED + _COUNTERS,
        _AVERAGED: _PLAIN_STEM + _BRANCH + _POOLED + _COUNTERS,
        f"{_DEEP}+{_AVERAGED}": _DEEP_STEM + _BRANCH + _POOLED + _COUNTERS,
    },
    ("layer1.0.conv1.weight", "layer1.0.bn1.weight", "bn1.weight"),
    pick=_timm_pick,
    code=_timm_code,
)

# --- Hugging Face

_LAYER = "encoder.stages.{s}.layers.{b}"


def _hf(name: str, path: str, where: Where | None = None) -> tuple[Rule, ...]:
    return _normed(f"{name}.convolution", f"{name}.normalization", path, where)


_HF = Table(
    (
        *_stem("embedder.embedder.convolution", "embedder.embedder.normalization"),
        *_hf(f"{_LAYER}.layer.0", f"{BLOCK}/branch/0"),
        *_hf(f"{_LAYER}.layer.1", f"{BLOCK}/branch/1"),
        *_hf(f"{_LAYER}.layer.2", f"{BLOCK}/branch/2", is_bottleneck),
        *_hf(f"{_LAYER}.shortcut", f"{BLOCK}/shortcut", projects),
    ),
)


def _hf_code(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    del tensors
    return {"shortcut": "strided", "norm_eps": 1e-5}


STYLES = (
    TIMM_STYLE,
    Style(
        "hf_resnet",
        "transformers' ResNetModel",
        "resnet",
        {"": _HF + Table(optional(linear("../classifier.1", "head"))) + _COUNTERS},
        (
            "embedder.embedder.convolution.weight",
            f"{_LAYER}.layer.0.convolution.weight".format(s=0, b=0),
        ),
        bases=("resnet.",),
        code=_hf_code,
        configs=("resnet",),
    ),
)

# --- classes of other libraries that networks can be written for


def _counters(table: Table) -> Callable[[ModelSpec], dict[str, np.ndarray]]:
    """The counters beside the running statistics of a table; both libraries ask for them."""

    def made(spec: ModelSpec) -> dict[str, np.ndarray]:
        names = (name for step, _ in steps(table, spec.arch) for name in step.names)
        means = [name for name in names if name.endswith(".running_mean")]
        return {re.sub(r"running_mean$", _COUNTER, name): np.zeros((), np.int64) for name in means}

    return made


def _timm_counters(spec: ModelSpec, paths: Set[str]) -> dict[str, np.ndarray]:
    del paths
    return _counters(TIMM_STYLE.tables[arguments.resnet_variant(spec)])(spec)


def _blocks(model: Any) -> list[Any]:
    trunk = getattr(model, "resnet", model)
    return [block for stage in trunk.encoder.stages for block in stage.layers]


def _fields(spec: ModelSpec) -> dict[str, Any]:
    """What config.json says."""
    arch = spec.arch
    return {
        "embedding_size": arch["stem_widths"][-1],
        "hidden_sizes": arch["widths"],
        "depths": arch["depths"],
        "layer_type": "bottleneck" if arch["bottleneck"] else "basic",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": arch["bottleneck"] and arch["stride_at"] == "first",
    }


_NEEDS = (PLAIN_STEM, STRIDED_SHORTCUT, WIDTHS_OF_4, RELU, EPSILON_1E5)
_HF_WHOLE = prefixed(_HF, "resnet.") + Table(linear("classifier.1", "head"))
_COMMON: dict[str, Any] = {"model_type": "resnet", "fields": _fields, "blocks": _blocks}

LAYOUTS = (
    Timm(
        "ResNet",
        "resnet",
        _PLAIN_STEM + _BRANCH + _STRIDED,
        (ONE_BASE_WIDTH, STRIDES_IN_3X3, EPSILON_1E5, arguments.KNOWN_STEM),
        style=TIMM_STYLE,
        variant=arguments.resnet_variant,
        parts=arguments.resnet_parts,
        arguments=arguments.resnet_arguments,
        base=arguments.resnet_base,
        alike=arguments.resnet_alike,
        extra=_timm_counters,
        first="conv1",
        last="fc",
        sized=False,
    ),
    HuggingFace("ResNetModel", "resnet", _HF, _NEEDS, extra=_counters(_HF), **_COMMON),
    HuggingFace(
        "ResNetForImageClassification",
        "resnet",
        _HF_WHOLE,
        (*_NEEDS, HAS_HEAD_ON_MEAN),
        extra=_counters(_HF_WHOLE),
        **_COMMON,
    ),
)

FAMILY = Family("resnet", (), LAYOUTS, styles=STYLES)
