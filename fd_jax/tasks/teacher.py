"""A frozen teacher: its network at its input size in this run, its head and its weights."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections

from fd_jax import model_folder
from fd_jax.cost import flops, hardware
from fd_jax.errors import ConfigError
from fd_jax.models import kernels, quantized, resize, sizes
from fd_jax.models.features import FeatureMap
from fd_jax.models.spec import FAMILIES, ModelSpec
from fd_jax.normalization.statistics import Origin
from fd_jax.optimizer import path_name
from fd_jax.precision import compute_dtype
from fd_jax.tasks.base import apply_frozen
from fd_jax.typing import Config, PyTree


class Teacher:
    """The static definition of one teacher; its weights are an argument of each call.

    Attributes:
      dtype: dtype of its weights and matmuls.
      spec: spec of the network as it runs, with the stages and the input size of this run.
      width, depth, depths, grid, image_size, cls: properties of that network.
      token_side: pixels on a side of what one of its tokens stands for.
      drop_path: drop-path rate of its last block.
      follows: whether its input size follows that of the student's images where that varies.
      attention: name of the attention implementation that it uses.
      matmuls: numbers that its linear layers multiply, a key of `narrow.KINDS`; "" for `dtype`.
    """

    def __init__(
        self,
        config: Config,
        *,
        dtype: jnp.dtype,
        head: bool,
        attention: str = "auto",
        spec: ModelSpec | None = None,
    ):
        """Defines the network; reads no weights.

        Args:
          config: the section `config.teacher` of a run's config, or one of `config.teachers`.
          dtype: dtype of its weights and matmuls.
          head: whether its classifier head is needed.
          attention: attention implementation, or "auto" for the best one on this device.
          spec: replaces the spec in the folder `config.path`, for planning without weights.

        Raises:
          ConfigError: the folder holds another teacher, or the teacher lacks the requested stages
            or head, or it or this device cannot have these matmuls.
          ModelFolderError: there is no such folder.
        """
        self.dtype = dtype
        self.matmuls: str = config.get("matmuls", "")
        if self.matmuls:
            hardware.check_matmuls(self.matmuls, hardware.find_chip(kernels.device_kind() or ""))
        self.drop_path = config.drop_path
        self.follows: bool = config.get("follow", False)
        self._path, self._stages = config.path, config.stages
        stored = spec or _read_spec(config)
        size = config.image_size or stored.arch["image_size"]
        size = sizes.square_side(size, network="a teacher in training")
        arch = {**_arch_of_stages(stored, config.stages), "image_size": size}
        self.spec = dataclasses.replace(stored, arch=arch)
        self.attention = self.spec.choose_attention(attention, dtype=dtype)
        self._definition, self._shapes = self._abstract(self.spec)
        network: Any = nnx.merge(self._definition, self._shapes)
        self.width, self.depth, self.grid = network.width, network.depth, network.grid
        self.depths = network.depths
        self.image_size, self.cls = network.image_size, network.cls
        self.token_side = sizes.token_side(size, arch["patch_size"], self.grid)
        self._head, self._head_shapes = None, {}
        if head and self.classes:  # which refuses a network without one
            self._head, self._head_shapes = self.spec.abstract_head(self.width)

    @classmethod
    def of_folder(
        cls,
        path: str,
        *,
        image_size: int = 0,
        stages: int = 0,
        dtype: str = "auto",
        matmuls: str = "",
    ) -> "Teacher":
        """A teacher without a run, for commands that compute with it alone; has no head.

        Args:
          path: its model folder.
          image_size: side of its input in pixels; 0 for its own.
          stages: number of first stages; 0 for all.
          dtype: name of the dtype of its weights and matmuls, see `precision.compute_dtype`.
          matmuls: what its linear layers multiply, see the attribute.

        Raises:
          ConfigError, ModelFolderError: as the constructor says.
        """
        fields = {"path": path, "source": "", "image_size": image_size, "stages": stages}
        section = ml_collections.ConfigDict({**fields, "drop_path": 0.0, "matmuls": matmuls})
        return cls(section, dtype=compute_dtype(dtype), head=False)

    @property
    def classes(self) -> int:
        """Number of outputs of its classifier head.

        Raises:
          ConfigError: it has no classifier head.
        """
        if not self.spec.classes:
            raise ConfigError(
                f"target.kind='logits' needs a teacher with a classifier head; "
                f"{self.spec.source} has none. Use 'full', 'cls' or 'gap', or DeiT as the teacher"
            )
        return self.spec.classes

    def origin(self, *, after_norm: bool) -> Origin:
        """By which statistics of its tokens are known, with its final norm or without.

        Raises:
          ModelFolderError: its folder does not exist or is damaged.
        """
        return Origin.of(self._path, self.spec, stages=self._stages, after_norm=after_norm)

    def load(self) -> PyTree:
        """Its weights as host arrays, resized to its input size.

        They are in the compute dtype, but for those that `quantized.rounded` makes.
        """
        spec, parts = model_folder.load(self._path)
        _, encoder = spec.resized(parts["encoder"], self.image_size)
        if self._stages:
            encoder = FAMILIES[spec.family].first_stages_params(encoder, spec.arch, self._stages)
        if self.matmuls:
            encoder = quantized.rounded(encoder, self.matmuls)
        weights = {"encoder": encoder, **{name: parts[name] for name in self._head_shapes}}
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.astype(self._held_dtype(path, leaf)), weights
        )

    def abstract(self) -> PyTree:
        """Shapes and dtypes of `load`, without reading weights."""
        shapes = {"encoder": self._shapes, **self._head_shapes}
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, self._held_dtype(path, leaf)),
            shapes,
        )

    def features(
        self,
        weights: PyTree,
        images: jax.Array,
        *,
        final_norm: bool,
        drops: jax.Array | None,
        image_size: int | None = None,
    ) -> FeatureMap:
        """Its feature map of uint8 images [B, H, W, 3], which are resized to its input size.

        Args:
          weights: its weights.
          images: any size.
          final_norm: whether its final norm is applied.
          drops: uniform random numbers for drop path, [B, depth, 2], or None.
          image_size: another input size than its own, to which its positions are resized.
        """
        definition, encoder, images = self._at_size(weights, images, image_size)
        return apply_frozen(definition, encoder, images, final_norm=final_norm, drops=drops)

    def intermediates(
        self,
        weights: PyTree,
        images: jax.Array,
        blocks: Sequence[int],
        *,
        drops: jax.Array | None,
        image_size: int | None = None,
    ) -> list[FeatureMap]:
        """Its feature maps after some blocks, without the final norm; arguments as in `features`.

        Blocks are counted from 0. Those after the last of them do not run.
        """
        definition, encoder, images = self._at_size(weights, images, image_size)
        network = nnx.merge(definition, jax.lax.stop_gradient(encoder))
        return jax.lax.stop_gradient(network.intermediates(images, blocks, drops=drops))

    def attending(
        self,
        weights: PyTree,
        images: jax.Array,
        blocks: Sequence[int],
        *,
        final_norm: bool,
        drops: jax.Array | None,
        image_size: int | None = None,
    ) -> tuple[list[FeatureMap], jax.Array]:
        """Its feature maps after some blocks, and what its class token attends to in the last.

        Arguments as in `features` and `intermediates`; with `final_norm`, the only block is the
        network's last. The attention is `AttentionMap.of_class_token`, [B, P] float32.
        """
        definition, encoder, images = self._at_size(weights, images, image_size)
        network = nnx.merge(definition, jax.lax.stop_gradient(encoder))
        maps, attention = network.intermediates_and_attention(images, blocks, drops=drops)
        maps = [network.normed(each) for each in maps] if final_norm else maps
        return jax.lax.stop_gradient((maps, attention.of_class_token()))

    def grid_at(self, image_size: int) -> tuple[int, int]:
        """Its grid at another input size.

        Raises:
          ConfigError: it cannot have this size.
        """
        if image_size == self.image_size:
            return self.grid
        return nnx.merge(*self._abstract(self._spec_at(image_size))).grid

    def logits(self, weights: PyTree, features: FeatureMap) -> jax.Array:
        """Logits of its head for a feature map. -> [B, K] float32."""
        assert self._head is not None
        head = {name: weights[name] for name in self._head_shapes}
        return apply_frozen(self._head, head, features)

    def flops(
        self,
        image_size: int,
        own_size: int | None = None,
        *,
        until: int | None = None,
        attends: bool = False,
    ) -> flops.Flops:
        """FLOPs of one image.

        Args:
          image_size: its side in pixels.
          own_size: input size at which the teacher runs; None for its own.
          until: number of first blocks that run; None for all.
          attends: whether the attention of the class token is read.
        """
        size = own_size or self.image_size
        spec = self._spec_at(size)
        work = flops.network(spec, trains=False, until=until, matmuls=self.matmuls)
        if attends:
            keys = math.prod(self.grid_at(size)) + self.cls + self.spec.arch["registers"]
            work += flops.Flops(2.0 * keys * self.width)
        if image_size != size:
            work += flops.resize(image_size, size)
        if self._head is not None:
            work += flops.Flops(2.0 * self.width * self.classes)
        return work

    def _at_size(
        self, weights: PyTree, images: jax.Array, image_size: int | None
    ) -> tuple[nnx.GraphDef, PyTree, jax.Array]:
        """Definition, parameters and normalised images for an input size; None for its own."""
        size = image_size or self.image_size
        if images.shape[1] != size:
            images = resize_images(images, size)
        spec, encoder = self.spec.resized(weights["encoder"], size)
        definition = self._definition if spec is self.spec else self._abstract(spec)[0]
        return definition, encoder, self.spec.normalize(images, self.dtype)

    def _spec_at(self, image_size: int) -> ModelSpec:
        arch = {**self.spec.arch, "image_size": image_size}
        return dataclasses.replace(self.spec, arch=arch)

    def _abstract(self, spec: ModelSpec) -> tuple[nnx.GraphDef, PyTree]:
        runtime = {"drop_path": self.drop_path, "attention": self.attention}
        return spec.abstract(dtype=self.dtype, matmuls=self.matmuls, **runtime)

    def _held_dtype(self, path: Any, leaf: Any) -> jnp.dtype:
        return quantized.held_dtype(path_name(path), leaf, self.dtype)


def resize_images(images: jax.Array, size: int) -> jax.Array:
    """Antialiased bilinear resize on the device, needed for the fixed 224 px input of CLIP-L.

    See docs/reference.md#quirk-teacher-resize.

    [B, H, W, 3] uint8 -> [B, size, size, 3] float32, still 0 to 255, not rounded.
    """
    return _resize(images, (size, size))


def resize_map(features: FeatureMap, grid: tuple[int, int]) -> FeatureMap:
    """Resizes the patches of a feature map to another grid, antialiased bilinear.

    The class token and registers stay as they are.
    Tokens: [B, cls + registers + H*W, D] -> [B, cls + registers + h*w, D] float32.
    """
    batch, _, width = features.tokens.shape
    others = features.cls + features.registers
    patches = _resize(features.patches.reshape(batch, *features.grid, width), grid)
    tokens = [features.tokens[:, :others].astype(jnp.float32), patches.reshape(batch, -1, width)]
    return dataclasses.replace(features, tokens=jnp.concatenate(tokens, axis=1), grid=grid)


def _resize(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """[B, H, W, C] -> [B, h, w, C] float32, antialiased bilinear."""
    rows = resize.antialias_matrix(x.shape[1], size[0], method="bilinear").astype("float32")
    columns = resize.antialias_matrix(x.shape[2], size[1], method="bilinear").astype("float32")
    x = jnp.einsum("ih,bhwc->biwc", rows, x.astype(jnp.float32), precision="highest")
    return jnp.einsum("jw,biwc->bijc", columns, x, precision="highest")


def _arch_of_stages(spec: ModelSpec, stages: int) -> dict[str, Any]:
    """The architecture, cut after `stages` stages if not 0 (docs/reference.md#stage-3-target)."""
    if not stages:
        return spec.arch
    if spec.arch.get("lift"):
        raise ConfigError(
            f"teacher.stages={stages}, but the features of {spec.source!r} are lifted to "
            f"{spec.arch['lift']} channels from its last stage; set it to 0"
        )
    depths = spec.arch.get("depths", ())
    if not 1 <= stages <= len(depths):
        has = f"has {len(depths)} stages" if depths else f"is a {spec.family}, without stages"
        raise ConfigError(f"teacher.stages={stages}, but the teacher {has}; set it to 0 for all")
    return FAMILIES[spec.family].first_stages(spec.arch, stages)


def _read_spec(config: Config) -> ModelSpec:
    spec = model_folder.load_spec(epath.Path(config.path))
    if config.source and spec.source != config.source:
        raise ConfigError(
            f"the teacher at {config.path} was converted from {spec.source!r}, but the config "
            f"distils {config.source!r}; change teacher.path or teacher.source"
        )
    return spec
