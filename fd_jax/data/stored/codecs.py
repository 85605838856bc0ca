"""How a teacher's map is stored: in fewer bits, and how it becomes float32 again on the device.

Each kind is a row of `KINDS`. Maps are [T, D]: the class token, if there is one, then the patches.
"""

from collections.abc import Mapping
import dataclasses
from typing import Literal, get_args

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from fd_jax import digests
from fd_jax.data.elements import Element
from fd_jax.errors import ConfigError, DataError

Kind = Literal["float32", "bfloat16", "int8", "pca_int8"]
Arrays = Mapping[str, jax.Array]
Constants = Mapping[str, Mapping[str, jax.Array]]  # by group of tokens: "mean" and "matrix"

VALUES, SCALE = "values", "scale"  # the arrays of a stored map
_LEVELS = 127  # of an int8 on either side of 0


@dataclasses.dataclass(frozen=True)
class Storage:
    """What the arrays of a kind are.

    Attributes:
      dtype: NumPy name of the dtype of the values; bfloat16 are stored as their bits.
      scaled: whether each token has a factor of its own, float32.
      reduced: whether the values are coordinates along principal directions.
    """

    dtype: str
    scaled: bool = False
    reduced: bool = False


KINDS: dict[str, Storage] = {
    "float32": Storage("float32"),
    "bfloat16": Storage("uint16"),
    "int8": Storage("int8", scaled=True),
    "pca_int8": Storage("int8", scaled=True, reduced=True),
}
assert tuple(KINDS) == get_args(Kind)


