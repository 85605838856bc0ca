"""The tasks that a config can ask for. Who needs a task of a config gets it here.

A config asks for the task whose section it has: `teacher` for distillation, `model` for
classification. Another task is another row.
"""

from collections.abc import Callable, Mapping
import dataclasses

from fd_jax.errors import ConfigError
from fd_jax.models.spec import ModelSpec
from fd_jax.tasks.base import Task
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.tasks.distill import DistillTask
from fd_jax.typing import Config

# Roles of networks.
TEACHER, START = "teacher", "starts from"

Specs = Mapping[str, ModelSpec]  # of networks that are planned without their folders, by role


@dataclasses.dataclass(frozen=True)
class Network:
    """A network that a run reads from a model folder.

    Attributes:
      role: what it is to the run, as a plan names it.
      path: its folder; "" where none is named.
      source: the converter source it came from, as the config names it: "" where it names none,
        None where it has no field for it.
      needs_head: whether its classifier head takes part.
      optional: whether the run starts from random weights where there is no folder.
    """

    role: str
    path: str
    source: str | None = None
    needs_head: bool = False
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of task.

    Attributes:
      name: as people say it.
      section: the config's field that asks for it.
      make: (config, specs) -> task; `specs` replace what the folders of its networks hold.
      networks: config -> the networks that a run reads.
    """

    name: str
    section: str
    make: Callable[[Config, Specs], Task]
    networks: Callable[[Config], list[Network]]


def _teachers(config: Config) -> list[Network]:
    teacher = config.teacher
    head = config.target.kind == "logits"
    return [Network(TEACHER, teacher.path, source=teacher.source, needs_head=head)]


def _start(config: Config) -> list[Network]:
    return [Network(START, config.init_from, optional=bool(config.model.family))]


DISTILLATION = Kind(
    "distillation",
    "teacher",
    lambda config, specs: DistillTask(config, teacher_spec=specs.get(TEACHER)),
    _teachers,
)
CLASSIFICATION = Kind(
    "classification",
    "model",
    lambda config, specs: ClassifyTask(config, init_spec=specs.get(START)),
    _start,
)
KINDS = (DISTILLATION, CLASSIFICATION)


def kind_of(config: Config) -> Kind:
    """The kind of task that a config asks for.

    Raises:
      ConfigError: none, since it has the section of none of them.
    """
    for kind in KINDS:
        if kind.section in config:
            return kind
    sections = " nor ".join(f"a {kind.section}" for kind in KINDS)
    raise ConfigError(f"the config has neither {sections}: no task here trains it")


def make(config: Config, specs: Specs | None = None) -> Task:
    """The task of a config.

    Args:
      config: see configs/base.py for the fields.
      specs: of networks whose folders are not read, by role.

    Raises:
      UserError: no task trains it, or its settings do not go together.
    """
    return kind_of(config).make(config, specs or {})
