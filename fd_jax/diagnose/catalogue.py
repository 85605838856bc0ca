"""The figures that can be asked for, and what each of them needs."""

from collections.abc import Collection, Sequence
import dataclasses

from fd_jax.errors import ConfigError
from fd_jax.inference import Model
from fd_jax.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Figure:
    """One name of --figures.

    Attributes:
      kind: what computes it: "attention", "landscape", "rank", "pair" or "picture".
      shows: what it shows, in a few words.
      attends: whether it shows attention, although its kind does not say so.
      swin: whether it is defined for a Swin network; if not, why.
    """

    kind: str
    shows: str
    attends: bool = False
    swin: bool | str = True

    def undefined(self, spec: ModelSpec) -> str:
        """Why it is not defined for a network; "" if it is."""
        if not spec.has_attention and (self.attends or self.kind == "attention"):
            return _NO_ATTENTION
        if isinstance(self.swin, str) and spec.family.startswith("swin"):
            return self.swin
        return ""


_NO_ATTENTION = "its blocks are convolutions and have no attention"
_WINDOWED = "its attention stays inside of windows, and its tokens merge from stage to stage"

FIGURES = {
    "distance": Figure("attention", "average attention distance of each head"),
    "similarity": Figure("attention", "cosine similarity between the heads of a layer"),
    "maps": Figure("attention", "average attention map of each layer"),
    "shares": Figure("attention", "how diagonal and how columnar the average maps are"),
    "entropy": Figure("attention", "entropy of the attention of each head"),
    "divergence": Figure("attention", "mean KL divergence between the heads of a layer"),
    "landscape": Figure("landscape", "loss and accuracy along random directions of the weights"),
    "rank": Figure("rank", "effective rank of the features after each block"),
    "cka": Figure("pair", "linear CKA between the layers of two models"),
    "cosine": Figure("pair", "cosine between the patch tokens of two models"),
    "pca": Figure("picture", "principal components of one picture's patch tokens"),
    "rollout": Figure("picture", "attention rollout of one picture", attends=True, swin=_WINDOWED),
    "heads": Figure("picture", "attention of each head for one picture", attends=True),
}
DEFAULT = [name for name, figure in FIGURES.items() if figure.kind == "attention"]


def parse(text: str) -> list[str]:
    """The names in a comma-separated list, in the order of FIGURES; "" for the attention figures.

    Raises:
      ConfigError: a name is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()] or DEFAULT
    if unknown := [name for name in names if name not in FIGURES]:
        raise ConfigError(
            f"--figures: unknown {', '.join(unknown)}; expected some of {', '.join(FIGURES)}"
        )
    return [name for name in FIGURES if name in names]


def of_kind(figures: Collection[str], kind: str) -> list[str]:
    """Those of the figures that are of a kind."""
    return [name for name in figures if FIGURES[name].kind == kind]


def check_number(figures: Sequence[str], models: int) -> None:
    """Refuses figures that compare two models if there is only one.

    Raises:
      ConfigError: a figure needs two models.
    """
    pairs = of_kind(figures, "pair")
    if pairs and models < 2:
        raise ConfigError(
            f"--figures={','.join(pairs)} compares two models; name a second one with --model"
        )


def check_networks(figures: Sequence[str], models: dict[str, Model]) -> None:
    """Refuses figures that are not defined for a network.

    Raises:
      ConfigError: a figure is undefined for a network.
    """
    for subject, model in models.items():
        reasons = {name: FIGURES[name].undefined(model.spec) for name in figures}
        undefined = [name for name in figures if reasons[name]]
        if undefined:
            raise ConfigError(
                f"--figures={','.join(undefined)}: not defined for {subject}, a network of the "
                f"family {model.spec.family!r}: {reasons[undefined[0]]}; leave the model out, or "
                f"ask for {', '.join(_defined(model.spec))}"
            )


def _defined(spec: ModelSpec) -> list[str]:
    return [name for name, figure in FIGURES.items() if not figure.undefined(spec)]
