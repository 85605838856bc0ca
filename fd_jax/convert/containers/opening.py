"""Opens any file or folder of weights: finds out what it is and hands it to its reader."""

import dataclasses
import json
import os
from pathlib import Path

from fd_jax.convert.containers import foreign, hub, npz, onnx_files, safetensors_io, torch_files
from fd_jax.convert.containers.tensors import Container, Tensor, damaged
from fd_jax.convert.containers.zips import MappedZip
from fd_jax.errors import ConversionError

_EXPECTED = (
    "expected a torch checkpoint (.pt, .pth, .bin), a TorchScript archive, a .safetensors, .npz or "
    ".onnx file, or a Hugging Face folder with config.json and model.safetensors"
)
# Hugging Face names, the safe format first.
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
# What they have beside the weights.
_CONFIG = "config.json"
_BESIDE = ("preprocessor_config.json", "open_clip_config.json")


def open_container(path: str | os.PathLike[str]) -> Container:
    """Opens a file or folder. Reads no tensor and runs nothing that is in it.

    Args:
      path: a file; a folder of transformers, timm or open_clip; a repository in the cache of
        Hugging Face's hub; or the name of a repository, "hf-hub:ORG/NAME[@REVISION]".

    Raises:
      ConversionError: missing, unreadable, damaged, of no known kind, or its pickle names a class
        that is not on the list of harmless ones.
    """
    if os.fspath(path).startswith(hub.NAME):
        path = hub.fetch(os.fspath(path))
    path = Path(path)
    if not os.path.exists(path):  # unlike Path.exists, never raises
        raise ConversionError(f"{path}: no such file or folder; {_EXPECTED}")
    if path.is_dir():
        return _open_folder(hub.snapshot(path))
    if path.name in _INDEXES:
        return _open_shards(path.parent, path.name)
    container = _open_file(path)
    # The public names mean a Hugging Face folder, even where only the file in it is named.
    return _described(container, path.parent) if path.name in _SINGLES else container


def _open_file(path: Path) -> Container:
    if not path.is_file():
        raise ConversionError(f"{path}: a device or pipe; {_EXPECTED}")
    try:
        with open(path, "rb") as stream:
            head = stream.read(foreign.HEAD)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read ({error.strerror})") from error
    if not head:
        raise damaged(path, "the file is empty")
    if head.startswith(b"PK\x03\x04"):
        return _open_zip(path)
    if head.startswith(torch_files.LEGACY_HEAD):
        return torch_files.read_legacy(path)
    if safetensors_io.looks_like(head):
        return safetensors_io.read(path)
    if path.suffix == ".onnx":
        return onnx_files.read(path)
    if known := foreign.hint(path, head):
        raise ConversionError(f"{path}: {known}")
    raise ConversionError(f"{path}: not a weights file (it begins with {head[:16]!r}); {_EXPECTED}")


def _open_zip(path: Path) -> Container:
    archive = MappedZip(path)
    names = list(archive.entries)
    if any(name.endswith("/data.pkl") for name in names):
        return torch_files.read_zip(path, archive)
    if any(name.endswith(".npy") for name in names):
        return npz.read(path, archive)
    raise ConversionError(
        f"{path}: a zip file with neither data.pkl (torch) nor .npy arrays; {_EXPECTED}"
    )


def _open_folder(path: Path) -> Container:
    for name in _INDEXES:
        if (path / name).exists():
            return _open_shards(path, name)
    for name in _SINGLES:
        if (path / name).exists():
            return dataclasses.replace(_described(_open_file(path / name), path), path=path)
    raise ConversionError(
        f"{path}: a folder without {' or '.join(_SINGLES)}; {foreign.folder_hint(path)}"
    )


def _open_shards(path: Path, index_name: str) -> Container:
    weight_map = _json(path / index_name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(path / index_name, "it has no weight_map")
    tensors: dict[str, Tensor] = {}
    files, kind = [], ""
    for shard in sorted({str(value) for value in weight_map.values()}):
        if Path(shard).name != shard:
            raise ConversionError(f"{path / index_name}: shard {shard!r:.80} is not in the folder")
        if not (path / shard).exists():
            raise ConversionError(f"{path}: shard {shard} of {index_name} is missing")
        inner = _open_file(path / shard)
        tensors.update(inner.tensors)
        files.append(path / shard)
        kind = inner.kind
    if unlike := sorted(set(weight_map) ^ set(tensors)):
        raise damaged(path, f"{index_name} and its shards disagree about {unlike[:5]}")
    kind = f"{kind} in {len(files)} shards"
    return _described(Container(path, kind, tuple(files), tensors), path)


def _described(container: Container, folder: Path) -> Container:
    """The same weights, with what the files beside them say."""
    config = _json(folder / _CONFIG) if (folder / _CONFIG).exists() else None
    beside = {name: _json(folder / name) for name in _BESIDE if (folder / name).exists()}
    return dataclasses.replace(container, config=config, beside=beside)


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"not valid JSON ({error!s:.80})") from error
    if not isinstance(value, dict):
        raise damaged(path, "not a JSON dictionary")
    return value
