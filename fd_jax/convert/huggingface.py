"""What the files of transformers have in common: config.json and the classes that read them."""

from collections.abc import Callable, Mapping, Set
import dataclasses
import json
from typing import Any, TypeVar

import numpy as np

from fd_jax.convert.containers.tensors import Container
from fd_jax.convert.layout import Fit, Layout, Need
from fd_jax.errors import ConversionError, UserError
from fd_jax.models import sizes
from fd_jax.models.spec import ModelSpec

# transformers' names of activations; its "gelu" is the erf one.
_ACTIVATIONS = {
    "gelu": "gelu_erf",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "relu": "relu",
}
_THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}

# What its image classifiers need: each reads one vector and no other.
HAS_HEAD_ON_CLASS = Need(
    "a classifier head on the class token",
    lambda spec, paths: "head/kernel" in paths and spec.pooling == "cls",
)
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


def _blocks(model: Any) -> list[Any]:
    """The blocks of the first list of layers; in a network with stages, those of all its layers."""
    layers = next(
        module
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in ("layer", "layers")
    )
    return [block for layer in layers for block in getattr(layer, "blocks", [layer])]


@dataclasses.dataclass(frozen=True)
class HuggingFace(Layout):
    """The names of a model class of transformers.

    Attributes:
      model_type: as in config.json.
      fields: (spec) -> the fields of config.json beyond those that all classes share.
      extra: (spec) -> tensors the class asks for, where a network lacks them.
      final_tokens: (model, its last hidden state) -> the tokens after the final norm.
      blocks: (model) -> the modules of its blocks, in their order.
    """

    model_type: str = ""
    fields: Callable[[ModelSpec], dict[str, Any]] = _no_fields
    extra: Callable[[ModelSpec], dict[str, np.ndarray]] = _no_tensors
    final_tokens: Callable[[Any, Any], Any] = _as_returned
    blocks: Callable[[Any], list[Any]] = _blocks

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
            names = spec.class_names or [""] * spec.classes
            labels = [name or _placeholder(i) for i, name in enumerate(names)]
            config["id2label"] = {str(i): label for i, label in enumerate(labels)}
            config["label2id"] = {label: i for i, label in enumerate(labels)}
        return config


def class_names(config: Mapping[str, Any] | None, classes: int) -> list[str] | None:
    """The names in a config.json; None if it has none, or not one for each output of the head."""
    found = (config or {}).get("id2label")
    if not classes or not isinstance(found, dict):
        return None
    labels = [found.get(str(i)) for i in range(classes)]
    if len(found) != classes or not all(isinstance(label, str) for label in labels):
        return None
    names = ["" if name == _placeholder(i) else str(name) for i, name in enumerate(labels)]
    return names if any(names) else None


def _placeholder(i: int) -> str:
    """What transformers calls a class without a name."""
    return f"LABEL_{i}"


def vit_fields(spec: ModelSpec) -> dict[str, Any]:
    """The sizes of a vision transformer, as all its classes call them."""
    return {
        "hidden_size": spec.arch["width"],
        "num_hidden_layers": spec.arch["depth"],
        "num_attention_heads": spec.arch["heads"],
        "intermediate_size": spec.arch["mlp_width"],
    }


def vit_act(spec: ModelSpec) -> str:
    """What transformers calls the activation of a network."""
    return _THEIR_ACTIVATIONS[spec.arch["activation"]]


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


Statistics = tuple[tuple[float, ...], tuple[float, ...]]
Made = TypeVar("Made")


def is_of(container: Container, class_name: str) -> bool:
    """Whether a file's config.json names this class of transformers."""
    architectures = (container.config or {}).get("architectures")
    return isinstance(architectures, list) and class_name in architectures


def described(
    container: Container,
    class_name: str,
    make: Callable[[Mapping[str, Any], Container], Made],
) -> Made:
    """What `make` makes of a config.json that describes the whole network.

    Raises:
      ConversionError: there is none, it is of another class, or `make` cannot read it.
    """
    where = f"{container.path}: config.json"
    if not is_of(container, class_name):
        raise ConversionError(
            f"{where} is missing or does not name {class_name}; expected a folder of that class "
            "of transformers, with config.json and the weights"
        )
    try:
        return make(container.config or {}, container)
    except UserError as error:
        raise ConversionError(f"{where} describes a network that cannot be had: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConversionError(f"{where} describes no {class_name} ({error!s:.80})") from error


def expect(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuses a config with fields that no network here has.

    Raises:
      ConversionError: the message names the fields that differ.
    """
    wrong = [
        f"{name} is {found.get(name)!r}, expected {value!r}"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    if wrong:
        raise ConversionError("; ".join(wrong))


def activation(name: str) -> str:
    """Our name of an activation.

    Raises:
      ConversionError: it has none.
    """
    if name not in _ACTIVATIONS:
        raise ConversionError(f"the activation {name!r} is unknown; expected {list(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def epsilon(value: Any) -> float:
    """The epsilon of norms.

    Raises:
      ConversionError: it is no number between 0 and 1.
    """
    if not isinstance(value, float) or not 0 < value < 1:
        raise ConversionError(f"layer_norm_eps is {value!r}, expected a number between 0 and 1")
    return value


def upernet_fields(config: Mapping[str, Any], container: Container) -> dict[str, Any]:
    """The fields of `ModelSpec.segmenter` that its UPerNets have in common.

    Raises:
      ConversionError: the heads have other parts than those here.
    """
    expected = {"pool_scales": [1, 2, 3, 6]}
    if config["use_auxiliary_head"]:
        expected |= {"auxiliary_num_convs": 1, "auxiliary_concat_input": False}
    expect({name: config.get(name) for name in expected}, expected)
    return {
        "classes": container.tensors["decode_head.classifier.bias"].shape[0],
        "decoder": "upernet",
        "channels": config["hidden_size"],
        "auxiliary_channels": config["auxiliary_channels"] if config["use_auxiliary_head"] else 0,
        "dropout": 0.1,  # transformers has none; mmsegmentation, which trained them, has this one
    }


def statistics(container: Container, default: Statistics) -> Statistics:
    """Mean and standard deviation of preprocessor_config.json beside a file, or else `default`.

    Raises:
      ConversionError: that file has no three numbers for each, or a deviation that is not positive.
    """
    folder = container.path if container.path.is_dir() else container.path.parent
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return default
    fields = json.loads(path.read_text())
    mean, std = (tuple(map(float, fields[f"image_{name}"])) for name in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3 or not np.isfinite(mean).all() or not min(std) > 0:
        raise ConversionError(f"{path} has image_mean {mean} and image_std {std}")
    return mean, std
