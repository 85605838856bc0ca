"""Makes the structure of a backbone with its library's own class, as the files a user would get."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import copy
import dataclasses
import importlib
import inspect
import json
from pathlib import Path
import re
from typing import Any

import numpy as np
import torch

from benchmarks.coverage import backbones, tables
from tests.convert import seeded

STATISTICS = tables.STATISTICS | {"rad-dino": ((0.5307,) * 3, (0.2583,) * 3)}
# What the model card of a network passes in code, and its config.json does not hold: the user has
# to state it.
IN_CODE = {"paige-ai/Virchow2": ("gated_mlp=yes", "activation=silu")}
# Blocks of the networks of transformers whose config is not of the base size, by their width.
DEPTHS = {384: 12, 768: 12, 1024: 24, 1152: 27, 1280: 32, 1536: 40}
# Two blocks where windows are shifted, and where they are only at another size of the input.
STAGES = [1, 1, 2, 2]


@dataclasses.dataclass(frozen=True)
class Made:
    """A backbone as files, and its library's features.

    Attributes:
      folder: what a user downloads from a hub, with the files that say what no tensor does.
      file: the same weights as `torch.save(model.state_dict())` writes them, alone.
      arch: the name under which timm or open_clip publishes the network; "" for others.
      size: native side of its input.
      other: another side, at which features are compared as well.
      features: (uint8 images [B, H, W, 3]) -> tokens [B, N, D] of the library, at any of the two.
      facts: what a user has to state of the folder, whose files say otherwise.
    """

    folder: Path
    file: Path
    arch: str
    size: int
    other: int
    features: Callable[[np.ndarray], np.ndarray]
    facts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Backbone:
    """An entry of `backbones`: `make` writes it into an empty folder."""

    name: str
    library: str
    lacked: str
    make: Callable[[Path], Made]


def every() -> list[Backbone]:
    """All backbones that are tried."""
    found = [
        Backbone(name, "timm", lacked, lambda folder, name=name: _timm(folder, name, {}, name))
        for lacked, names in backbones.TIMM.items()
        for name in names
    ]
    for name, (lacked, architecture, arguments) in backbones.HUB.items():

        def make(folder, name=name, architecture=architecture, arguments=arguments):
            return _timm(folder, architecture, arguments, "", facts=IN_CODE.get(name, ()))

        found.append(Backbone(name, "timm", lacked, make))
    for name, (lacked, *given) in backbones.HUGGING_FACE.items():
        found.append(Backbone(name, "transformers", lacked, lambda f, g=given: _huggingface(f, *g)))
    for name, lacked in backbones.OPEN_CLIP.items():
        found.append(Backbone(name, "open_clip", lacked, lambda f, n=name: _open_clip(f, n)))
    return found


_whole: list[bool] = [False]


@contextlib.contextmanager
def whole(wanted: bool) -> Iterator[None]:
    """Networks made in here have all blocks if that is wanted, or else two."""
    before, _whole[0] = _whole[0], wanted
    try:
        yield
    finally:
        _whole[0] = before


def is_whole() -> bool:
    """Whether networks are made with all blocks."""
    return _whole[0]


@contextlib.contextmanager
def uninitialised() -> Iterator[None]:
    """Networks made in here do not draw the weights that `fill` replaces; it takes most time."""
    places = [(torch.Tensor, name) for name in ("normal_", "uniform_", "erfinv_")]
    places.append((torch.nn.init, "_no_grad_trunc_normal_"))  # draws until all are in its bounds
    before = [getattr(*place) for place in places]
    for place in places:
        setattr(*place, lambda tensor, *args, **options: tensor)
    try:
        yield
    finally:
        for place, function in zip(places, before, strict=True):
            setattr(*place, function)


def fill(model: Any) -> None:
    """Gives a network the weights that follow from its names."""
    with torch.no_grad():
        statistics = (pair for pair in model.named_buffers() if seeded.is_statistic(pair[0]))
        for name, weight in (*model.named_parameters(), *statistics):
            weight.copy_(torch.from_numpy(np.asarray(seeded.array(name, weight.shape))))


def pixels(images: np.ndarray, mean: Any, std: Any) -> torch.Tensor:
    """What a library makes of uint8 images [B, H, W, 3]: normalised [B, 3, H, W]."""
    scaled = images.astype(np.float32) / np.float32(255)
    normal = (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(normal, -1, 1)))


def is_map(model: Any) -> bool:
    """Whether the features of a network of timm are a map [B, D, H, W], of images of any size."""
    return type(model).__name__ in ("ConvNeXt", "ResNet")


def tokens(found: torch.Tensor, *, channels_first: bool = False) -> np.ndarray:
    """Tokens [B, N, D], from those or from a map with its grid."""
    if found.ndim == 4:
        found = found.flatten(2).transpose(1, 2) if channels_first else found.flatten(1, 2)
    return found.numpy()


# --- timm ------------------------------------------------------------------------------------


def _timm(
    folder: Path, name: str, arguments: dict[str, Any], arch: str, *, facts: tuple[str, ...] = ()
) -> Made:
    import timm
    from timm.layers import SwiGLUPacked
    from timm.models import _hub

    code = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU} if facts else {}
    short = _short(timm.models.model_entrypoint(timm.models.get_arch_name(name)))
    model = timm.create_model(name, pretrained=False, **short, **arguments, **code).eval()
    fill(model)
    model._model_args = {k: v for k, v in model._model_args.items() if k not in code}
    # The depth stands in the folder, as timm itself writes a network that is not the published one.
    _hub.save_for_hf(
        model, folder / "hub", model_args={**arguments, **short}, safe_serialization=True
    )
    torch.save(model.state_dict(), folder / "weights.pth")
    config = model.pretrained_cfg
    size = arguments.get("img_size", config["input_size"][-1])

    def features(images: np.ndarray) -> np.ndarray:
        side = images.shape[1]
        run = model if side == size else timm_at(model, name, side, {**short, **arguments, **code})
        with torch.no_grad():
            found = run.forward_features(pixels(images, config["mean"], config["std"]))
        return tokens(found, channels_first=is_map(model))

    files = folder / "hub", folder / "weights.pth"
    return Made(*files, arch, size, other_size(model, size), features, facts)


def _short(entry: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that make a network of few blocks, if it should have few."""
    if is_whole():
        return {}
    text = inspect.getsource(entry)
    known = {"depth": 2, "depths": STAGES, "layers": STAGES, "stages": (1, 1, 1, 1)}
    found = (name for name in known if re.search(rf"\b{name}=", text))
    return {name: known[name] for name in [*found][:1]}


