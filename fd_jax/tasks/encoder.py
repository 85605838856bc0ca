"""The encoder that a run trains: as a whole, without its first blocks, or by low-rank updates.

What does not train is held: it goes beside the train state, as a teacher does, so that it has
neither moments nor decay, no gradient is computed for it, and checkpoints do not contain it. The
running statistics of BatchNorms are measured: they are a part of the state that no optimizer sees.
"""

from collections.abc import Callable, Iterable
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from fd_jax.cost import flops
from fd_jax.errors import ConfigError
from fd_jax.models import lora as low_rank
from fd_jax.models import trees
from fd_jax.models.keys import param_keys
from fd_jax.models.lora import Lora
from fd_jax.models.spec import FAMILIES, ModelSpec, split
from fd_jax.optimizer import path_name
from fd_jax.typing import Config, PyTree

HELD = "student"  # name of the held part among the frozen weights of a step


@dataclasses.dataclass(frozen=True)
class Share:
    """What of an encoder trains.

    Attributes:
      freeze_blocks: number of first blocks that are held, and the embedding with them; 0 for none.
      lora: low-rank updates of the other blocks, which then train alone; None without any.
    """

    freeze_blocks: int = 0
    lora: Lora | None = None

    @property
    def is_all(self) -> bool:
        """Whether nothing is held."""
        return not self.freeze_blocks and self.lora is None


def share_of(config: Config, section: str) -> Share:
    """What the config of a run trains of the encoder that `section` describes."""
    lora = config.get("lora")
    updates = None
    if lora is not None and lora.rank:
        updates = Lora(lora.rank, lora.alpha, tuple(lora.targets))
    return Share(config[section].get("freeze_blocks", 0), updates)


