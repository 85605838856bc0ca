"""Reads a table in both directions: a file into parameters, parameters into a file.

A table is matched against a whole file at once. Every missing tensor, every leftover, every wrong
shape and dtype is in one error; nothing is skipped because no rule names it.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import fnmatch
from typing import Any

import numpy as np

from fd_jax.convert.containers.tensors import Tensor
from fd_jax.convert.rules.names import summarize
from fd_jax.convert.rules.tables import Step, Table, instances, steps
from fd_jax.convert.rules.transforms import Shape
from fd_jax.errors import ConversionError

FLOATS = ("float32", "float16", "bfloat16")
# Parts of which every parameter has to be filled, where a network has them.
NEEDED = ("encoder/", "pool/", "segmenter/", "segmenter_statistics/")


@dataclasses.dataclass(frozen=True)
class Match:
    """A table matched against a file.

    Attributes:
      steps: what to convert, in table order.
      dropped: reason -> names of the tensors left behind for it.
      problems: what does not fit, one line each; empty for a file that fits.
      found: how many of the expected tensors are there with the right shape and dtype.
      expected: how many there should be.
    """

    steps: list[Step]
    dropped: dict[str, list[str]]
    problems: list[str]
    found: int
    expected: int


def match(
    table: Table,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
    arch: Mapping[str, Any],
) -> Match:
    """Matches a table against the tensors of a file, without reading any values but derived ones.

    Args:
      table: for the names of this kind of file.
      tensors: by name, prefixes already stripped.
      shapes: of every parameter the model may have, by path. A size may be a letter: the file
        decides it, and the same letter means the same size everywhere.
      arch: the architecture keywords.
    """
    taken, problems, claimed, filled = [], [], set(), set()
    letters: dict[str, int] = {}
    found = expected = 0
    for step, optional in steps(table, arch):
        claimed.update(step.names)
        if optional and not any(name in tensors for name in step.names):
            continue
        expected += len(step.names)
        wrong = list(_mismatches(step, tensors, shapes, letters))
        found += len(step.names) - len(wrong)
        problems += wrong
        filled.update(step.paths)
        taken.append(step)
    problems += _check_derived(table, tensors, arch, claimed)
    # Not the file's fault: the table does not cover the model.
    needed = {path for path in shapes if path.startswith(NEEDED)}
    problems += [f"no rule fills the parameter {path}" for path in sorted(needed - filled)]
    dropped: dict[str, list[str]] = {}
    leftover = []
    for name in tensors:
        if name not in claimed:
            reason = _drop_reason(table, name)
            dropped.setdefault(reason, []).append(name) if reason else leftover.append(name)
    problems += [f"unexpected {line}" for line in summarize(leftover)]
    problems += [
        f"missing {drop.names}, {drop.why}"
        for drop in table.drops
        if drop.required and not fnmatch.filter(tensors, drop.names)
    ]
    return Match(taken, dropped, problems, found, expected)


def convert(
    found: Match, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Runs a match: yields (parameter path, what makes its array in the file's dtype)."""
    for step in found.steps:
        for index, path in enumerate(step.paths):

            def load(step=step, index=index):
                arrays = (tensors[name].load() for name in step.names)
                return step.transform.forward(*arrays)[index]

            yield path, load


def invert(
    table: Table, params: Mapping[str, np.ndarray], arch: Mapping[str, Any], *, derived: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads a table from right to left: yields (name in the file, array).

    Args:
      table: for the names to write.
      params: by path; parts that no rule of the table names are the caller's business.
      arch: the architecture keywords.
      derived: whether tensors that follow from the architecture are written too.

    Raises:
      ConversionError: the table needs parameters that the model does not have.
    """
    missing = []
    for step, optional in steps(table, arch):
        absent = [path for path in step.paths if path not in params]
        if absent:
            missing += [] if optional else absent
            continue
        arrays = step.transform.inverse(*(params[path] for path in step.paths))
        yield from zip(step.names, arrays, strict=True)
    if missing:
        raise ConversionError(
            "this model lacks what the layout needs: " + "; ".join(summarize(missing))
        )
    if derived:
        for item in table.derived:
            for place, (name,) in instances((item.name,), arch, item.where):
                yield name, item.compute(arch, place)


def _mismatches(
    step: Step, tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], letters: dict[str, int]
) -> Iterator[str]:
    wanted = step.transform.file_shapes(*(shapes[path] for path in step.paths))
    for name, shape in zip(step.names, wanted, strict=True):
        tensor = tensors.get(name)
        if tensor is None:
            yield f"missing {name} {_show(shape)}"
        elif not _same_shape(tensor.shape, shape, letters):
            yield f"{name} has shape {_show(tensor.shape)}, expected {_show(shape)}"
        elif tensor.dtype not in FLOATS:
            yield f"{name} has dtype {tensor.dtype}, expected one of {', '.join(FLOATS)}"


def _same_shape(found: tuple[int, ...], wanted: Shape, letters: dict[str, int]) -> bool:
    if len(found) != len(wanted):
        return False
    return all(
        size == (letters.setdefault(want, size) if isinstance(want, str) else want)
        for size, want in zip(found, wanted, strict=True)
    )


def _show(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _check_derived(
    table: Table, tensors: Mapping[str, Tensor], arch: Mapping[str, Any], claimed: set[str]
) -> Iterator[str]:
    for item in table.derived:
        for place, (name,) in instances((item.name,), arch, item.where):
            wanted = item.compute(arch, place)
            claimed.add(name)
            tensor = tensors.get(name)
            if tensor is None:
                if not item.optional:
                    yield f"missing {name} {_show(wanted.shape)}"
            elif tensor.shape != wanted.shape:
                yield f"{name} has shape {_show(tensor.shape)}, expected {_show(wanted.shape)}"
            elif not np.allclose(tensor.load(), wanted, rtol=item.tolerance, atol=0):
                yield f"{name} does not hold the values that follow from the architecture"


def _drop_reason(table: Table, name: str) -> str | None:
    return next((d.why for d in table.drops if fnmatch.fnmatchcase(name, d.names)), None)
