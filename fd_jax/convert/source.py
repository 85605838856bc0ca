"""What a source is: a kind of public file, where its tensors are, and the network they make.

"Source" has this one meaning in the converter. What a rule reads are names in a file, what it
fills are paths of parameters.
"""

from collections.abc import Mapping
import dataclasses
from typing import TYPE_CHECKING

from fd_jax.convert import networks
from fd_jax.convert.containers.tensors import Container, Tensor
from fd_jax.convert.rules.matching import Match, match
from fd_jax.convert.rules.tables import Table, required_names
from fd_jax.models.spec import ModelSpec

if TYPE_CHECKING:
    from fd_jax.convert.style import Recognized


BESIDE = "beside the weights"  # why what belongs to no part of a network is dropped


@dataclasses.dataclass(frozen=True)
class Part:
    """One network in a file.

    Attributes:
      table: its rules.
      spec: the network, without the facts of one particular file (checksum, dtypes).
      under: prefixes of full tensor names below which it may be; the first that occurs counts.
        "model/" is the dictionary entry "model".
      strip: prefixes taken off the remaining names, one after the other, only at the beginning.
    """

    table: Table
    spec: ModelSpec
    under: tuple[str, ...] = ("",)
    strip: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Source:
    """A kind of public file that can be imported.

    Attributes:
      name: what the user types.
      file: the public file's exact name.
      parts: the networks in it by name; the first is taken unless another is asked for.
      oracle: what its features are compared with in the tests.
      note: what the keys do not say.
      sha256: of the only file this source is meant for, or None.
      published: how the SHA-256 of the public file begins, if its publisher says so (torch hub
        puts eight digits into the name). Another file is imported with a remark.
      unstack: prefix of tensors whose leading axis is the block number, see `unstacked`.
      hf: whether the file has the names that a class of transformers expects.
      complete: whether the spec came out of the file with every fact, so that nothing is added.
      certain: whether nobody but the publisher of the file gives such names, so that a file with
        them has the facts of the source.
      style: name of the style whose names the file has, if files beside it may state facts; what
        they say has to agree with the spec.
      recognized: the network in the one file that the source was made from.
      remarks: of that file, for people.
    """

    name: str
    file: str
    parts: Mapping[str, Part]
    oracle: str
    note: str = ""
    sha256: str | None = None
    published: str = ""
    unstack: str | None = None
    hf: bool = False
    complete: bool = False
    certain: bool = False
    style: str = ""
    recognized: "Recognized | None" = None
    remarks: tuple[str, ...] = ()

    @property
    def default_part(self) -> str:
        """The part that is imported when none is named."""
        return next(iter(self.parts))

    def label(self, part: str) -> str:
        """The source's name, with that of the part unless it is the default one."""
        return self.name if part == self.default_part else f"{self.name}:{part}"

    def match(self, container: Container, part: str) -> tuple[Match, Mapping[str, Tensor]]:
        """Matches the part's table against a file.

        Returns:
          The match, with all problems, and the tensors under the names the table uses.
        """
        chosen = self.parts[part]
        tensors, outside, problems = self._select(container, part)
        arch = chosen.spec.arch
        found = match(chosen.table, tensors, networks.shapes(chosen.spec), arch)
        if outside:
            found.dropped[BESIDE] = outside
        return dataclasses.replace(found, problems=problems + found.problems), tensors

    def share_of_names(self, container: Container, part: str) -> float:
        """Which share of the names the part needs is in a file; much cheaper than `match`."""
        chosen = self.parts[part]
        tensors, _, _ = self._select(container, part)
        names = required_names(chosen.table, chosen.spec.arch)
        return sum(name in tensors for name in names) / len(names)

    def _select(self, container: Container, part: str):
        if self.recognized is not None:
            return self.recognized.tensors, list(self.recognized.beside), []
        tensors, outside, problems = select(self.parts[part], container.tensors)
        if self.unstack is not None:
            tensors = unstacked(tensors, self.unstack)
        return tensors, outside, problems


def select(
    part: Part, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The part's tensors under stripped names, the names of all others, and problems."""
    prefix = next((p for p in part.under if any(name.startswith(p) for name in tensors)), None)
    if prefix is None:
        wanted = " or ".join(repr(p.rstrip("/.")) for p in part.under)
        return {}, list(tensors), [f"missing the entry {wanted}, which should hold the weights"]
    chosen: dict[str, Tensor] = {}
    outside, problems = [], []
    for name, tensor in tensors.items():
        if not name.startswith(prefix):
            outside.append(name)
            continue
        short = name[len(prefix) :]
        for start in part.strip:
            short = short.removeprefix(start)
        if short in chosen:
            problems.append(f"{name} and {chosen[short].name} have the same name without prefixes")
        chosen[short] = tensor
    return chosen, outside, problems


def unstacked(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Splits tensors below `prefix`/ along their first axis into `prefix`_0/, `prefix`_1/, ..."""
    out = {}
    for name, tensor in tensors.items():
        if not name.startswith(f"{prefix}/") or not tensor.shape:
            out[name] = tensor
            continue
        for i in range(min(tensor.shape[0], 1000)):
            row = f"{prefix}_{i}/{name[len(prefix) + 1 :]}"
            out[row] = dataclasses.replace(
                tensor,
                name=tensor.name.removesuffix(name) + row,
                shape=tensor.shape[1:],
                load=lambda t=tensor, i=i: t.load()[i],
            )
    return out
