"""A file of weights in, a model folder out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import math
import os
import re
from typing import Any

from etils import epath
import numpy as np

from fd_jax import model_folder
from fd_jax.checkpoint import LazyArray
from fd_jax.convert import configs, families, identifying, networks, trees
from fd_jax.convert.containers.opening import open_container
from fd_jax.convert.containers.tensors import DTYPES, Container, Tensor
from fd_jax.convert.facts import Claim
from fd_jax.convert.facts import stated as stated_facts
from fd_jax.convert.rules import matching
from fd_jax.convert.rules.matching import Match
from fd_jax.convert.rules.transforms import Shape, in_rows
from fd_jax.convert.source import Source
from fd_jax.convert.style import OUTER
from fd_jax.errors import ConversionError
from fd_jax.models import sizes
from fd_jax.models.sizes import ImageSize
from fd_jax.models.spec import ModelSpec

AUTO = "auto"
# Smaller parameters are not worth the trouble; position tables may have to be resized.
_LAZY_SIZE = 1 << 18
_POSITIONS = ("pos_embed", "rel_pos_bias/table")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_SHARDS = "the file is one of several shards: name the folder that holds them all"
MAX_IMAGE_SIZE = 1 << 13  # position tables grow with its square
STORED_DTYPES = ("float32", "bfloat16", "float16")


# (what is being done, bytes done, bytes in all)
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an import took, left and changed.

    Attributes:
      source: name of the source, and of the part where it is not the default one.
      spec: of the network.
      params: parts of a model folder: nested dicts of arrays.
      dropped: reason -> names left behind.
      resized: parameter path -> (shape in the file, shape now).
      sha256: of the file.
      not_finite: parameters with NaN or infinity in them; complete once all are converted.
      remarks: what else people should know of the file.
    """

    source: str
    spec: ModelSpec
    params: dict[str, Any]
    dropped: dict[str, list[str]]
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    sha256: str
    not_finite: list[str]
    remarks: tuple[str, ...] = ()


def import_file(
    source: str,
    path: str | os.PathLike[str],
    output: epath.PathLike,
    *,
    part: str | None = None,
    image_size: ImageSize | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    allow_other_hash: bool = False,
    arch: str | None = None,
    facts: Sequence[str] = (),
    progress: Progress | None = None,
) -> Imported:
    """Converts a file and writes the model folder.

    Args:
      source: name of a source or a style, or "auto".
      path: file, or folder of transformers, timm or open_clip.
      output: model folder to write; complete or not there at all.
      part: which network of the file; None takes the source's first.
      image_size: wanted side of a square input, or (height, width); None keeps the file's.
      dtype: to store the parameters in.
      overwrite: whether an existing folder is replaced.
      allow_other_hash: whether a source that names one file takes another of the same structure.
      arch: name of a published network whose facts the file's are, see `published.network`; with
        "auto" or a style.
      facts: further ones, as "NAME=VALUE" with the names of `facts.STATED`.
      progress: called with what is being done, the bytes done and their total.

    Raises:
      ConversionError: the file cannot be read safely or is not what the source says.
      ModelFolderError: the output exists.
      ConfigError: the architecture cannot have this image size.
    """
    if image_size is not None and max(sizes.sides(image_size)) > MAX_IMAGE_SIZE:
        size = sizes.describe(image_size)
        raise ConversionError(f"image size {size}; expected at most {MAX_IMAGE_SIZE}")
    model_folder.check_free(output, overwrite=overwrite)
    result = read(
        source,
        path,
        part=part,
        image_size=image_size,
        dtype=dtype,
        allow_other_hash=allow_other_hash,
        arch=arch,
        facts=facts,
        progress=progress,
        lazy=True,
    )
    try:
        model_folder.save(output, result.spec, result.params, overwrite=overwrite)
    except OSError as error:
        raise ConversionError(f"{output}: cannot be written ({error.strerror})") from error
    return result


def read(
    source: str,
    path: str | os.PathLike[str],
    *,
    part: str | None = None,
    image_size: ImageSize | None = None,
    dtype: str = "float32",
    allow_other_hash: bool = False,
    arch: str | None = None,
    facts: Sequence[str] = (),
    progress: Progress | None = None,
    lazy: bool = False,
) -> Imported:
    """Converts a file in memory; arguments as in `import_file`.

    With `lazy`, large parameters are `checkpoint.LazyArray`s: read from the mapped file and
    converted one after another when they are written.
    """
    if dtype not in STORED_DTYPES:
        raise ConversionError(f"dtype {dtype!r}; expected one of {', '.join(STORED_DTYPES)}")
    container = open_container(path)
    checked = _counter(progress, "checking the sum of", container.size)
    sha256 = functools.cache(lambda: container.sha256(checked))
    chosen, part = _chosen(source, container, part, _given(source, arch, facts), sha256)
    found, tensors = chosen.match(container, part)
    wrong = identifying.conflicts(chosen, part, container)
    found = dataclasses.replace(found, problems=wrong + found.problems)
    refuse_problems(chosen, container, found)
    digest = sha256()
    if chosen.sha256 not in (None, digest) and not allow_other_hash:
        raise ConversionError(
            f"{container.path}: has the SHA-256 {digest}, but {chosen.name} is the file with "
            f"{chosen.sha256}. Its structure fits: pass --allow-other-hash to import it knowingly"
        )
    spec = chosen.parts[part].spec
    not_finite: list[str] = []
    convert = functools.partial(_in_dtype, container, DTYPES[dtype], not_finite)
    expected = networks.shapes(spec)
    items = list(_converted(found, tensors, expected, DTYPES[dtype], convert, lazy=lazy))
    params = trees.nested(_counted(items, _counter(progress, "writing", _nbytes(items))))
    label = chosen.label(part)
    if not chosen.complete:
        classes = params["head"]["kernel"].shape[1] if "head" in params else 0
        spec = dataclasses.replace(
            spec,
            classes=classes,
            class_names=configs.class_names(container.config, classes),
            source=label,
            source_sha256=digest,
            source_dtypes=_source_dtypes(found, tensors),
            source_names=_source_names(found, tensors),
        )
    before = model_folder.flat_shapes(params)
    if image_size is not None:
        spec, params["encoder"] = spec.resized(params["encoder"], image_size)
    after = model_folder.flat_shapes(params)
    resized = {path: (before[path], after[path]) for path in after if before[path] != after[path]}
    return Imported(label, spec, params, found.dropped, resized, digest, not_finite, chosen.remarks)


