"""Everything that a model folder can be written as, by the name the user types."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from fd_jax.convert import families, trees
from fd_jax.convert.containers import safetensors_io
from fd_jax.convert.containers.tensors import DTYPES
from fd_jax.convert.family import Format
from fd_jax.convert.huggingface import HuggingFace, preprocessor
from fd_jax.convert.layout import Layout, Timm, held
from fd_jax.convert.rules.matching import invert
from fd_jax.convert.rules.tables import target_paths
from fd_jax.convert.style import OUTER
from fd_jax.errors import ConversionError
from fd_jax.models import sizes
from fd_jax.models.spec import ModelSpec

_TORCH = {"format": "pt"}  # which transformers asks of a safetensors file


def _write_timm(spec: ModelSpec, params: dict[str, np.ndarray], path: Path) -> list[str]:
    """Names of timm, as safetensors."""
    name = spec.source.partition(":")[0]
    if name.startswith("timm_") and name in families.STYLES:  # as it came, packed or not
        return _write_source(dataclasses.replace(spec, source_dtypes={}), params, path)
    _, fit = families.layout(Timm, spec, set(params), format="timm")
    tensors = dict(invert(fit.table, params, spec.arch, derived=False))
    safetensors_io.write(path, tensors, _TORCH)
    return fit.left


def _write_huggingface(spec: ModelSpec, params: dict[str, np.ndarray], path: Path) -> list[str]:
    """A folder that `AutoModel.from_pretrained` opens."""
    layout, fit = families.layout(HuggingFace, spec, set(params), format="huggingface")
    tensors = dict(invert(fit.table, params, spec.arch, derived=False)) | layout.extra(spec)
    path.mkdir()
    safetensors_io.write(path / "model.safetensors", tensors, _TORCH)
    _write_json(path / "config.json", layout.config(spec))
    _write_json(path / "preprocessor_config.json", preprocessor(spec))
    return fit.left


def _write_source(spec: ModelSpec, params: dict[str, np.ndarray], path: Path) -> list[str]:
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
        tensors[key.removeprefix(OUTER)] = array.astype(dtype, copy=False)
    safetensors_io.write(path, tensors, {**_TORCH, "source": spec.source})
    return sorted(set(params) - target_paths(table, spec.arch))


def _write_stablehlo(spec: ModelSpec, params: dict[str, np.ndarray], path: Path) -> list[str]:
    """uint8 images [b, H, W, 3] -> tokens [b, N, D] float32, weights inside; see `jax.export`."""
    definition, _ = spec.abstract()
    encoder = trees.encoder(params)

    def forward(images):
        return nnx.merge(definition, encoder)(spec.normalize(images)).tokens

    height, width = sizes.sides(spec.arch["image_size"])
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.uint8)
    exported = jax.export.export(jax.jit(forward), platforms=("cpu", "cuda", "tpu"))(images)
    path.write_bytes(exported.serialize())
    return [name for name in params if not name.startswith("encoder/")]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _classes(kind: type[Layout]) -> str:
    """The classes of a library that the families know, for people."""
    names = list(dict.fromkeys(f"`{layout.class_name}`" for layout in families.layouts(kind)))
    return f"{', '.join(names[:-1])} or {names[-1]}"


FORMATS: dict[str, Format] = {
    "timm": Format(
        _write_timm,
        f"safetensors in the names of timm's {_classes(Timm)}; timm computes its index buffers "
        "itself and takes none from a file",
    ),
    "huggingface": Format(
        _write_huggingface,
        "a folder with `config.json`, `model.safetensors` and `preprocessor_config.json` that "
        f"`AutoModel.from_pretrained` opens, as a {_classes(HuggingFace)}",
    ),
    **families.formats(),
    "source": Format(
        _write_source,
        "safetensors in the names, shapes and dtypes of the file the model came from",
    ),
    "stablehlo": Format(
        _write_stablehlo,
        "one file for serving: uint8 images [b, H, W, 3] in, tokens [b, N, D] out, weights "
        "inside, for CPU, CUDA and TPU",
    ),
}
