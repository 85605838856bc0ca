"""Writes `fd_jax/convert/published/*.json` from the installed timm and open_clip."""

from collections.abc import Callable, Iterator
import contextlib
import json
from pathlib import Path
from typing import Any
import warnings

import torch

from benchmarks.coverage import reading
from benchmarks.coverage.reading import Facts

OUTPUT = Path("fd_jax/convert/published")
# Facts of every network of a library: ToTensor divides by 255, and absolute positions are resized
# by timm's `resample_abs_pos_embed` and open_clip's `resize_pos_embed`, both bicubic and
# antialiased.
COMMON = {"pixel_scale": 1 / 255, "position_resize": "antialias"}
STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def write() -> None:
    """Writes both tables and says how many networks each has."""
    for made in (timm_table(), open_clip_table()):
        path = OUTPUT / f"{made['library']}.json"
        path.write_text(text(made))
        architectures = made["architectures"].values()
        lacking = sum("lacks" in facts for facts in architectures)
        count = sum(map(len, made["networks"].values()))
        print(
            f"{path}: {count} networks of {len(architectures)} architectures, {lacking} of which "
            f"have what no network here has; {path.stat().st_size / 1000:.0f} kB"
        )


def text(made: dict[str, Any]) -> str:
    """A table as JSON with one architecture per line, sorted."""
    lines = []
    for key, value in made.items():
        if key in ("library", "version", "common"):
            lines.append(f"{_json(key)}: {_json(value)}")
        else:
            rows = ",\n".join(f"{_json(name)}: {_json(value[name])}" for name in sorted(value))
            lines.append(f"{_json(key)}: {{\n{rows}\n}}" if rows else f"{_json(key)}: {{}}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def timm_table() -> dict[str, Any]:
    """The architectures and pretrained tags of the classes that `reading` knows, and all others."""
    import timm
    from timm.models import _registry

    made = _Table("timm", timm.__version__)
    tags: dict[str, list[str]] = {}
    for name in timm.list_pretrained():
        architecture, _, tag = name.partition(".")
        tags.setdefault(architecture, []).append(tag)
    for architecture in timm.list_models():
        module = _registry._model_to_module[architecture]
        if module not in _MODULES:
            made.set_aside(architecture, module)
            continue
        model = _timm_model(architecture)
        if type(model).__name__ not in reading.TIMM:
            made.set_aside(architecture, type(model).__name__)
            continue
        made.add_architecture(architecture, _timm_facts(model, model.pretrained_cfg))
        known = {_changes_of_network(model.pretrained_cfg): model}
        for tag in tags.get(architecture, ()):
            config = timm.get_pretrained_cfg(f"{architecture}.{tag}").to_dict()
            changes = _changes_of_network(config)
            if changes not in known:
                known[changes] = _timm_model(f"{architecture}.{tag}")
            made.add(architecture, tag, _timm_facts(known[changes], config))
    return made.finished()


def _changes_of_network(config: dict[str, Any]) -> tuple[Any, ...]:
    """What timm gives its modules of the configuration of a tag, apart from classes."""
    size = tuple(config["input_size"]) if config.get("fixed_input_size") else None
    return config.get("global_pool"), size


_MODULES = {
    "beit",
    "convnext",
    "deit",
    "eva",
    "resnet",
    "swin_transformer",
    "swin_transformer_v2",
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
}


def _timm_model(name: str) -> Any:
    import timm

    with _on_meta():
        return timm.create_model(name, pretrained=False)


def _timm_facts(model: Any, config: dict[str, Any]) -> Facts:
    size = {"image_size": reading.side(config["input_size"][1:])}
    style = reading.style_of_timm(model)
    return _facts(style, lambda: {**size, **reading.of_timm(model)}, config["mean"], config["std"])


def open_clip_table() -> dict[str, Any]:
    """The models and tags whose image tower is open_clip's own or one of timm's, and all others."""
    import open_clip

    made = _Table("open_clip", open_clip.__version__)
    tags: dict[str, list[str]] = {}
    for model_name, tag in open_clip.list_pretrained():
        tags.setdefault(model_name, []).append(tag)
    for model_name in open_clip.list_models():
        config = open_clip.get_model_config(model_name)
        facts = _open_clip_facts(config, {})
        if isinstance(facts, str):
            made.set_aside(model_name, facts)
            continue
        made.add_architecture(model_name, facts)
        for tag in tags.get(model_name, ()):
            weights = open_clip.get_pretrained_cfg(model_name, tag)
            # open_clip sets it for this tag whatever the name. Of other mismatches it warns: these
            # weights belong to another name.
            quick = tag == "openai" or bool(config.get("quick_gelu"))
            if quick == bool(weights.get("quick_gelu")):
                made.add(
                    model_name, tag, _open_clip_facts({**config, "quick_gelu": quick}, weights)
                )
                made.add_alias(weights.get("hf_hub", ""), f"{model_name}.{tag}")
    return made.finished()


def _open_clip_facts(config: dict[str, Any], weights: dict[str, Any]) -> Facts | str:
    """The facts of a model, or the name of its tower's class if nothing here resembles it."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    tower = image_tower(config)
    mean, std = (
        weights.get(name) or default
        for name, default in (("mean", OPENAI_DATASET_MEAN), ("std", OPENAI_DATASET_STD))
    )
    trunk = getattr(tower, "trunk", None)
    if trunk is None:
        if type(tower).__name__ != "VisionTransformer":
            return type(tower).__name__
        return _facts("openai_clip", lambda: reading.of_open_clip(tower), mean, std)
    if type(trunk).__name__ not in reading.TIMM:
        return type(trunk).__name__
    size = {"image_size": reading.side(tower.image_size)}
    style = reading.style_of_timm(trunk)
    return _facts(style, lambda: {**reading.of_timm(trunk), **size}, mean, std)


def image_tower(config: dict[str, Any]) -> Any:
    """The image tower of a model of open_clip, on the meta device."""
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    vision = CLIPVisionCfg(**{**config["vision_cfg"], "timm_model_pretrained": False})
    with _on_meta():
        return _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))


def _facts(style: str, read: Callable[[], Facts], mean: Any, std: Any) -> Facts:
    try:
        facts = {name: value for name, value in read().items() if value is not None}
    except reading.LackingError as lacking:
        return {"style": style, "lacks": str(lacking)}
    return {"style": style, **facts, "statistics": _statistics(mean, std)}


def _statistics(mean: Any, std: Any) -> str:
    """The name of a pair of statistics; one that few networks have is called by its numbers."""
    pair = tuple(map(float, mean)), tuple(map(float, std))
    known = {pair: name for name, pair in STATISTICS.items()}
    name = known.get(pair, " ".join(f"{value:g}" for row in pair for value in row))
    STATISTICS[name] = pair
    return name


class _Table:
    """A table that grows: a network holds what differs from its architecture."""

    def __init__(self, library: str, version: str):
        self.library, self.version = library, version
        self.architectures: dict[str, Facts] = {}
        self.networks: dict[str, dict[str, Facts]] = {}
        self.aliases: dict[str, str] = {}
        self.others: dict[str, list[str]] = {}

    def add_architecture(self, name: str, facts: Facts) -> None:
        self.architectures[name] = facts

    def add(self, architecture: str, tag: str, facts: Facts) -> None:
        usual = self.architectures[architecture]
        unlike = {name: None for name in usual if name not in facts}
        unlike |= {name: value for name, value in facts.items() if usual.get(name) != value}
        self.networks.setdefault(architecture, {})[tag] = unlike

    def add_alias(self, repository: str, name: str) -> None:
        """A repository on the hub; those of timm have the names of their networks."""
        repository = repository.strip("/")
        if repository.count("/") == 1 and not repository.startswith("timm/"):
            self.aliases.setdefault(repository, name)

    def set_aside(self, architecture: str, kind: str) -> None:
        self.others.setdefault(kind, []).append(architecture)

    def finished(self) -> dict[str, Any]:
        statistics = {name: {"mean": mean, "std": std} for name, (mean, std) in STATISTICS.items()}
        return {
            "library": self.library,
            "version": self.version,
            "common": COMMON,
            "statistics": statistics,
            "aliases": self.aliases,
            "others": self.others,
            "architectures": self.architectures,
            "networks": self.networks,
        }


@contextlib.contextmanager
def _on_meta() -> Iterator[None]:
    """Modules made in here have shapes, and take no memory."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        yield
