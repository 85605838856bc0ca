"""Gives the files of a backbone to the converter, and compares what comes out with its library."""

from collections.abc import Iterator
import contextlib
import copy
import inspect
from pathlib import Path
import re
from typing import Any

from flax import nnx
import jax
import numpy as np

from benchmarks.coverage import making
from benchmarks.coverage.making import STAGES, Made
from fd_jax.convert import importing, published
from fd_jax.convert.importing import Imported
from fd_jax.errors import UserError
from fd_jax.models.spec import ModelSpec
from tests.convert import seeded

TOLERANCE = 1e-5  # of the largest value, float32, two blocks
_SAYS = 400  # characters of an error that are kept


def outcome(made: Made) -> dict[str, Any]:
    """What becomes of the folder, of the file alone, and of the file with the network's name."""
    with _depths_of_tables():
        alone = _outcome(made, made.file, {}, [made.size])
        named = {}
        if made.arch and "arch" in inspect.signature(importing.read).parameters:
            named = {"named": _outcome(made, made.file, {"arch": made.arch}, [made.size])}
        cut = contextlib.nullcontext() if (made.folder / "config.json").exists() else None
        folder = _outcome(made, made.folder, {}, [made.size, made.other]) if cut is None else {}
    if not folder:  # its own files say how many blocks there are
        folder = _outcome(made, made.folder, {}, [made.size, made.other])
    if alone["is"] == "asked" and made.arch and made.arch not in alone.pop("whole"):
        alone["lacks_candidate"] = made.arch
    for found in (folder, alone, *named.values()):
        found.pop("whole", None)
    return {"folder": folder, "file": alone, **named}


@contextlib.contextmanager
def _depths_of_tables() -> Iterator[None]:
    """Lets the tables of published networks have the depths of the networks made here."""
    tables = [published.table(library)["architectures"] for library in published.LIBRARIES]
    before = copy.deepcopy(tables)
    for table in tables:
        for facts in table.values():
            if "depths" in facts:
                facts["depths"] = STAGES[: len(facts["depths"])]
            elif "depth" in facts:
                facts["depth"] = 2
    try:
        yield
    finally:
        for table, old in zip(tables, before, strict=True):
            table.update(old)


def _outcome(made: Made, path: Path, options: dict[str, Any], sizes: list[int]) -> dict[str, Any]:
    """Equal, other (silently!), asked, refused or failed; with differences or the message."""
    try:
        read = importing.read("auto", path, **options)
    except UserError as error:
        text = str(error).replace(str(path), path.name).replace(str(path.parent), "")
        kind = "asked" if "--arch" in text or "say which" in text else "refused"
        return {"is": kind, "says": _short(text), "whole": text}
    except Exception as error:  # a bug of the converter is a row of the table, not its end
        return {"is": "failed", "says": _short(f"{type(error).__name__}: {error}")}
    found = {str(size): _difference(made, read, size) for size in sizes}
    numbers = [value for value in found.values() if isinstance(value, float)]
    fine = all(value < TOLERANCE for value in numbers)
    return {"is": "equal" if fine and numbers else "other", "source": read.source, **found}


def _difference(made: Made, read: Imported, size: int) -> float | str:
    """Of the features, relative to the largest; or why there are none at this size."""
    images = seeded.images(size)
    try:
        spec, encoder = read.spec.resized(read.params["encoder"], size)
    except UserError as error:
        return f"refused: {_short(str(error))}"
    try:
        with making.uninitialised():  # a library makes a new module for another size
            expected = made.features(images)
    except Exception as error:  # libraries have sizes that they cannot run, too
        return f"the library fails: {type(error).__name__}: {_short(str(error))}"
    found = tokens(spec, encoder, images)
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def tokens(spec: ModelSpec, encoder: Any, images: np.ndarray) -> np.ndarray:
    """Our features of uint8 images, in the full precision of float32. [B, N, D]"""
    definition, _ = spec.abstract()
    run = jax.jit(lambda params, pixels: nnx.merge(definition, params)(pixels).tokens)
    with jax.default_matmul_precision("highest"):
        return np.asarray(run(encoder, spec.normalize(images)))


def _short(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    return text if len(text) <= _SAYS else f"{text[:_SAYS]}..."