def _given(source: str, arch: str | None, facts: Sequence[str]) -> list[Claim]:
    """What the user states of the network.

    Raises:
      ConversionError: there is no such network or fact, or the source has all facts itself.
    """
    if (arch or facts) and source != AUTO and source not in families.STYLES:
        raise ConversionError(
            f"--source={source} has all facts of its network; leave out --arch and --fact, or use "
            f"--source={AUTO}"
        )
    stated = stated_facts(facts)
    return [*stated, *(identifying.published_claims(arch) if arch else [])]


def _chosen(
    name: str,
    container: Container,
    part: str | None,
    given: list[Claim],
    digest: Callable[[], str],
) -> tuple[Source, str]:
    """The source and the part of it that a file is imported as."""
    style = name if name in families.STYLES else None
    if name != AUTO and style is None:
        chosen = families.source_for(name, container)
        return chosen, check_part(chosen, part)
    if style is None and (own := families.self_described(container)):
        return own, check_part(own, part)
    try:
        chosen = identifying.identify(container, given, style=style, part=part, digest=digest)
    except ConversionError as error:
        if not _SHARD.search(container.path.name):
            raise
        raise ConversionError(f"{error}\n{_SHARDS}") from error
    own_part = chosen.recognized is not None or part is None
    return chosen, chosen.default_part if own_part else check_part(chosen, part)


def _counter(progress: Progress | None, what: str, total: int) -> Callable[[int], None]:
    """A function that adds up bytes and reports the sum."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(what, done, total)

    return add


def _nbytes(items: list[tuple[str, np.ndarray | LazyArray]]) -> int:
    return sum(array.size * array.dtype.itemsize for _, array in items)


def _counted(items: list[tuple[str, np.ndarray | LazyArray]], add: Callable[[int], None]):
    """The same, but a lazy array is added up when it is made."""
    for path, array in items:
        if isinstance(array, LazyArray):

            def load(array=array):
                made = array.load()
                add(made.nbytes)
                return made

            yield path, dataclasses.replace(array, load=load)
        else:
            add(array.nbytes)
            yield path, array


def check_part(source: Source, part: str | None) -> str:
    """The name of the part to take; refuses one the source does not have."""
    if part is None:
        return source.default_part
    if part not in source.parts:
        raise ConversionError(
            f"{source.name} has no part {part!r}; expected one of {', '.join(source.parts)}"
        )
    return part


def refuse_problems(source: Source, container: Container, found: Match) -> None:
    """Raises one error with everything that does not fit."""
    if not found.problems:
        return
    lines = identifying.grouped(found.problems)
    fitting = [s.name for s in identifying.fitting(container) if s.name != source.name]
    if fitting:
        lines.append(f"the file fits {', '.join(fitting)}")
    if _SHARD.search(container.path.name):
        lines.append(_SHARDS)
    listing = "\n  ".join(lines)
    raise ConversionError(
        f"{container.path} ({container.kind}) is not a {source.name} file "
        f"({found.found} of {found.expected} tensors fit):\n  {listing}"
    )


def _converted(
    found: Match,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Shape],
    dtype: np.dtype,
    convert: Callable[[str, np.ndarray], np.ndarray],
    *,
    lazy: bool,
) -> Iterator[tuple[str, np.ndarray | LazyArray]]:
    for path, load in matching.convert(found, tensors):

        def in_dtype(load=load, path=path):
            return convert(path, load())

        shape = tuple(size for size in expected[path] if isinstance(size, int))
        known = len(shape) == len(expected[path])
        if lazy and known and math.prod(shape) >= _LAZY_SIZE and not path.endswith(_POSITIONS):
            yield path, LazyArray(shape, dtype, in_dtype)
        else:
            yield path, in_dtype()


def _in_dtype(
    container: Container, dtype: np.dtype, not_finite: list[str], path: str, array: np.ndarray
) -> np.ndarray:
    """The array in the wanted dtype; notes NaN and infinity, refuses to make any."""
    with np.errstate(over="ignore"):
        stored = in_rows(array).astype(dtype, copy=False)
    if not np.isfinite(stored).all():
        if np.isfinite(array).all():
            raise ConversionError(
                f"{container.path}: {path} has values that {dtype.name} cannot hold; store it as "
                "bfloat16 or float32"
            )
        not_finite.append(path)
    return stored


def _source_names(found: Match, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What stands before the names in the file, and whole names, see `ModelSpec.source_names`."""
    before: dict[str, str] = {}
    whole = {}
    for name in (name for step in found.steps for name in step.names):
        base = OUTER if name.startswith(OUTER) else ""
        full, short = tensors[name].name, name.removeprefix(base)
        if full.endswith(short):
            before.setdefault(base, full.removesuffix(short))
        if full != before.get(base, "") + short:
            whole[name] = full
    return {base: prefix for base, prefix in before.items() if prefix} | whole


def _source_dtypes(found: Match, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    taken = (name for step in found.steps for name in step.names)
    return {name: tensors[name].dtype for name in taken if tensors[name].dtype != "float32"}
