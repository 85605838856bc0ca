"""The safetensors file that `export --format=safetensors` writes, read back into a model folder.

Its tensors have our own parameter paths, and its metadata holds the text of `model.json`: the table
is made from the file, and every fact is the one the model had.
"""

from pathlib import Path

import numpy as np

from fd_jax.convert import networks
from fd_jax.convert.containers import safetensors_io
from fd_jax.convert.containers.tensors import Container
from fd_jax.convert.family import Family, Format, SelfDescribed, Written
from fd_jax.convert.rules.matching import NEEDED
from fd_jax.convert.rules.tables import Rule, Table
from fd_jax.convert.source import Part, Source
from fd_jax.errors import ConversionError, UserError
from fd_jax.models.spec import ModelSpec

NAME = "fd_jax"
_METADATA = "model.json"


def source(container: Container) -> Source:
    """The source of this one file.

    Raises:
      ConversionError: it was not written by our export, or its description is not a network's.
    """
    text = container.metadata.get(_METADATA)
    if text is None:
        raise ConversionError(
            f"{container.path}: no {_METADATA} in the metadata; expected a file that "
            "`export --format=safetensors` wrote"
        )
    where = f"{_METADATA} in the metadata"
    try:
        spec = ModelSpec.from_json(text, where=where)
        networks.check_sizes(spec, container)
        paths = networks.shapes(spec)
    except UserError as error:
        raise ConversionError(f"{container.path}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{container.path}: {where} describes no network ({error!s:.80})"
        ) from error
    rules = tuple(Rule(path, path, optional=not path.startswith(NEEDED)) for path in paths)
    return Source(
        NAME,
        "safetensors of `export --format=safetensors`",
        {"model": Part(Table(rules), spec)},
        "the model it was exported from",
        complete=True,
    )


def _write(spec: ModelSpec, params: dict[str, np.ndarray], path: Path) -> Written:
    safetensors_io.write(path, params, {_METADATA: spec.to_json()})
    return Written([])


FAMILY = Family(
    "own",
    formats={
        "safetensors": Format(
            _write,
            "one file with our own parameter paths and `model.json` in the metadata; "
            "`import --source=fd_jax` reads it back",
        )
    },
    described=SelfDescribed(
        NAME,
        "our own safetensors export",
        lambda container: _METADATA in container.metadata,
        source,
    ),
)
