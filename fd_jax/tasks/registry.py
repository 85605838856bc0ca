"""Creates the task that a config selects; the only place that lists all kinds of task.

A config selects a task by the section it has: `teacher` or `teachers` for distillation, `model` for
classification, `segment` for segmentation, `contrast` for contrastive training. A new task is a new
`Kind` in `KINDS`.
"""

from collections.abc import Callable, Mapping
import dataclasses

from fd_jax.data import elements
from fd_jax.data.elements import Elements
from fd_jax.data.resolutions import Resolutions
from fd_jax.errors import ConfigError
from fd_jax.models.spec import ModelSpec
from fd_jax.tasks import sections, stored
from fd_jax.tasks.base import Task
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.tasks.contrast import ContrastiveTask
from fd_jax.tasks.distill import DistillTask
from fd_jax.tasks.segment import SegmentTask
from fd_jax.typing import Config

# Roles of the networks that a run reads, as a plan prints them.
TEACHER, INIT_FROM = "teacher", "starts from"

Specs = Mapping[str, ModelSpec]  # by role; for networks that are planned without their folders


@dataclasses.dataclass(frozen=True)
class Network:
    """A network that a run reads from a model folder.

    Attributes:
      role: `TEACHER`, followed by its name if the config gives it one, or `INIT_FROM`.
      path: its folder, or "" if the config names none.
      source: name of the converter source it comes from; "" if the config leaves it open, None if
        the config has no field for it.
      field: config field of `source`, or "".
      needs_head: whether the run uses its classifier head.
      optional: whether the run starts from random weights if there is no folder.
    """

    role: str
    path: str
    source: str | None = None
    field: str = ""
    needs_head: bool = False
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of task.

    Attributes:
      name: name of the kind for people.
      section: config field whose presence selects this kind, and which names it in tables.
      make: (config, specs) -> task; `specs` replace the specs in the networks' folders.
      networks: config -> the networks that the run reads.
      example: image size -> the elements that the data has for each example.
      more: config -> the elements that examples have besides.
      alias: another config field that selects it; "" for none.
    """

    name: str
    section: str
    make: Callable[[Config, Specs], Task]
    networks: Callable[[Config], list[Network]]
    example: Callable[[int], Elements] = elements.labelled_image
    more: Callable[[Config], Elements] = lambda config: {}
    alias: str = ""

    def describes(self, config: Config) -> bool:
        """Whether a config selects this kind."""
        return self.section in config or bool(self.alias) and self.alias in config

    def elements(self, config: Config) -> Elements:
        """The elements of a run's largest batches, without opening its data."""
        example = self.example(Resolutions.of(config).every[-1])
        return elements.of_batch({**example, **self.more(config)})


def _teachers(config: Config) -> list[Network]:
    return [
        Network(
            section.role,
            section.network.path,
            source=section.network.source,
            field=section.field("source"),
            needs_head=section.target.kind == "logits",
        )
        for section in sections.of(config).values()
        if not stored.folder_of(section)  # then it is not read
    ]


def _student(config: Config) -> list[Network]:
    folder = config.student.get("init_from", "")
    return [Network(INIT_FROM, folder)] if folder else []


def _distillation(config: Config, specs: Specs) -> Task:
    named = {name: section.role for name, section in sections.of(config).items()}
    found = {name: specs[role] for name, role in named.items() if role in specs}
    return DistillTask(config, teacher_specs=found, student_spec=specs.get(INIT_FROM))


DISTILLATION = Kind(
    "distillation",
    sections.ONE,
    _distillation,
    lambda config: [*_teachers(config), *_student(config)],
    more=stored.elements,
    alias=sections.SEVERAL,
)
CLASSIFICATION = Kind(
    "classification",
    "model",
    lambda config, specs: ClassifyTask(config, init_spec=specs.get(INIT_FROM)),
    lambda config: [Network(INIT_FROM, config.init_from, optional=bool(config.model.family))],
)
SEGMENTATION = Kind(
    "segmentation",
    "segment",
    lambda config, specs: SegmentTask(config, init_spec=specs.get(INIT_FROM)),
    lambda config: [Network(INIT_FROM, config.init_from, optional=bool(config.segment.family))],
    elements.labelled_pixels,
)
CONTRAST = Kind(
    "contrastive training",
    "contrast",
    lambda config, specs: ContrastiveTask(config),
    lambda config: [],
)
KINDS = (DISTILLATION, CLASSIFICATION, SEGMENTATION, CONTRAST)


def kind_of(config: Config) -> Kind:
    """The kind of task that a config selects.

    Raises:
      ConfigError: the config has none of the sections that select a task.
    """
    for kind in KINDS:
        if kind.describes(config):
            return kind
    sections = " nor ".join(f"a {kind.section}" for kind in KINDS)
    raise ConfigError(f"the config has neither {sections}: no task can train it")


def make(config: Config, specs: Specs | None = None) -> Task:
    """Creates the task that a config selects.

    Args:
      config: see configs/base.py for the fields.
      specs: specs by role for networks whose folders are not read.

    Raises:
      UserError: the config selects no task, or its settings cannot work together.
    """
    return kind_of(config).make(config, specs or {})
