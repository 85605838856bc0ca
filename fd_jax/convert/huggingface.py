"""What the files of transformers have in common: config.json and the classes that read them."""

from collections.abc import Callable, Mapping, Set
import dataclasses
from typing import Any

import numpy as np

from fd_jax.convert.layout import Fit, Layout, Need
from fd_jax.models import sizes
from fd_jax.models.spec import ModelSpec

# transformers' names of activations; its "gelu" is the erf one.
_ACTIVATIONS = {
    "gelu": "gelu_erf",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}

# What its image classifiers need; those of Swin read the mean token and no other.
HAS_HEAD = Need("a classifier head", lambda spec, paths: "head/kernel" in paths)
HAS_HEAD_ON_MEAN = Need(
    "a classifier head on the mean token",
    lambda spec, paths: "head/kernel" in paths and spec.pooling == "mean",
)


def _no_fields(spec: ModelSpec) -> dict[str, Any]:
    del spec
    return {}


def _no_tensors(spec: ModelSpec) -> dict[str, np.ndarray]:
    del spec
    return {}


def _as_returned(model: Any, tokens: Any) -> Any:
    del model
    return tokens


@dataclasses.dataclass(frozen=True)
class HuggingFace(Layout):
    """The names of a model class of transformers.

    Attributes:
      model_type: as in config.json.
      fields: (spec) -> the fields of config.json beyond those that all classes share.
      extra: (spec) -> tensors the class asks for that no network here has.
      final_tokens: (model, its last hidden state) -> the tokens after the final norm.
    """

    model_type: str = ""
    fields: Callable[[ModelSpec], dict[str, Any]] = _no_fields
    extra: Callable[[ModelSpec], dict[str, np.ndarray]] = _no_tensors
    final_tokens: Callable[[Any, Any], Any] = _as_returned

    @property
    def label(self) -> str:
        """What errors call it."""
        return f"{self.class_name} of transformers"

    def fit(self, spec: ModelSpec, paths: Set[str]) -> Fit:
        """Whether the layout holds a network, and what is in the way; arguments as in `Layout`."""
        fit = super().fit(spec, paths)
        # Most of these classes take the tables in a file for those of a square. BeitModel takes
        # one of another shape without an error, and exchanges its axes.
        height, width = sizes.sides(spec.arch["image_size"])
        lacking = fit.lacking if height == width else ["a square input", *fit.lacking]
        return dataclasses.replace(fit, lacking=lacking)

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """The contents of config.json."""
        arch = spec.arch
        config = {
            "model_type": self.model_type,
            "architectures": [self.class_name],
            "dtype": "float32",
            "image_size": arch["image_size"],
            "patch_size": arch["patch_size"],
            "num_channels": 3,
            "layer_norm_eps": arch["norm_eps"],
            "hidden_act": _THEIR_ACTIVATIONS[arch["activation"]],
            **self.fields(spec),
        }
        if spec.classes:
            config["id2label"] = {str(i): f"LABEL_{i}" for i in range(spec.classes)}
            config["label2id"] = {f"LABEL_{i}": i for i in range(spec.classes)}
        return config


def vit_fields(spec: ModelSpec) -> dict[str, Any]:
    """The sizes of a vision transformer, as all its classes call them."""
    return {
        "hidden_size": spec.arch["width"],
        "num_hidden_layers": spec.arch["depth"],
        "num_attention_heads": spec.arch["heads"],
        "intermediate_size": spec.arch["mlp_width"],
    }


def preprocessor(spec: ModelSpec) -> dict[str, Any]:
    """The contents of preprocessor_config.json."""
    size = spec.arch["image_size"]
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": spec.pixel_scale,
        "do_normalize": True,
        "image_mean": spec.mean,
        "image_std": spec.std,
    }


def config_conflicts(config: Mapping[str, Any], arch: Mapping[str, Any]) -> list[str]:
    """What a config.json says otherwise than the architecture."""
    vision = config.get("vision_config")
    fields = {**config, **(vision if isinstance(vision, dict) else {})}
    problems = []
    act = fields.get("hidden_act", fields.get("hidden_activation"))
    if act is not None and _ACTIVATIONS.get(act, act) != arch["activation"]:
        problems.append(f"config.json says hidden_act {act!r}, expected {arch['activation']}")
    eps = fields.get("layer_norm_eps")
    if eps is not None and eps != arch["norm_eps"]:
        problems.append(f"config.json says layer_norm_eps {eps}, expected {arch['norm_eps']}")
    return problems
