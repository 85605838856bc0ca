"""A model folder in, a file or folder for other libraries out."""

from collections.abc import Callable, Mapping
import dataclasses
import json
import os
from pathlib import Path
import shutil
from typing import Any

from etils import epath
from flax import nnx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from fd_jax import model_folder
from fd_jax.convert import families, layouts
from fd_jax.convert.containers import safetensors_io
from fd_jax.convert.containers.tensors import DTYPES
from fd_jax.convert.families import own
from fd_jax.convert.rules import tables
from fd_jax.convert.rules.tables import Table
from fd_jax.errors import ConversionError
from fd_jax.models.spec import ModelSpec


def export(
    layout: str, folder: epath.PathLike, output: str | os.PathLike[str], *, overwrite: bool = False
) -> list[str]:
    """Writes a model folder in another layout; complete or not at all.

    Args:
      layout: a key of FORMATS.
      folder: model folder to read.
      output: file to write, or folder for "huggingface".
      overwrite: whether what stands there is replaced.

    Returns:
      Names of the parameters that the layout has no place for (a projector, say).

    Raises:
      ConversionError: the layout cannot hold this network, or the output exists.
      ModelFolderError: there is no model folder to read.
    """
    if layout not in FORMATS:
        raise ConversionError(f"format {layout!r}; expected one of {', '.join(FORMATS)}")
    output = Path(output)
    _check_free(output, layout, overwrite=overwrite)
    if Path(folder).is_file():
        raise ConversionError(
            f"{folder} is a file; `import` makes a model folder of it, which `export` then reads"
        )
    spec, params = model_folder.load(folder)
    staging, replaced = (output.parent / f".{output.name}.{x}" for x in ("incomplete", "replaced"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove(staging)
        left = FORMATS[layout].write(spec, flat(params), staging)
        if output.is_dir():  # steps aside whole: a kill never leaves half of it
            _remove(replaced)
            output.rename(replaced)
        staging.replace(output)
        _remove(replaced)
    except OSError as error:
        raise ConversionError(f"{output}: cannot be written ({error.strerror})") from error
    finally:
        _remove(staging)
    return left


def _check_free(output: Path, layout: str, *, overwrite: bool) -> None:
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ConversionError(f"{output} exists and is not overwritten; pass --overwrite to do so")
    if layout == "huggingface":
        if not (output / "config.json").exists():
            raise ConversionError(f"{output} is no Hugging Face folder, so it is not overwritten")
    elif not output.is_file():
        raise ConversionError(f"{output} is not a file, so it is not overwritten; name a file")


def flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays of a nested dict by "a/b" path."""
    out = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            out.update(flat(value, f"{prefix}{name}/"))
        else:
            out[prefix + name] = value
    return out


def _write_source(spec: ModelSpec, params: dict[str, np.ndarray], path: Path) -> list[str]:
    """The names, shapes and dtypes of the file the model came from, as safetensors."""
    name, _, part = spec.source.partition(":")
    if name not in families.SOURCES:
        raise ConversionError(
            f"this network was not imported (its source is {spec.source!r}); choose another format"
        )
    source = families.get(name)
    table = source.parts[part or source.default_part].table
    tensors = {}
    for key, array in tables.invert(table, params, spec.arch, derived=False):
        tensors[key] = array.astype(DTYPES[spec.source_dtypes.get(key, "float32")], copy=False)
    safetensors_io.write(path, tensors, {"format": "pt", "source": spec.source})
    return _left(params, table, spec)


def _write_timm(spec: ModelSpec, params: dict[str, np.ndarray], path: Path) -> list[str]:
    """Names of timm, as safetensors."""
    table = layouts.for_model(layouts.timm(spec), set(params), spec.arch, "timm")
    tensors = dict(tables.invert(table, params, spec.arch, derived=False))
    safetensors_io.write(path, tensors, {"format": "pt"})
    return _left(params, table, spec)


def _write_huggingface(spec: ModelSpec, params: dict[str, np.ndarray], path: Path) -> list[str]:
    """A folder that `AutoModel.from_pretrained` opens."""
    layout = layouts.huggingface(spec, head="head/kernel" in params)
    table = layouts.for_model(layout.table, set(params), spec.arch, "huggingface")
    tensors = dict(tables.invert(table, params, spec.arch, derived=False))
    if layout.model_type.startswith("dino"):  # their classes ask for a token only training uses
        shape = (1, 1, spec.arch["width"]) if layout.model_type == "dinov3_vit" else None
        tensors["embeddings.mask_token"] = np.zeros(shape or (1, spec.arch["width"]), np.float32)
    path.mkdir()
    safetensors_io.write(path / "model.safetensors", tensors, {"format": "pt"})
    _write_json(path / "config.json", layouts.huggingface_config(layout, spec))
    size = spec.arch["image_size"]
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": spec.pixel_scale,
        "do_normalize": True,
        "image_mean": spec.mean,
        "image_std": spec.std,
    }
    _write_json(path / "preprocessor_config.json", processor)
    return _left(params, table, spec)


def _write_official(spec: ModelSpec, params: dict[str, np.ndarray], path: Path) -> list[str]:
    """What the original repository's main_finetune.py reads: {"model": {"encoder.*"}}."""
    names = layouts.official(spec)
    try:
        import torch
    except ImportError as error:
        raise ConversionError("writing a .pth file needs torch; pip install torch") from error
    table = layouts.for_model(names, set(params), spec.arch, "official")
    tensors = {
        name: torch.from_numpy(np.array(array))
        for name, array in tables.invert(table, params, spec.arch, derived=True)
    }
    try:
        torch.save({"model": tensors}, path)
    except RuntimeError as error:  # its words for a full disk
        raise ConversionError(f"the .pth file cannot be written ({error!s:.80})") from error
    return _left(params, table, spec)


def _write_safetensors(spec: ModelSpec, params: dict[str, np.ndarray], path: Path) -> list[str]:
    """Our own paths and the text of model.json in the metadata."""
    safetensors_io.write(path, params, {own.METADATA: spec.to_json()})
    return []


def _write_stablehlo(spec: ModelSpec, params: dict[str, np.ndarray], path: Path) -> list[str]:
    """uint8 images [b, H, W, 3] -> tokens [b, N, D] float32, weights inside; see `jax.export`."""
    definition, _ = spec.abstract()
    encoder = nested_encoder(params)

    def forward(images):
        return nnx.merge(definition, encoder)(spec.normalize(images)).tokens

    size = spec.arch["image_size"]
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
    exported = jax.export.export(jax.jit(forward), platforms=("cpu", "cuda", "tpu"))(images)
    path.write_bytes(exported.serialize())
    return [name for name in params if not name.startswith("encoder/")]


@dataclasses.dataclass(frozen=True)
class Format:
    """A layout that models are written in.

    Attributes:
      write: (spec, flat parameters, path that does not exist) -> names it has no place for.
      writes: what it is, for people.
    """

    write: Callable[[ModelSpec, dict[str, np.ndarray], Path], list[str]]
    writes: str


FORMATS = {
    "timm": Format(
        _write_timm,
        "safetensors in timm's names: `Beit` for our students, `VisionTransformer` for plain "
        "networks, `SwinTransformer` and `SwinTransformerV2`; timm computes its index buffers "
        "itself and takes none from a file",
    ),
    "huggingface": Format(
        _write_huggingface,
        "a folder with `config.json`, `model.safetensors` and `preprocessor_config.json` that "
        "`AutoModel.from_pretrained` opens",
    ),
    "official": Format(
        _write_official,
        "a `.pth` with exactly the `encoder.*` keys under `model` that the original's "
        "`main_finetune.py` reads, index buffers included (needs `torch`)",
    ),
    "source": Format(
        _write_source,
        "safetensors in the names, shapes and dtypes of the file the model came from",
    ),
    "safetensors": Format(
        _write_safetensors,
        "one file with our own parameter paths and `model.json` in the metadata; "
        "`import --source=fd_jax` reads it back",
    ),
    "stablehlo": Format(
        _write_stablehlo,
        "one file for serving: uint8 images [b, H, W, 3] in, tokens [b, N, D] out, weights "
        "inside, for CPU, CUDA and TPU",
    ),
}


def nested_encoder(params: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The encoder of a flat dict of parameters, nested and in float32."""
    tree: dict[str, Any] = {}
    for path, array in params.items():
        part, *parents, leaf = path.split("/")
        if part == "encoder":
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = np.asarray(array, np.float32)
    return tree


def _left(params: Mapping[str, np.ndarray], table: Table, spec: ModelSpec) -> list[str]:
    return sorted(set(params) - tables.target_paths(table, spec.arch))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
