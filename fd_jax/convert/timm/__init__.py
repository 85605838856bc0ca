"""What the folders of timm have in common: config.json with the arguments that make a network.

`timm.create_model("local-dir:FOLDER")` makes the network that config.json names, an architecture
and arguments that replace its own. Epsilons of norms and classes of layers are no values of JSON,
so the architecture has to have the right ones; every other argument is given.
"""

from collections.abc import Callable, Mapping, Set
import dataclasses
import math
from typing import Any

import numpy as np

from fd_jax.convert import published
from fd_jax.convert.layout import Fit, Layout, Need
from fd_jax.convert.rules.tables import Table
from fd_jax.convert.style import Style, variant_name
from fd_jax.models import sizes
from fd_jax.models.cropping import EVAL_RATIO
from fd_jax.models.rotary import Rope
from fd_jax.models.spec import ModelSpec
from fd_jax.models.vit import ROTARY

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# timm's names of activations; its "gelu" is the erf one.
ACTIVATIONS = {"gelu_erf": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
ACTIVATIONS |= {"silu": "silu", "relu": "relu"}

PIXELS = Need("pixels scaled by 1/255", lambda spec, paths: math.isclose(spec.pixel_scale, 1 / 255))
# Facts by which a published architecture is recognised, so that its name can be written.
_ALIKE = (
    "patch_size width depth heads mlp_width activation norm_eps gated_mlp registers mlp_norm "
    "attn_norm embed_width depths window mlp_ratio pretrained_windows widths grn stem_widths "
    "inner_widths bottleneck shortcut"
).split()
_PLAIN = {"gated_mlp": False, "mlp_norm": False, "attn_norm": False}
_OTHER_CLASS = "distilled"  # in the names of architectures of a class of their own
_ROPE = {f"rope_{field.name}": field.default for field in dataclasses.fields(Rope)}
_ROPE["rope_theta"] = 100.0  # where an architecture does not say it

Arguments = dict[str, Any]


def _no_parts(spec: ModelSpec, paths: Set[str]) -> set[str]:
    del spec, paths
    return set()


def _no_arguments(spec: ModelSpec, variant: str, parts: Set[str]) -> Arguments:
    del spec, variant, parts
    return {}


def _no_tensors(spec: ModelSpec, paths: Set[str]) -> dict[str, np.ndarray]:
    del spec, paths
    return {}


def _only_table(spec: ModelSpec) -> str:
    del spec
    return ""


def _scaled_alike(facts: Mapping[str, Any], spec: ModelSpec) -> bool:
    return (facts.get("layer_scale") is None) == (spec.arch.get("layer_scale") is None)


def _no_base(spec: ModelSpec, parts: Set[str]) -> str:
    del spec, parts
    return ""


@dataclasses.dataclass(frozen=True)
class Timm(Layout):
    """The names of a class of timm, and the arguments that make its networks.

    Its files hold no index buffers, which timm computes.

    Attributes:
      style: of its files; the tables of the style are those of the class.
      variant: (spec) -> which of these tables a network of another library gets.
      apart: needs that tell the class from others of timm; a network from a file of its own is
        not asked for them.
      parts: (spec, parameter paths) -> the parts beside the encoder that the class has as well.
      arguments: (spec, variant, parts) -> arguments of `create_model`. None is no value: it would
        leave the architecture's own.
      base: (spec, parts) -> an architecture whose arguments that no config can hold are right.
      alike: (facts of an architecture, spec) -> whether what no config can hold is the same; the
        facts of `_ALIKE` are.
      extra: (spec, parameter paths) -> tensors the class always has, and this network does not.
      first: the name of the convolution that reads pixels.
      last: the name of the classifier.
      sized: whether a network is made for one size of image.
    """

    style: Style = dataclasses.field(kw_only=True)
    variant: Callable[[ModelSpec], str] = _only_table
    apart: tuple[Need, ...] = ()
    parts: Callable[[ModelSpec, Set[str]], set[str]] = _no_parts
    arguments: Callable[[ModelSpec, str, Set[str]], Arguments] = _no_arguments
    base: Callable[[ModelSpec, Set[str]], str] = _no_base
    alike: Callable[[Mapping[str, Any], ModelSpec], bool] = _scaled_alike
    extra: Callable[[ModelSpec, Set[str]], dict[str, np.ndarray]] = _no_tensors
    first: str = "patch_embed.proj"
    last: str = "head"
    sized: bool = True

    @property
    def label(self) -> str:
        """What errors call it."""
        return f"{self.class_name} of timm"

    def own(self, spec: ModelSpec) -> bool:
        """Whether a network came from a file of this class."""
        return spec.source.partition(":")[0] == self.style.name

    def names(self, spec: ModelSpec) -> str:
        """The variant of the names that a network is written in: its own if it has one."""
        if not self.own(spec):
            return self.variant(spec)
        words = spec.source.partition(":")[2].split("+")
        # A distillation token is a register of the plain class, which has no second head.
        found = variant_name(*(word for word in words if word != _OTHER_CLASS))
        return found if found in self.style.tables else self.variant(spec)

    def rules(self, spec: ModelSpec) -> Table:
        """The rules of the class for one network, also for parameters that it may not have."""
        return self.style.tables[self.names(spec)]

    def fit(self, spec: ModelSpec, paths: Set[str]) -> Fit:
        """Whether the class holds a network, and what is in the way; arguments as in `Layout`."""
        held = self._held(spec, paths)
        fit = super().fit(spec, held)
        needs = (PIXELS, *(() if self.own(spec) else self.apart))
        lacking = [need.words for need in needs if not need.holds(spec, paths)]
        return dataclasses.replace(
            fit, lacking=[*fit.lacking, *lacking], left=sorted({*fit.left, *(paths - held)})
        )

    def _held(self, spec: ModelSpec, paths: Set[str]) -> set[str]:
        """The parameters of the encoder and of the parts that the class has."""
        kept = {"encoder", *self.parts(spec, paths)}
        return {path for path in paths if path.partition("/")[0] in kept}

    def config(self, spec: ModelSpec, paths: Set[str]) -> dict[str, Any]:
        """The contents of config.json.

        Args:
          spec: of a network that the class holds.
          paths: its parameters.
        """
        parts = {path.partition("/")[0] for path in self._held(spec, paths)}
        classes = spec.classes if "head" in parts else 0
        arguments = {
            "num_classes": classes,
            "global_pool": _pooling(spec, parts),
            **self.arguments(spec, self.names(spec), parts),
        }
        height, width = sizes.sides(spec.arch["image_size"])
        names = {"label_names": spec.class_names} if classes and spec.class_names else {}
        return {
            "architecture": self.architecture(spec, parts),
            "num_classes": classes,
            "global_pool": arguments["global_pool"],
            **names,
            "model_args": arguments,
            "pretrained_cfg": {
                "custom_load": False,
                "input_size": [3, height, width],
                "fixed_input_size": self.sized and not arguments.get("dynamic_img_size", False),
                "interpolation": "bicubic",
                "crop_pct": 1 / EVAL_RATIO,
                "crop_mode": "center",
                "mean": list(spec.mean),
                "std": list(spec.std),
                "num_classes": classes,
                "pool_size": None,
                "first_conv": self.first,
                "classifier": self.last,
            },
        }

    def architecture(self, spec: ModelSpec, parts: Set[str]) -> str:
        """The published architecture that a network has, or else one that the arguments change."""
        turned = _ROPE if spec.arch.get("position") in ROTARY else {"rope_theta": None}
        given = {**_PLAIN, **turned, **spec.arch}
        given = {name: value for name, value in given.items() if name in (*_ALIKE, *turned)}
        found = [
            (facts["image_size"] != spec.arch["image_size"], len(name), name)
            for name, facts in published.alike("timm", self.style.name, given)
            if _OTHER_CLASS not in name
            and self.alike(facts, spec)
            and ("pool" in facts) == ("pool" in parts)
        ]
        return min(found)[-1] if found else self.base(spec, parts)


def _pooling(spec: ModelSpec, parts: Set[str]) -> str:
    """What timm's head would read."""
    if "pool" in parts:
        return "map"
    reads = spec.pooling == "cls" or parts.isdisjoint({"head", "fc_norm"})
    return "token" if reads and spec.arch.get("cls_token") else "avg"


def head_on(*poolings: str) -> Callable[[ModelSpec, Set[str]], set[str]]:
    """`Timm.parts` of a class whose head reads one of these vectors."""

    def parts(spec: ModelSpec, paths: Set[str]) -> set[str]:
        return {"head"} if "head/kernel" in paths and spec.pooling in poolings else set()

    return parts


def ratio(hidden: int, width: int) -> float:
    """The factor by which timm, which rounds down, makes hidden channels of a width."""
    found = hidden / width
    return found if int(width * found) == hidden else (hidden + 0.5) / width


def scale(spec: ModelSpec) -> float:
    """The start of a layer scale; 0 is none to those classes that test whether it is true."""
    start = spec.arch["layer_scale"]
    return 0.0 if start is None else start or 1e-5


def calls(config: Mapping[str, Any], folder: Any) -> list[str]:
    """How timm opens a folder, as calls that can be copied.

    Args:
      config: its config.json.
      folder: where it is.
    """
    expects = ("input_size", "fixed_input_size", "mean", "std", "crop_pct", "num_classes")
    overlay = {name: config["pretrained_cfg"][name] for name in expects}
    arguments = [f"{name}={value!r}" for name, value in config["model_args"].items()]
    call = [
        repr(config["architecture"]),
        f"checkpoint_path={f'{folder}/{WEIGHTS}'!r}",
        f"pretrained_cfg_overlay={overlay!r}",
        *arguments,
    ]
    return [
        f"opens with timm.create_model({f'local-dir:{folder}'!r}, pretrained=True)",
        f"or with timm.create_model({', '.join(call)})",
    ]
