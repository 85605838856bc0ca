"""What a family of public networks has to offer; the commands know nothing else about it."""

from collections.abc import Callable, Mapping
import dataclasses
from pathlib import Path

import numpy as np

from fd_jax.convert.containers.tensors import Container
from fd_jax.convert.layout import Layout
from fd_jax.convert.source import Source
from fd_jax.convert.style import Style
from fd_jax.models.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Written:
    """What became of a model folder in another format.

    Attributes:
      left: names of the parameters that the format has no place for (a projector, say).
      remarks: what else people should know, such as how it is opened.
    """

    left: list[str]
    remarks: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Format:
    """Something that model folders are written as.

    Attributes:
      write: (spec, flat parameters, path that does not exist) -> what was written.
      writes: what it is, for people.
      folder: whose folder it is, for people; "" for a file.
    """

    write: Callable[[ModelSpec, dict[str, np.ndarray], Path], Written]
    writes: str
    folder: str = ""


@dataclasses.dataclass(frozen=True)
class SelfDescribed:
    """A kind of file that holds its whole `ModelSpec`: its source is made when it is opened.

    Attributes:
      name: what the user types for the source.
      file: what such a file is, for people.
      recognises: (file) -> whether it is one of this kind; `--source=auto` asks.
      source: (file) -> its source; raises a ConversionError for a file of another kind.
    """

    name: str
    file: str
    recognises: Callable[[Container], bool]
    source: Callable[[Container], Source]


@dataclasses.dataclass(frozen=True)
class Family:
    """Public networks of one kind: everything that is known of them is in the family's module.

    Attributes:
      name: of the module.
      sources: the files that can be imported.
      layouts: the classes of other libraries that networks can be written for.
      formats: what only this family writes, by the name the user types.
      described: its files that hold their whole spec, if it has any.
      styles: the names that libraries give to its networks, of any size.
    """

    name: str
    sources: tuple[Source, ...] = ()
    layouts: tuple[Layout, ...] = ()
    formats: Mapping[str, Format] = dataclasses.field(default_factory=dict)
    described: SelfDescribed | None = None
    styles: tuple[Style, ...] = ()
