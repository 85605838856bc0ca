"""What a network is, apart from its weights: the contents of `model.json`."""

import dataclasses
import json
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
import numpy as np

from fd_jax.errors import ModelFolderError, first_few
from fd_jax.models import description, kernels, quantized, resize, sizes
from fd_jax.models.convnext import ConvNeXt
from fd_jax.models.heads import Classifier, Pooling, Projector
from fd_jax.models.keys import param_keys
from fd_jax.models.pool import Pool, make_pool
from fd_jax.models.resnet import ResNet
from fd_jax.models.segmenter import Segmenter, widths_of
from fd_jax.models.sizes import ImageSize
from fd_jax.models.swin_v1 import SwinV1
from fd_jax.models.swin_v2 import SwinV2
from fd_jax.models.vit import ViT
from fd_jax.typing import PyTree

FORMAT_VERSION = 1
# Left out of `model.json` where they say nothing, since earlier versions do not know them.
LATER_FIELDS = ("segmenter", "class_names", "pool", "origins", "source_names")
# The class of each family; ViT shows what it has to offer.
FAMILIES: dict[str, Any] = {
    "vit": ViT,
    "swin": SwinV1,
    "swin_v2": SwinV2,
    "convnext": ConvNeXt,
    "resnet": ResNet,
}

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything needed to build a network and feed it.

    Attributes:
      family: key of FAMILIES.
      arch: the architecture keywords of the family's class, plain JSON values.
      mean, std: per RGB channel, of pixels scaled by `pixel_scale`.
      pixel_scale: factor from uint8 to the range of `mean` and `std`.
      position_resize: how this source's code resizes absolute positions, see `resize.py`.
      classes: outputs of the classifier head beside the encoder; 0 where there is none.
      class_names: name of each output of that head, as the data calls the class, or "" for an
        output that no class was trained on; None where they are not known.
      pooling: what that head reads, see `heads.Classifier`.
      segmenter: the segmenter on the encoder's maps: `blocks`, the numbers of the blocks whose maps
        it takes, and the keywords of `Segmenter` but the widths of these maps; None without one.
      pool: how the network's authors make one vector of a picture: "kind", a key of `pool.KINDS`,
        and the keywords of its class; None where nothing of that kind is stored.
      source: where the weights come from: a converter source name, or the run that trained them.
      source_sha256: of the converted file; None for a network trained here.
      source_dtypes: dtype per tensor name of the source file, where it is not float32.
      source_names: what stands before the names in the source file that the converter took off:
        that of the network under "", that of the model around it under "../"; and the whole names
        of single tensors that are called otherwise, under those by which they are known.
      origins: where a fact about the network comes from, in words, by the name of the field.
      notes: free text for people: licence, what was dropped.
      format_version: of this file.
    """

    family: str
    arch: dict[str, Any]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    pixel_scale: float = 1 / 255
    position_resize: resize.PositionResize = "size"
    classes: int = 0
    class_names: list[str] | None = None
    pooling: Pooling = "cls"
    segmenter: dict[str, Any] | None = None
    pool: dict[str, Any] | None = None
    source: str = ""
    source_sha256: str | None = None
    source_dtypes: dict[str, str] = dataclasses.field(default_factory=dict)
    source_names: dict[str, str] = dataclasses.field(default_factory=dict)
    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: str = ""
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ModelFolderError(f"family {self.family!r}; expected one of {sorted(FAMILIES)}")
        if self.class_names is not None:
            _check_names(self.class_names, self.classes)

    def build(self, *, rngs: nnx.Rngs, matmuls: str = "", **runtime) -> nnx.Module:
        """The network with fresh parameters; `runtime` is drop_path, init, dtype and the like.

        `lift` of the architecture is of any family: channels to which features are projected. So is
        `matmuls`: the numbers that linear layers multiply, see `quantized.hold`; "" for `dtype`.
        """
        arch = dict(self.arch)
        lift = arch.pop("lift", None)
        network = FAMILIES[self.family](**arch, **runtime, rngs=rngs)
        if lift is not None:
            dtypes = {name: runtime[name] for name in ("dtype", "grad_dtype") if name in runtime}
            network.lift = Projector(network.width, lift, **dtypes, rngs=rngs)
            network.width = lift
        if matmuls:
            quantized.hold(network, matmuls)
        return network

    def abstract(self, **runtime) -> tuple[nnx.GraphDef, dict[str, Any]]:
        """Definition and parameter shapes, without computing anything.

        Returns:
          The graph definition for `nnx.merge`, and a nested dict of `jax.ShapeDtypeStruct`.
        """
        return split(nnx.eval_shape(lambda: self.build(rngs=param_keys(0), **runtime)))

    def build_segmenter(self, *, rngs: nnx.Rngs, **runtime) -> Segmenter:
        """The segmenter with fresh parameters; `runtime` is its dtype and grad_dtype.

        Raises:
          ModelFolderError: there is none in this description, or it is damaged.
        """
        definition, shapes = self.abstract()
        arch = dict(self.segmenter or {})
        try:
            widths = widths_of(nnx.merge(definition, shapes), arch.pop("blocks"))
            return Segmenter(widths=widths, **arch, **runtime, rngs=rngs)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFolderError(
                f"{self.source!r} has the segmenter {self.segmenter}, which does not describe one: "
                f"{error}"
            ) from error

    def abstract_segmenter(self, **runtime) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
        """Definition, and shapes of the parameters and of the running statistics.

        Nothing is computed. Arguments and errors as in `build_segmenter`.
        """
        module = nnx.eval_shape(lambda: self.build_segmenter(rngs=param_keys(0), **runtime))
        return *split(module), jax.eval_shape(module.fresh_statistics)

    def build_head(self, width: int, *, rngs: nnx.Rngs, **runtime) -> Classifier:
        """The classifier with fresh parameters, on features of this width.

        `runtime` is what `Classifier` takes beside the facts of the description; its weights are
        zeros unless there is a `kernel_init`.
        """
        arguments: dict[str, Any] = {"kernel_init": nnx.initializers.zeros, **runtime}
        return Classifier(
            width,
            self.classes,
            pooling=self.pooling,
            norm_eps=self.head_norm_eps,
            **arguments,
            rngs=rngs,
        )

    def abstract_head(self, width: int) -> tuple[nnx.GraphDef, dict[str, Any]]:
        """Definition and parameter shapes of the classifier, on features of this width."""
        return split(nnx.eval_shape(lambda: self.build_head(width, rngs=param_keys(0))))

    def build_pool(self, *, rngs: nnx.Rngs, **runtime) -> Pool:
        """The pool with fresh parameters; `runtime` is its dtype.

        Raises:
          ModelFolderError: there is none in this description, or none that fits the encoder.
        """
        network: Any = nnx.merge(*self.abstract())
        described, encoder = self.pool or {}, {"class_token": bool(network.cls)}
        try:
            return make_pool(described, network.width, **encoder, **runtime, rngs=rngs)
        except (TypeError, ValueError) as error:
            raise ModelFolderError(
                f"{self.source!r} has the pool {self.pool}, which is none of this network: {error}"
            ) from error

    def abstract_pool(self, **runtime) -> tuple[nnx.GraphDef, dict[str, Any]]:
        """Definition and parameter shapes of the pool; arguments and errors as in `build_pool`."""
        return split(nnx.eval_shape(lambda: self.build_pool(rngs=param_keys(0), **runtime)))

    def normalize(
        self, images: jax.Array | np.ndarray, dtype: DTypeLike = jnp.float32
    ) -> jax.Array:
        """uint8 [B, H, W, 3] to the network's input [B, H, W, 3] in `dtype`."""
        mean = np.asarray(self.mean, np.float32)
        std = np.asarray(self.std, np.float32)
        pixels = jnp.asarray(images).astype(jnp.float32) * np.float32(self.pixel_scale)
        return ((pixels - mean) / std).astype(dtype)

    def resized(self, params: PyTree, image_size: ImageSize) -> tuple["ModelSpec", PyTree]:
        """This network for another input size: position tables resized, all else as it is.

        Args:
          params: encoder parameters as numpy arrays; not changed.
          image_size: wanted side of a square in pixels, or (height, width).

        Raises:
          ConfigError: the architecture cannot have this size.
        """
        size = sizes.plain(image_size)
        if size == sizes.plain(self.arch["image_size"]):
            return self, params
        spec = dataclasses.replace(self, arch={**self.arch, "image_size": size})
        spec.abstract()  # refuses a size the architecture cannot have before any work
        return spec, FAMILIES[self.family].resize_positions(
            params, self.arch, size, method=self.position_resize
        )

    @property
    def stride(self) -> int:
        """Pixels on a side of what the last map has a token for."""
        halvings = len(self.arch.get("depths", (0,))) - 1
        return self.arch["patch_size"] << halvings

    @property
    def has_attention(self) -> bool:
        """Whether the network's blocks attend to anything."""
        return bool(FAMILIES[self.family].head_widths(self.arch))

    @property
    def head_norm_eps(self) -> float:
        """Epsilon of the norm in a classifier head, see `heads.Classifier`."""
        eps = self.arch.get("final_norm_eps")
        return self.arch["norm_eps"] if eps is None else eps

    def choose_attention(self, name: str, *, dtype: DTypeLike) -> str:
        """Settles `config.attention` for this network, see `kernels.choose`."""
        widths = FAMILIES[self.family].head_widths(self.arch)
        return kernels.choose(name, dtype=jnp.dtype(dtype), head_widths=widths)

    def to_json(self) -> str:
        """The text of `model.json`, without those LATER_FIELDS that say nothing."""
        fields = dataclasses.asdict(self)
        for name in LATER_FIELDS:
            if fields[name] in (None, {}):
                del fields[name]
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str) -> "ModelSpec":
        """Reads `to_json` text; `where` names the file in errors."""
        try:
            fields = json.loads(text)
            version = fields["format_version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelFolderError(
                f"{where} is not a model description: {error!s:.200}. It is damaged, or of another "
                "program; convert, copy or train the model again"
            ) from error
        if version != FORMAT_VERSION:
            raise ModelFolderError(
                f"{where} has format version {version}, this fd_jax reads {FORMAT_VERSION}; "
                "convert or train the model again"
            )
        if wrong := description.problems(fields):
            raise ModelFolderError(
                f"{where} describes no network: {first_few(wrong)}. It is damaged, or of another "
                "version of fd_jax; convert, copy or train the model again"
            )
        pairs = {name: tuple(fields[name]) for name in ("mean", "std") if name in fields}
        return cls(**fields | pairs)


def _check_names(names: Any, classes: int) -> None:
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not is_list or len(names) != classes:
        raise ModelFolderError(
            f"class_names {names!s:.80}: expected a list of {classes} names, one for each class"
        )


def split(module: nnx.Module) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Definition and parameters of a module; parameters as a nested dict with string keys."""
    definition, state = nnx.split(module)
    return definition, string_keys(nnx.to_pure_dict(state))


def string_keys(tree: Any) -> Any:
    """The same nested dict with every key as a string (list indices are ints in flax)."""
    if not isinstance(tree, dict):
        return tree
    return {str(key): string_keys(value) for key, value in tree.items()}