@dataclasses.dataclass(frozen=True)
class Codec:
    """How the maps of one teacher are stored.

    Attributes:
      kind: a name in `KINDS`.
      cls: whether a map begins with a class token.
      grid: (H, W) of its patches.
      width: number of channels D.
      components: number of principal directions that are kept; 0 for other kinds.
    """

    kind: str
    cls: bool
    grid: tuple[int, int]
    width: int
    components: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ConfigError(f"quantization {self.kind!r}: expected one of {', '.join(KINDS)}")
        if self._storage.reduced and not 0 < self.components <= self.width:
            raise ConfigError(
                f"{self.components} components of {self.width} channels; expected 1 to {self.width}"
            )
        if self.components and not self._storage.reduced:
            raise ConfigError(f"{self.kind} keeps all channels; leave out the components")

    @property
    def tokens(self) -> int:
        """Number of tokens T of a map."""
        return int(self.cls) + self.grid[0] * self.grid[1]

    @property
    def elements(self) -> dict[str, Element]:
        """The arrays of one stored map."""
        shape = (self.tokens, self.components or self.width)
        found = {VALUES: Element(shape, self._storage.dtype)}
        return {**found, SCALE: Element(shape[:1], "float32")} if self._storage.scaled else found

    @property
    def bytes_per_map(self) -> int:
        """Bytes of one stored map, without its header and without compression."""
        return sum(each.padded().nbytes for each in self.elements.values())

    @property
    def groups(self) -> dict[str, slice]:
        """Which tokens share a mean and principal directions; {} for kinds that have none."""
        if not self._storage.reduced:
            return {}
        return {"cls": slice(0, 1), "patch": slice(1, None)} if self.cls else {"patch": slice(None)}

    def encode(self, tokens: jax.Array, constants: Constants) -> dict[str, jax.Array]:
        """The stored arrays of maps. [B, T, D] float32 -> [B, ...] each

        Args:
          tokens: maps.
          constants: of each group of tokens; {} for kinds that have none.
        """
        if self.kind == "bfloat16":
            bits = jax.lax.bitcast_convert_type(tokens.astype(jnp.bfloat16), jnp.uint16)
            return {VALUES: bits}
        if not self._storage.scaled:
            return {VALUES: tokens}
        return _to_int8(self._reduced(tokens, constants) if self._storage.reduced else tokens)

    def decode(self, arrays: Arrays, constants: Constants) -> jax.Array:
        """The maps of stored arrays. -> [B, T, D] float32; arguments as in `encode`."""
        values = arrays[VALUES]
        if self.kind == "bfloat16":
            return jax.lax.bitcast_convert_type(values, jnp.bfloat16).astype(jnp.float32)
        if not self._storage.scaled:
            return values
        restored = values.astype(jnp.float32) * arrays[SCALE][..., None]
        return self._expanded(restored, constants) if self._storage.reduced else restored

    def pack(self, arrays: Mapping[str, np.ndarray]) -> bytes:
        """The bytes of one map."""
        return b"".join(np.ascontiguousarray(arrays[name]).tobytes() for name in self.elements)

    def unpack(self, content: bytes | memoryview) -> dict[str, np.ndarray]:
        """The arrays of one map.

        Raises:
          ValueError: there are more or fewer bytes than those of a map.
        """
        if len(content) != self.bytes_per_map:
            raise ValueError(f"has {len(content)} bytes; expected {self.bytes_per_map}")
        arrays, start = {}, 0
        for name, element in self.elements.items():
            size = element.padded().nbytes
            flat = np.frombuffer(content[start : start + size], element.dtype)
            arrays[name], start = flat.reshape(element.shape), start + size
        return arrays

    def shapes(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Shapes and dtypes of the constants."""
        shapes = {"mean": (self.width,), "matrix": (self.components, self.width)}
        constants = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in shapes.items()}
        return dict.fromkeys(self.groups, constants)

    def decoding_flops(self) -> float:
        """FLOPs of the matmuls with which one map is decoded."""
        return 2.0 * self.tokens * self.components * self.width

    def _reduced(self, tokens: jax.Array, constants: Constants) -> jax.Array:
        """Coordinates along the principal directions, each divided by its deviation."""
        parts = []
        for group, at in self.groups.items():
            matrix = constants[group]["matrix"]  # directions times their deviations [C, D]
            squares = jnp.sum(jnp.square(matrix), axis=1)
            gain = jnp.where(squares > 0, 1 / jnp.where(squares > 0, squares, 1.0), 0.0)
            centred = tokens[:, at] - constants[group]["mean"]
            parts.append(jnp.matmul(centred, (matrix * gain[:, None]).T, precision="highest"))
        return jnp.concatenate(parts, axis=1)

    def _expanded(self, reduced: jax.Array, constants: Constants) -> jax.Array:
        parts = [
            jnp.matmul(reduced[:, at], constants[group]["matrix"], precision="highest")
            + constants[group]["mean"]
            for group, at in self.groups.items()
        ]
        return jnp.concatenate(parts, axis=1)

    @property
    def _storage(self) -> Storage:
        return KINDS[self.kind]


def _to_int8(values: jax.Array) -> dict[str, jax.Array]:
    """Whole numbers up to 127, and the factor of each token, 0 where all of it is 0."""
    scale = jnp.max(jnp.abs(values), axis=-1) / _LEVELS
    rounded = jnp.round(values / jnp.where(scale > 0, scale, 1.0)[..., None])
    return {VALUES: rounded.astype(jnp.int8), SCALE: scale}


def save_constants(folder: epath.Path, constants: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Writes the constants of each group as one array: the mean, and below it the matrix."""
    for group, parts in constants.items():
        with _file(folder, group).open("wb") as file:
            np.save(file, np.concatenate([parts["mean"][None], parts["matrix"]]))


def digests_of(constants: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, int]:
    """A number for the constants of each group, by which damage is noticed."""
    return {
        group: digests.of_array(np.concatenate([parts["mean"][None], parts["matrix"]]))
        for group, parts in constants.items()
    }


def load_constants(
    folder: epath.Path, codec: Codec, known: Mapping[str, int]
) -> dict[str, dict[str, np.ndarray]]:
    """Reads what `save_constants` wrote; `known` are the digests of it.

    Raises:
      DataError: a file is missing or damaged.
    """
    constants = {}
    for group in codec.groups:
        path = _file(folder, group)
        try:
            with path.open("rb") as file:
                found = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} cannot be read ({error}); {_AGAIN}") from error
        shape = (1 + codec.components, codec.width)
        if found.shape != shape or digests.of_array(found) != known.get(group):
            raise DataError(f"{path} is not the array that was written there; {_AGAIN}")
        constants[group] = {"mean": found[0], "matrix": found[1:]}
    return constants


_AGAIN = "copy the folder of targets again, or make it again with python -m fd_jax.targets"


def _file(folder: epath.Path, group: str) -> epath.Path:
    return folder / f"decoder-{group}.npy"
