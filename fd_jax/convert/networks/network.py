"""What conversion asks about a network, whatever its class."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

Arch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Network:
    """Answers about the networks of one family of `models.spec.FAMILIES`.

    Attributes:
      depths: (architecture) -> blocks of each stage; a network without stages has one.
      width: (architecture) -> channels of the feature map.
      positions: (architecture) -> how the network knows where a token is, in one word.
    """

    depths: Callable[[Arch], Sequence[int]]
    width: Callable[[Arch], int]
    positions: Callable[[Arch], str]
