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
from fd_jax.convert import importing, published, trees
from fd_jax.convert.importing import Imported
from fd_jax.errors import UserError
from fd_jax.models.spec import ModelSpec
from tests.convert import seeded

TOLERANCE = 1e-5  # of the largest value, float32, two blocks
TOLERANCE_WHOLE = 1e-4  # the same of whole networks
Known = tuple[dict[str, Any], Imported | None] | None
_SAYS = 400  # characters of an error that are kept


def outcome(made: Made) -> dict[str, Any]:
    """What becomes of the folder, of the file alone, and of the file with the network's name."""
    both = [made.size, made.other]
    # A folder of transformers or timm says how many blocks there are; open_clip's, of a tower of
    # timm, does not.
    described = (made.folder / "config.json").exists()
    with contextlib.nullcontext() if described else _depths_of_tables():
        folder, read = _of_folder(made, both)
    with _depths_of_tables():
        alone, _ = _outcome(made, made.file, {}, [made.size], (folder, read))
        named = {}
        if made.arch and "arch" in inspect.signature(importing.read).parameters:
            options = {"arch": made.arch}
            named["named"], _ = _outcome(made, made.file, options, [made.size], (folder, read))
    asked = alone["whole"] if alone["is"] == "asked" else ""
    if asked and made.arch not in asked and " more:" not in asked:  # long lists are cut short
        alone["lacks_candidate"] = made.arch
    for found in (folder, alone, *named.values()):
        found.pop("whole", None)
    return {"folder": folder, "file": alone, **named}


def _of_folder(made: Made, sizes: list[int]) -> tuple[dict[str, Any], Imported | None]:
    """What becomes of the folder; where facts have to be stated, also what it says without them."""
    folder, read = _outcome(made, made.folder, {}, sizes, None)
    if not made.facts or read is not None:
        return folder, read
    stated, read = _outcome(made, made.folder, {"facts": made.facts}, sizes, None)
    return {**stated, "stated": list(made.facts), "unstated": folder["says"]}, read


def whole(made: Made) -> dict[str, Any]:
    """What becomes of the folder of a network with all its blocks."""
    both = [made.size, made.other]
    return _outcome(made, made.folder, {}, both, None, tolerance=TOLERANCE_WHOLE)[0]


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


def _outcome(
    made: Made,
    path: Path,
    options: dict[str, Any],
    sizes: list[int],
    known: Known,
    *,
    tolerance: float = TOLERANCE,
) -> tuple[dict[str, Any], Imported | None]:
    """Equal, other (silently!), asked, refused or failed; with differences or the message.

    If the network is the one that another form of the same weights gave (`known`), so is the rest.
    """
    try:
        read = importing.read("auto", path, **options)
    except UserError as error:
        text = str(error).replace(str(path), path.name).replace(str(path.parent), "")
        kind = "asked" if "say which" in text.lower() else "refused"
        return {"is": kind, "says": short(text), "whole": text}, None
    except Exception as error:  # a bug of the converter is a row of the table, not its end
        return {"is": "failed", "says": short(f"{type(error).__name__}: {error}")}, None
    if known is not None and known[1] is not None and _same(read, known[1]):
        return {"is": known[0]["is"], "source": read.source, "as": "folder"}, read
    found = {str(size): _difference(made, read, size) for size in sizes}
    numbers = [value for value in found.values() if isinstance(value, float)]
    fine = all(value < tolerance for value in numbers)
    return {"is": "equal" if fine and numbers else "other", "source": read.source, **found}, read


def _same(one: Imported, other: Imported) -> bool:
    """Whether two imports are the same network."""
    facts = ("family", "arch", "mean", "std", "pixel_scale", "position_resize")
    if any(getattr(one.spec, fact) != getattr(other.spec, fact) for fact in facts):
        return False
    ours, theirs = (trees.flat(read.params["encoder"]) for read in (one, other))
    return ours.keys() == theirs.keys() and all(
        np.array_equal(ours[name], theirs[name]) for name in ours
    )


def _difference(made: Made, read: Imported, size: int) -> float | str:
    """Of the features, relative to the largest; or why there are none at this size."""
    images = seeded.images(size)
    try:
        spec, encoder = read.spec.resized(read.params["encoder"], size)
    except UserError as error:
        return f"refused: {short(str(error))}"
    try:
        with making.uninitialised():  # a library makes a new module for another size
            expected = made.features(images)
    except Exception as error:  # libraries have sizes that they cannot run, too
        return f"the library fails: {type(error).__name__}: {short(str(error))}"
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


def short(text: str) -> str:
    """An error on one line, cut after some hundred characters."""
    text = re.sub(r"\s+", " ", text).strip()
    return text if len(text) <= _SAYS else f"{text[:_SAYS]}..."
