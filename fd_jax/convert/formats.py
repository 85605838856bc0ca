"""Everything that a model folder can be written as, by the name the user types."""

from collections.abc import Callable, Mapping
import json
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from fd_jax import inference
from fd_jax.convert import families, timm, trees
from fd_jax.convert.containers import safetensors_io
from fd_jax.convert.containers.tensors import DTYPES
from fd_jax.convert.family import Format, Written
from fd_jax.convert.huggingface import HuggingFace, preprocessor
from fd_jax.convert.layout import Layout, held
from fd_jax.convert.rules.matching import invert
from fd_jax.convert.rules.tables import Table, steps, target_paths
from fd_jax.convert.style import OUTER
from fd_jax.convert.timm import Timm
from fd_jax.errors import ConversionError
from fd_jax.models import sizes
from fd_jax.models.spec import ModelSpec

_TORCH = {"format": "pt"}  # which transformers asks of a safetensors file


def _write_timm(spec: ModelSpec, params: dict[str, np.ndarray], path: Path) -> Written:
    """A folder that timm's `create_model` opens."""
    layout, fit = families.layout(Timm, spec, set(params), format="timm")
    tensors = dict(invert(fit.table, params, spec.arch, derived=False))
    config = layout.config(spec, set(params))
    path.mkdir()
    safetensors_io.write(path / timm.WEIGHTS, tensors | layout.extra(spec, set(params)), _TORCH)
    _write_json(path / timm.CONFIG, config)
    return Written(fit.left, [*timm.calls(config, path), *_inexact(fit.table, spec)])


def _write_huggingface(spec: ModelSpec, params: dict[str, np.ndarray], path: Path) -> Written:
    """A folder that `AutoModel.from_pretrained` opens."""
    layout, fit = families.layout(HuggingFace, spec, set(params), format="huggingface")
    tensors = layout.extra(spec) | dict(invert(fit.table, params, spec.arch, derived=False))
    path.mkdir()
    safetensors_io.write(path / "model.safetensors", tensors, _TORCH)
    _write_json(path / "config.json", layout.config(spec))
    _write_json(path / "preprocessor_config.json", preprocessor(spec))
    return Written(fit.left, [_opens(layout, path), *_inexact(fit.table, spec)])


def _opens(layout: HuggingFace, path: Path) -> str:
    return f"opens with transformers.{layout.class_name}.from_pretrained({str(path)!r})"


def _inexact(table: Table, spec: ModelSpec) -> list[str]:
    """Remarks on tensors that are not those of a file, though what is computed is the same."""
    found = (step.transform.inexact for step, _ in steps(table, spec.arch))
    return list(dict.fromkeys(filter(None, found)))


def _write_source(spec: ModelSpec, params: dict[str, np.ndarray], path: Path) -> Written:
    """The names, shapes and dtypes of the file the model came from, as safetensors."""
    table = families.table_of(spec)
    if table is None:
        raise ConversionError(
            f"this network was not imported (its source is {spec.source!r}); choose another format"
        )
    if spec.source.partition(":")[0] in families.STYLES:
        table = held(table, spec, set(params))
    tensors = {}
    for key, array in invert(table, params, spec.arch, derived=False):
        dtype = DTYPES[spec.source_dtypes.get(key, "float32")]
        tensors[_in_source(key, spec.source_names)] = array.astype(dtype, copy=False)
    safetensors_io.write(path, tensors, {**_TORCH, "source": spec.source})
    return Written(sorted(set(params) - target_paths(table, spec.arch)), _inexact(table, spec))


def _in_source(key: str, names: Mapping[str, str]) -> str:
    """The whole name of a tensor in the file it came from, see `ModelSpec.source_names`."""
    base = OUTER if key.startswith(OUTER) else ""
    return names.get(key) or names.get(base, "") + key.removeprefix(base)


def _write_stablehlo(spec: ModelSpec, params: dict[str, np.ndarray], path: Path) -> Written:
    """uint8 images [b, H, W, 3] -> tokens [b, N, D] float32, weights inside; see `jax.export`."""
    definition, _ = spec.abstract()
    encoder = trees.encoder(params)

    def forward(images):
        return nnx.merge(definition, encoder)(spec.normalize(images)).tokens

    _write_program(forward, spec, path)
    left = [name for name in params if not name.startswith("encoder/")]
    return Written(left, [_signature(spec, "tokens [b, N, D] float32"), *_with_head(spec)])


def _write_stablehlo_logits(spec: ModelSpec, params: dict[str, np.ndarray], path: Path) -> Written:
    """uint8 images [b, H, W, 3] -> class logits [b, K] float32, weights inside."""
    if not spec.classes:
        raise ConversionError(
            "this network has no classifier head, so it has no logits; choose the format stablehlo"
        )
    parts = trees.nested((name, np.asarray(array, np.float32)) for name, array in params.items())

    def forward(images):
        return inference.class_logits(spec, parts, spec.normalize(images))

    _write_program(forward, spec, path)
    used = ("encoder", "head", "fc_norm")
    left = [name for name in params if name.partition("/")[0] not in used]
    names = f": {', '.join(spec.class_names)}" if spec.class_names else ""
    return Written(left, [_signature(spec, f"logits [b, {spec.classes}] float32{names}")])


def _with_head(spec: ModelSpec) -> list[str]:
    if not spec.classes:
        return []
    return ["the file has features and no logits; --format=stablehlo_logits writes a classifier"]


def _signature(spec: ModelSpec, result: str) -> str:
    """What a program takes and gives, for people."""
    height, width = sizes.sides(spec.arch["image_size"])
    return f"it takes uint8 [b, {height}, {width}, 3] RGB images and gives {result}"


def _write_program(forward: Callable[[jax.Array], jax.Array], spec: ModelSpec, path: Path) -> None:
    height, width = sizes.sides(spec.arch["image_size"])
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.uint8)
    exported = jax.export.export(jax.jit(forward), platforms=("cpu", "cuda", "tpu"))(images)
    path.write_bytes(exported.serialize())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _classes(kind: type[Layout]) -> str:
    """The classes of a library that the families know, for people."""
    names = list(dict.fromkeys(f"`{layout.class_name}`" for layout in families.layouts(kind)))
    return f"{', '.join(names[:-1])} or {names[-1]}"


FORMATS: dict[str, Format] = {
    "timm": Format(
        _write_timm,
        "a folder with `config.json` and `model.safetensors` that timm's `create_model` opens, as "
        f"a {_classes(Timm)}",
        folder="timm",
    ),
    "huggingface": Format(
        _write_huggingface,
        "a folder with `config.json`, `model.safetensors` and `preprocessor_config.json` that "
        f"`AutoModel.from_pretrained` opens, as a {_classes(HuggingFace)}",
        folder="Hugging Face",
    ),
    **families.formats(),
    "source": Format(
        _write_source,
        "safetensors in the names, shapes and dtypes of the file the model came from; a level of "
        'nested dictionaries is a name before a "/"',
    ),
    "stablehlo": Format(
        _write_stablehlo,
        "one file for serving: uint8 images [b, H, W, 3] in, tokens [b, N, D] out, weights "
        "inside, for CPU, CUDA and TPU",
    ),
    "stablehlo_logits": Format(
        _write_stablehlo_logits,
        "the same for a network with a classifier head: logits [b, K] out",
    ),
}