class TrainedEncoder:
    """The static definition of an encoder of which a `Share` trains.

    Attributes:
      spec: of the plain network.
      definition: graph definition, that of the low-rank updates included.
      network: abstract network.
      shapes: of all parameters, trained, held and measured.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        dtype: jnp.dtype,
        share: Share | None = None,
        sizes: Iterable[int] = (),
        measures: bool = False,
        **runtime: Any,
    ):
        """Defines the network; reads no weights.

        Args:
          spec: of the plain network.
          dtype: of matmuls and activations.
          share: what of it trains; None for all.
          sizes: sides of the square images of the run besides that of `spec`.
          measures: whether the run measures the running statistics of BatchNorms. Otherwise they
            stay as they are: they are among what trains, where no gradient reaches them.
          **runtime: further arguments of `ModelSpec.build`.

        Raises:
          ConfigError: the network has too few blocks or other layers, or cannot have a size; or a
            part of it is to be held while statistics are measured.
        """
        self.spec, self._share, self._dtype = spec, share or Share(), dtype
        self._measures = measures
        self._runtime = {"dtype": dtype, **runtime}
        self.definition, self.shapes = self._abstract(spec)
        self.network: Any = nnx.merge(self.definition, self.shapes)
        self._check_blocks()
        self._check_measured()
        self._held_shapes = self.divide(self.shapes)[1]
        self._sized = {size: self._at(size) for size in sizes}

    def init(self, key: jax.Array) -> PyTree:
        """Random values of what trains."""
        return self.divide(split(self._build(self.spec, key))[1])[0]

    @property
    def has_statistics(self) -> bool:
        """Whether there are running statistics that the run measures."""
        return bool(self.statistics(self.shapes))

    def init_statistics(self) -> PyTree:
        """The running statistics before the first step; {} where none are measured."""
        shapes = self.statistics(self.shapes)
        fill = {"mean": jnp.zeros, "var": jnp.ones}
        return _map(lambda path, leaf: fill[path.rpartition("/")[2]](leaf.shape), shapes)

    def statistics(self, encoder: PyTree) -> PyTree:
        """The running statistics among parameters or shapes, as far as the run measures them."""
        return trees.chosen(encoder, self._is_measured) if self._measures else {}

    def divide(self, encoder: PyTree) -> tuple[PyTree, PyTree]:
        """(what trains, what is held) of a nested dict of parameters or shapes."""
        if self._share.is_all:
            return trees.chosen(encoder, self._trains) if self.has_statistics else encoder, {}
        held = trees.chosen(encoder, lambda path: not self._trains(path))
        return trees.chosen(encoder, self._trains), held

    def load_held(self, stored: Callable[[], PyTree]) -> PyTree:
        """What a step uses and does not train, {HELD: ...} or {}: a part of the frozen weights.

        Kernels are in the compute dtype, to which every matmul casts them. The rest is in float32,
        as where it trains, so that a step computes what that of the whole network would.

        Args:
          stored: reads all parameters of the network that the run starts from, as host arrays.
        """
        if self._share.is_all:
            return {}
        held = self.divide(stored())[1]
        return {HELD: _map(lambda path, x: x.astype(self._held_dtype(path)), held)}

    def abstract_held(self) -> PyTree:
        """Shapes and dtypes of `load_held`."""

        def struct(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, self._held_dtype(path))

        return {HELD: _map(struct, self._held_shapes)} if self._held_shapes else {}

    def build(
        self,
        params: PyTree,
        frozen: PyTree,
        image_size: int | None = None,
        statistics: PyTree | None = None,
    ) -> Any:
        """The network of trained and held parameters, for images with this side.

        Position tables are resized on the device where that is not the side of `spec`.

        Args:
          params: trained parameters.
          frozen: frozen weights of the run, with those of `load_held`.
          image_size: side of the images in pixels; None for that of `spec`.
          statistics: the running statistics that the run measures; None if it measures none, or if
            `params` are those of a model folder, which has them.
        """
        params = trees.joined(params, statistics) if statistics else params
        weights = trees.joined(params, frozen[HELD]) if self._held_shapes else params
        if image_size not in self._sized:  # the network refuses images of another size than its own
            return nnx.merge(self.definition, weights)
        definition, _ = self._sized[image_size]
        return nnx.merge(definition, self.spec.resized(weights, image_size)[1])

    def grid(self, image_size: int) -> tuple[int, int]:
        """(H, W) of the last map of images with this side."""
        _, network = self._sized.get(image_size, (None, self.network))
        return network.grid

    def whole(self, params: PyTree, stored: Callable[[], PyTree]) -> PyTree:
        """All parameters of the plain network, with the low-rank updates in its kernels.

        Args:
          params: trained parameters.
          stored: reads all parameters of the network that the run started from, as host arrays.
        """
        if self._share.is_all:
            return params
        joined = trees.joined(params, self.divide(stored())[1])
        return low_rank.merged(joined, self._share.lora) if self._share.lora else joined

    def flops(
        self,
        image_size: int,
        *,
        trains: bool = True,
        remat: str | None = None,
        patches: int | None = None,
    ) -> flops.Flops:
        """FLOPs of one image whose side is `image_size` pixels, see `flops.network`."""
        spec = dataclasses.replace(self.spec, arch={**self.spec.arch, "image_size": image_size})
        share = self._share
        return flops.network(
            spec,
            trains=trains,
            remat=remat,
            freeze_blocks=share.freeze_blocks,
            lora=share.lora,
            patches=patches,
        )

    def _is_measured(self, path: str) -> bool:
        return self._measures and FAMILIES[self.spec.family].is_statistic(path)

    def _trains(self, path: str) -> bool:
        if self._is_measured(path):
            return False
        if self._share.lora is not None:
            return "/lora/" in path
        return self._is_free(path)

    def _is_free(self, path: str) -> bool:
        """Whether a parameter or layer is none of the first blocks that are frozen."""
        first = self._share.freeze_blocks
        return not first or FAMILIES[self.spec.family].block_of(path, self.spec.arch) >= first

    def _held_dtype(self, path: str) -> jnp.dtype:
        # The small networks of a continuous position bias compute in float32.
        cast = path.endswith("/kernel") and "rel_pos_bias/" not in path
        return self._dtype if cast else jnp.dtype(jnp.float32)

    def _build(self, spec: ModelSpec, key: jax.Array | int) -> nnx.Module:
        network = spec.build(rngs=param_keys(key), **self._runtime)
        if self._share.lora is None:
            return network
        key = jax.random.key(key) if isinstance(key, int) else key
        keys = param_keys(jax.random.fold_in(key, 1))
        return low_rank.add(network, self._share.lora, rngs=keys, trains=self._is_free)

    def _abstract(self, spec: ModelSpec) -> tuple[nnx.GraphDef, PyTree]:
        return split(nnx.eval_shape(lambda: self._build(spec, 0)))

    def _at(self, size: int) -> tuple[nnx.GraphDef, Any]:
        """The definition and the abstract network for images with this side."""
        spec = dataclasses.replace(self.spec, arch={**self.spec.arch, "image_size": size})
        try:
            definition, shapes = self._abstract(spec)
        except ConfigError as error:
            raise ConfigError(
                f"images of {size} px, in data.sizes or data.phases: {error}"
            ) from error
        return definition, nnx.merge(definition, shapes)

    def _check_measured(self) -> None:
        if not self._share.is_all and self.has_statistics:
            raise ConfigError(
                f"freeze_blocks={self._share.freeze_blocks} or lora.rank: a student with BatchNorm "
                f"({self.spec.family!r}) trains as a whole, since the statistics of its blocks are "
                "those of the batch; set freeze_blocks=0 and lora.rank=0"
            )

    def _check_blocks(self) -> None:
        blocks, depth = self._share.freeze_blocks, self.network.depth
        if blocks >= depth:
            raise ConfigError(
                f"freeze_blocks={blocks}, but the network has {depth} blocks, of which one at "
                f"least has to train; use {depth - 1} or less"
            )


def _map(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(path_name(path), leaf), tree
    )