def timm_at(model: Any, name: str, side: int, arguments: dict[str, Any]) -> Any:
    """The same weights in a network for another size, through timm's own filter of checkpoints."""
    import timm

    if is_map(model):
        return model
    other = timm.create_model(name, pretrained=False, **{**arguments, "img_size": side}).eval()
    module = importlib.import_module(type(model).__module__)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other.load_state_dict(module.checkpoint_filter_fn(state, other), strict=True)
    return other


def other_size(model: Any, size: int) -> int:
    """Another side of the input: two patches more, or twice as many windows."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None or hasattr(model, "layers"):
        return 2 * size
    patch = patch if isinstance(patch, int) else patch[0]
    return size // patch * patch + 2 * patch


# --- transformers ----------------------------------------------------------------------------


def _huggingface(folder: Path, kind: str, fields: Mapping[str, Any], statistics: str) -> Made:
    import transformers

    model_class = getattr(transformers, kind)
    config = _config(model_class, dict(fields))
    torch.manual_seed(0)
    model = model_class(config).eval()
    fill(model)
    model.save_pretrained(folder / "hub")
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    size = size if isinstance(size, int) else size[0]
    mean, std = STATISTICS[statistics]
    (folder / "hub" / "preprocessor_config.json").write_text(
        json.dumps(_preprocessor(size, mean, std), indent=2)
    )
    torch.save(model.state_dict(), folder / "pytorch_model.bin")

    def features(images: np.ndarray) -> np.ndarray:
        fresh = copy.deepcopy(model)  # a Swin V1 that has run at one size is another at the next
        with torch.no_grad():
            found = final_tokens(fresh, pixels(images, mean, std), images.shape[1] != size)
        return tokens(found, channels_first=True)

    patch = getattr(vision, "patch_size", 32)
    patch = patch if isinstance(patch, int) else patch[0]
    stages = hasattr(vision, "depths")
    other = 2 * size if stages else size // patch * patch + 2 * patch
    return Made(folder / "hub", folder / "pytorch_model.bin", "", size, other, features)


def _config(model_class: Any, fields: dict[str, Any]) -> Any:
    import transformers

    kind = model_class.config_class
    if "hidden_size" in fields:
        fields["num_hidden_layers"] = DEPTHS[fields["hidden_size"]] if is_whole() else 2
    if "depths" in fields and is_whole():
        swin, first = "embed_dim" in fields, fields.get("hidden_sizes", [0])[0]
        fields["depths"] = [2, 2, 18, 2] if swin else [3, 3, 9 if first == 96 else 27, 3]
    if "sub_configs" in dir(kind) and "text_config" in kind.sub_configs:
        text = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
        text |= {"num_hidden_layers": 1, "vocab_size": 1000}
        return kind(vision_config=fields, text_config=text)
    if kind is transformers.SamVisionConfig:
        fields |= {"num_hidden_layers": 2, "global_attn_indexes": [1]}
    return kind(**fields)


def _preprocessor(size: int, mean: Any, std: Any) -> dict[str, Any]:
    return {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size},
    }


def final_tokens(model: Any, pixels: torch.Tensor, interpolate: bool) -> torch.Tensor:
    """The tokens after the final norm, of the encoder inside any of the classes."""
    whole = type(model).__name__.endswith("Model")  # not a base with a head
    core = model if whole else getattr(model, model.base_model_prefix, model)
    core = getattr(core, "vision_model", core)
    core = getattr(core, "vision_model", core)
    takes = "interpolate_pos_encoding" in inspect.signature(core.forward).parameters
    call = {"interpolate_pos_encoding": True} if interpolate and takes else {}
    if type(core).__name__ == "ViTMAEModel":
        core.embeddings.config.mask_ratio = core.config.mask_ratio = 0.0
        count = (pixels.shape[-1] // core.config.patch_size) ** 2
        call["noise"] = torch.arange(count)[None].float()
    found = core(pixels, **call).last_hidden_state
    if type(core).__name__ == "DINOv3ConvNextModel":
        found = found[:, 1:]  # the first is the mean of the others
    if hasattr(core, "post_layernorm") and "Siglip" not in type(core).__name__:
        found = core.post_layernorm(found)
    return found


# --- open_clip -------------------------------------------------------------------------------


def _open_clip(folder: Path, name: str) -> Made:
    import open_clip
    from open_clip.constants import HF_CONFIG_NAME
    from safetensors.torch import save_file

    model_name, _, tag = name.partition(".")
    config = open_clip.get_model_config(model_name)
    weights = open_clip.get_pretrained_cfg(model_name, tag)
    vision = config["vision_cfg"]
    if "timm_model_name" not in vision and not is_whole():
        vision["layers"] = 2
    config["text_cfg"] = {"width": 64, "heads": 2, "layers": 1, "vocab_size": 1000}
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    config.pop("multimodal_cfg", None)
    model = _two_blocks_of_timm(lambda: kind(**config)).eval()
    fill(model)
    (folder / "hub").mkdir()
    state = model.state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, _weights(folder))
    preprocess = {key: weights[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (folder / "hub" / HF_CONFIG_NAME).write_text(text)
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    tower = model.visual
    size = tower.image_size if isinstance(tower.image_size, int) else tower.image_size[0]
    patch = (
        tower.patch_size[0]
        if hasattr(tower, "patch_size")
        else tower.trunk.patch_embed.patch_size[0]
    )
    other = size // patch * patch + 2 * patch

    def features(images: np.ndarray) -> np.ndarray:
        side = images.shape[1]
        with torch.no_grad():
            run = tower if side == size else open_clip_at(model, kind, config, side)
            return open_clip_tokens(run, pixels(images, weights["mean"], weights["std"]))

    return Made(folder / "hub", folder / "open_clip_pytorch_model.bin", name, size, other, features)


def _weights(folder: Path) -> Path:
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME

    return folder / "hub" / HF_SAFE_WEIGHTS_NAME


def _two_blocks_of_timm(make: Callable[[], Any]) -> Any:
    """What `make` makes, with towers of timm cut to two blocks."""
    model = make()
    trunk = getattr(model.visual, "trunk", None)
    if trunk is not None and not is_whole():
        trunk.blocks = trunk.blocks[:2]
    return model


def open_clip_at(model: Any, kind: Any, config: dict[str, Any], side: int) -> Any:
    """The image tower for another size, with positions resized by open_clip itself."""
    from open_clip.model import resize_pos_embed

    if hasattr(model.visual, "trunk"):
        import copy

        tower = copy.deepcopy(model.visual)
        tower.set_input_size(side)
        return tower
    vision = {**config["vision_cfg"], "image_size": side}
    other = kind(**{**config, "vision_cfg": vision}).eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    resize_pos_embed(state, other)
    other.load_state_dict(state, strict=True)
    return other.visual


def open_clip_tokens(tower: Any, pixels: torch.Tensor) -> np.ndarray:
    """The tokens that the pooling reads."""
    if hasattr(tower, "trunk"):
        return tokens(tower.trunk.forward_features(pixels))
    found = tower.transformer(tower._embeds(pixels))
    if tower.attn_pool is None and not tower.final_ln_after_pool:
        found = tower.ln_post(found)
    return found.numpy()
