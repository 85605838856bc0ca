"""FLOPs of what a student learns from one map of a teacher: projector, resampling and loss."""

from fd_jax.cost import flops
from fd_jax.cost.flops import Flops
from fd_jax.tasks.target import Resample


def projector(tokens: int, width: int, hidden: int | None, out: int) -> Flops:
    """FLOPs of a projector for one image; `hidden` is the width between two layers, or None."""
    if hidden is None:
        return flops.linear(tokens, width, out)
    return flops.linear(tokens, width, hidden) + flops.linear(tokens, hidden, out)


def resampling(
    resample: Resample, grids: tuple[tuple[int, int], tuple[int, int]], widths: tuple[int, int]
) -> Flops:
    """FLOPs of one map that is resized to the other's grid; grids and widths: student, teacher.

    Rows first, by two matmuls; those of the student have a gradient as well.
    """
    (student, teacher), (student_width, teacher_width) = grids, widths
    if student == teacher:
        return Flops(0.0)
    if resample == "student":
        return flops.resized_map(student, teacher, student_width, trains=True)
    return flops.resized_map(teacher, student, teacher_width, trains=False)


def relations(tokens: int, width: int, *, separate: bool) -> Flops:
    """FLOPs of the relation loss; `separate`: whether the class token, the first, is apart.

    The similarities of both sides, and the gradient of those of the prediction.
    """
    sizes = [1, tokens - 1] if separate else [tokens]
    one = sum(2.0 * size**2 * width for size in sizes)
    return Flops(2 * one, backward=2 * one)
