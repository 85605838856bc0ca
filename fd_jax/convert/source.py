"""What a source is: a public file kind, where its tensors stand, and the network they make."""

from collections.abc import Mapping
import dataclasses
import functools
import json
from typing import Any

from fd_jax.convert.containers.tensors import Container, Tensor
from fd_jax.convert.rules.tables import Match, Rule, Table, match, required_names
from fd_jax.convert.rules.transforms import CONV, LINEAR, Shape
from fd_jax.model_folder import flat_shapes
from fd_jax.models.spec import ModelSpec

SIZES = {
    "S": {"width": 384, "depth": 12, "heads": 6, "mlp_width": 1536},
    "B": {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072},
    "L": {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096},
}

# transformers' names of activations; its "gelu" is the erf one.
HF_ACTIVATIONS = {
    "gelu": "gelu_erf",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One network in a file.

    Attributes:
      table: its rules.
      spec: the network, without the facts of one particular file (checksum, dtypes).
      under: prefixes of full tensor names below which it may stand; the first that occurs counts.
        "model/" is the dictionary entry "model".
      strip: prefixes taken off the remaining names, one after the other, only at the beginning.
    """

    table: Table
    spec: ModelSpec
    under: tuple[str, ...] = ("",)
    strip: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Source:
    """A public file kind that can be imported.

    Attributes:
      name: what the user types.
      file: the public file's exact name.
      parts: the networks in it by name; the first is taken unless another is asked for.
      oracle: what its features are compared with in the tests.
      note: what the keys do not tell.
      sha256: the only file this source is meant for, or None.
      published: how the SHA-256 of the public file begins, where its publisher tells (torch hub
        puts eight digits into the name); another file is imported, and told to be another.
      unstack: prefix of tensors whose leading axis is the block number, see `unstacked`.
      hf: whether a config.json beside the file names activation and epsilon as transformers does.
    """

    name: str
    file: str
    parts: Mapping[str, Part]
    oracle: str
    note: str = ""
    sha256: str | None = None
    published: str = ""
    unstack: str | None = None
    hf: bool = False

    @property
    def default_part(self) -> str:
        """The part that is imported when none is named."""
        return next(iter(self.parts))

    def match(self, container: Container, part: str) -> tuple[Match, dict[str, Tensor]]:
        """Matches the part's table against a file.

        Returns:
          The match, with all problems, and the tensors under the names the table uses.
        """
        chosen = self.parts[part]
        tensors, outside, problems = self._select(container, part)
        arch = chosen.spec.arch
        found = match(chosen.table, tensors, shapes(chosen.spec), arch)
        if outside:
            found.dropped["beside the weights"] = outside
        if self.hf and container.config is not None:
            problems = problems + config_conflicts(container.config, arch)
        return dataclasses.replace(found, problems=problems + found.problems), tensors

    def share_of_names(self, container: Container, part: str) -> float:
        """Which share of the names the part needs stands in a file; much cheaper than `match`."""
        chosen = self.parts[part]
        tensors, _, _ = self._select(container, part)
        names = required_names(chosen.table, chosen.spec.arch)
        return sum(name in tensors for name in names) / len(names)

    def _select(self, container: Container, part: str):
        tensors, outside, problems = select(self.parts[part], container.tensors)
        if self.unstack is not None:
            tensors = unstacked(tensors, self.unstack)
        return tensors, outside, problems


def select(
    part: Part, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The part's tensors under stripped names, the names of all others, and problems."""
    prefix = next((p for p in part.under if any(name.startswith(p) for name in tensors)), None)
    if prefix is None:
        wanted = " or ".join(repr(p.rstrip("/.")) for p in part.under)
        return {}, list(tensors), [f"missing the entry {wanted}, which should hold the weights"]
    chosen: dict[str, Tensor] = {}
    outside, problems = [], []
    for name, tensor in tensors.items():
        if not name.startswith(prefix):
            outside.append(name)
            continue
        short = name[len(prefix) :]
        for start in part.strip:
            short = short.removeprefix(start)
        if short in chosen:
            problems.append(f"{name} and {chosen[short].name} have the same name without prefixes")
        chosen[short] = tensor
    return chosen, outside, problems


def unstacked(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Splits tensors below `prefix`/ along their first axis into `prefix`_0/, `prefix`_1/, ..."""
    out = {}
    for name, tensor in tensors.items():
        if not name.startswith(f"{prefix}/") or not tensor.shape:
            out[name] = tensor
            continue
        for i in range(min(tensor.shape[0], 1000)):
            row = f"{prefix}_{i}/{name[len(prefix) + 1 :]}"
            out[row] = dataclasses.replace(
                tensor, name=row, shape=tensor.shape[1:], load=lambda t=tensor, i=i: t.load()[i]
            )
    return out


def shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Shape of every parameter a model folder of this network may hold, by path."""
    return _shapes(spec.family, json.dumps(spec.arch))


@functools.lru_cache(maxsize=64)
def _shapes(family: str, arch: str) -> dict[str, Shape]:
    spec = ModelSpec(family, json.loads(arch))
    width = output_width(spec.arch)
    encoder: Mapping[str, Shape] = flat_shapes({"encoder": spec.abstract()[1]})
    return {
        **encoder,
        "projector/kernel": (width, "D"),
        "projector/bias": ("D",),
        "head/kernel": (width, "K"),
        "head/bias": ("K",),
        "fc_norm/scale": (width,),
        "fc_norm/bias": (width,),
    }


def output_width(arch: Mapping[str, Any]) -> int:
    """Channels of the feature map; where there are stages, each doubles those of the one before."""
    return arch["width"] if "width" in arch else arch["embed_width"] << len(arch["depths"]) - 1


def config_conflicts(config: Mapping[str, Any], arch: Mapping[str, Any]) -> list[str]:
    """What a Hugging Face config.json says otherwise than the architecture."""
    vision = config.get("vision_config")
    fields = {**config, **(vision if isinstance(vision, dict) else {})}
    problems = []
    act = fields.get("hidden_act", fields.get("hidden_activation"))
    if act is not None and HF_ACTIVATIONS.get(act, act) != arch["activation"]:
        problems.append(f"config.json says hidden_act {act!r}, expected {arch['activation']}")
    eps = fields.get("layer_norm_eps")
    if eps is not None and eps != arch["norm_eps"]:
        problems.append(f"config.json says layer_norm_eps {eps}, expected {arch['norm_eps']}")
    return problems


def linear(source: str, target: str) -> tuple[Rule, Rule]:
    """Rules of a torch Linear with bias."""
    return (
        Rule(f"{source}.weight", f"{target}/kernel", LINEAR),
        Rule(f"{source}.bias", f"{target}/bias"),
    )


def conv(source: str, target: str) -> tuple[Rule, Rule]:
    """Rules of a torch Conv2d with bias."""
    return (
        Rule(f"{source}.weight", f"{target}/kernel", CONV),
        Rule(f"{source}.bias", f"{target}/bias"),
    )


def norm(source: str, target: str) -> tuple[Rule, Rule]:
    """Rules of a torch LayerNorm."""
    return (
        Rule(f"{source}.weight", f"{target}/scale"),
        Rule(f"{source}.bias", f"{target}/bias"),
    )
