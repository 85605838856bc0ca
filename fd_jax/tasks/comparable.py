"""Whether a student can learn from a teacher: the tokens and the grids of both sides."""

from typing import Any

from fd_jax.errors import ConfigError
from fd_jax.tasks.sections import Section


def check_tokens(section: Section, student: Any, teacher: Any) -> None:
    """That both sides have the tokens that target, loss and projector are about.

    Args:
      section: what the config says about the teacher.
      student: student network.
      teacher: teacher.

    Raises:
      ConfigError: something is about the class token, and one side has none.
    """
    of_class = {
        "target.kind": section.target.kind if section.target.kind == "cls" else "",
        "loss.class_share": section.loss.class_share,
        "projector.separate": section.projector.separate,
    }
    for name, value in of_class.items():
        if value and not (student.cls and teacher.cls):
            raise ConfigError(
                f"{section.field(name)}={value!r} needs a class token on both sides; student "
                f"has {student.cls}, teacher has {teacher.cls}"
            )


def check_relation(section: Section, tokens: int) -> None:
    """That a relation loss has at least two of the target's tokens to compare.

    Raises:
      ConfigError: it has fewer.
    """
    compared = tokens - bool(section.loss.class_share)
    if section.loss.weights.get("relation") and compared < 2:
        raise ConfigError(
            f"{section.field('loss.relation')} compares tokens with each other, and the target "
            f"has only {compared}: set it to 0, or use a target with more tokens"
        )


def check_grids(section: Section, student: Any, teacher: Any) -> None:
    """That maps of unequal grids are resized; arguments as in `check_tokens`.

    Raises:
      ConfigError: they are not.
    """
    target, differ = section.target, student.grid != teacher.grid
    if differ and target.kind == "full" and target.resample == "none":
        want = teacher.token_side * student.grid[0]
        raise ConfigError(
            f"teacher grid {teacher.grid} != student grid {student.grid}: "
            f"set {section.field('image_size')} to {want}, or "
            f"{section.field('target.resample')} to 'bilinear'"
        )
