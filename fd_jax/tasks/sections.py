"""What a config says about each of its teachers, whichever way it names them.

`config.teachers` has a section for each teacher. Before there could be several, `config.teacher`
had its network, `config.target` its target and `config.loss_beta` its loss; such configs mean what
they always did.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, Literal

from fd_jax import losses
from fd_jax.errors import ConfigError
from fd_jax.tasks.target import Target
from fd_jax.typing import Config

# The name of the teacher in a run with a single one, whatever its config calls it. Its weights and
# its projector are not nested under a name, so that the trees are those of one network.
SINGLE_TEACHER = ""
# The sections by which a config names its teachers.
ONE, SEVERAL = "teacher", "teachers"
# Fields of a config that are those of a section in `config.teachers`.
OF_ONE = ("teacher", "target", "loss_beta")

ProjectorKind = Literal["linear", "mlp"]


@dataclasses.dataclass(frozen=True)
class Loss:
    """How far a prediction is from its target.

    Attributes:
      weights: of the distances in `losses.DISTANCES` by their names; 0 leaves one out.
      beta: of the smooth L1 loss.
      class_share: share of the class token in the loss, and the patches have the rest. 0 takes the
        mean over all tokens, as the paper does.
    """

    weights: Mapping[str, float]
    beta: float
    class_share: float = 0.0


@dataclasses.dataclass(frozen=True)
class ProjectorShape:
    """The map from the student's tokens to the teacher's width.

    Attributes:
      kind: "linear", or "mlp" for two layers with GELU between them.
      hidden: width between the two layers; 0 for that of the teacher.
      separate: whether the class token has a projector of its own.
    """

    kind: ProjectorKind = "linear"
    hidden: int = 0
    separate: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """What a config says about one teacher.

    Attributes:
      name: of the teacher in `config.teachers`; "" for `config.teacher`.
      network: fields that say which network it is and how it runs, see `Teacher`.
      target: what it sets as the target.
      loss: how far a prediction is from it.
      projector: how the student predicts it.
      weight: of its loss in the sum over the teachers.
      parts: number of equal parts of a batch that it sees one after another.
    """

    name: str
    network: Config
    target: Target
    loss: Loss
    projector: ProjectorShape = ProjectorShape()
    weight: float = 1.0
    parts: int = 1

    @property
    def role(self) -> str:
        """Its name for people: "teacher", or "teacher" and its name."""
        return f"teacher {self.name}".rstrip()

    def field(self, name: str) -> str:
        """The full name of one of its fields, such as "image_size" or "target.resample"."""
        if self.name:
            return f"{SEVERAL}.{self.name}.{name}"
        return name if "." in name else f"{ONE}.{name}"


def of(config: Config) -> dict[str, Section]:
    """The section of each teacher by its name, in the order of the alphabet.

    The only one is named `SINGLE_TEACHER`.

    Raises:
      ConfigError: the config names teachers in both ways, or a target is impossible.
    """
    if problem := conflict(config):
        raise ConfigError(problem)
    if SEVERAL not in config:
        return {SINGLE_TEACHER: _of_one(config)}
    named = {name: _of_several(name, config[SEVERAL][name]) for name in sorted(config[SEVERAL])}
    return {SINGLE_TEACHER: next(iter(named.values()))} if len(named) == 1 else named


def conflict(config: Config) -> str:
    """What is wrong with a config that names teachers in both ways; "" for others."""
    both = [name for name in OF_ONE if name in config]
    if SEVERAL not in config or not both:
        return ""
    names = ", ".join(config[SEVERAL]) or "nothing"
    return (
        f"the config has teachers ({names}), and also {', '.join(both)}, which are the fields of a "
        "single teacher: leave out one of the two"
    )


def _of_one(config: Config) -> Section:
    loss = Loss({"smooth_l1": 1.0}, beta=config.loss_beta)
    return Section("", config.teacher, Target(**config.target), loss)


def _of_several(name: str, section: Config) -> Section:
    fields: dict[str, Any] = section.loss.to_dict()
    weights = {distance: fields.pop(distance) for distance in losses.DISTANCES}
    try:
        target = Target(**section.target)
    except ConfigError as error:
        raise ConfigError(f"{SEVERAL}.{name}: {error}") from None
    return Section(
        name,
        section,
        target,
        Loss(weights, **fields),
        ProjectorShape(**section.projector),
        weight=section.weight,
        parts=section.parts,
    )
