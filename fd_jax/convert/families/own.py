"""The safetensors file that `export --format=safetensors` writes, read back into a model folder.

Its tensors have our own parameter paths, and `model.json` stands in its metadata, so the table is
made from the file and every fact is the one the model had.
"""

import math

from fd_jax.convert.containers.tensors import Container
from fd_jax.convert.rules.tables import Rule, Table, depth
from fd_jax.convert.source import Part, Source, shapes
from fd_jax.errors import ConversionError, UserError
from fd_jax.models.spec import ModelSpec

NAME = "fd_jax"
METADATA = "model.json"
_MOST = 1 << 20  # larger numbers in the description belong to no network


def source(container: Container) -> Source:
    """The source of this one file.

    Raises:
      ConversionError: it was not written by our export, or its description is not a network's.
    """
    text = container.metadata.get(METADATA)
    if text is None:
        raise ConversionError(
            f"{container.path}: no {METADATA} in the metadata; expected a file that "
            "`export --format=safetensors` wrote"
        )
    where = f"{METADATA} in the metadata"
    try:
        spec = ModelSpec.from_json(text, where=where)
        _check_sizes(spec, container)
        paths = shapes(spec)
    except UserError as error:
        raise ConversionError(f"{container.path}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{container.path}: {where} describes no network ({error!s:.80})"
        ) from error
    rules = tuple(Rule(path, path, optional=not path.startswith("encoder/")) for path in paths)
    return Source(
        NAME,
        "safetensors of `export --format=safetensors`",
        {"model": Part(Table(rules), spec)},
        "the model it was exported from",
    )


def _check_sizes(spec: ModelSpec, container: Container) -> None:
    """Bounds what a damaged description can make the network's definition cost."""
    arch = spec.arch
    numbers = [n for value in arch.values() for n in (value if type(value) is list else [value])]
    numbers = [number for number in numbers if isinstance(number, int)]
    if min(numbers, default=0) < 0 or max(numbers, default=0) > _MOST:
        raise ValueError("a size in it is out of bounds")
    if depth(arch) > len(container.tensors):
        raise ValueError(f"{depth(arch)} blocks, but {len(container.tensors)} tensors")
    patches = (arch["image_size"] // arch["patch_size"]) ** 2
    if patches > max(map(math.prod, (t.shape for t in container.tensors.values())), default=0):
        raise ValueError(f"{patches} positions, more than any tensor in the file has numbers")
