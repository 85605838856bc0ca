"""Gives a network back to the library that it came from, which opens it and runs it."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from benchmarks.coverage import comparing, making, opened
from benchmarks.coverage.making import Made
from fd_jax import model_folder
from fd_jax.convert import exporting, importing
from fd_jax.errors import UserError
from fd_jax.models.spec import ModelSpec
from tests.convert import seeded

FORMATS = {"timm": "timm", "transformers": "huggingface"}  # by library
WEIGHTS = "model.safetensors"


def returned(made: Made, library: str, folder: Path) -> dict[str, Any]:
    """What becomes of a backbone that is imported, exported and opened by its library.

    Args:
      made: the backbone.
      library: whose it is, a key of FORMATS.
      folder: an empty one.

    Returns:
      "is" ("equal", "other", "refused"), the class or architecture "as" which it is opened, the
      largest "difference" of its features, relative to the largest, and how many of its tensors
      are the file's under the same name, bit for bit.
    """
    try:
        importing.import_file("auto", made.folder, folder / "model", facts=made.facts)
        exporting.export(FORMATS[library], folder / "model", folder / "back")
    except UserError as error:
        return {"is": "refused", "says": comparing.short(str(error).replace(str(folder), ""))}
    spec = model_folder.load_spec(folder / "model")
    images = seeded.images(made.size)
    kind, found = _opened(folder / "back", library, spec, images)
    expected = made.features(images)
    if found.shape != expected.shape:
        return {"is": "other", "as": kind, "shape": list(found.shape)}
    off = float(np.abs(found - expected).max() / np.abs(expected).max())
    before, after = (load_file(path / WEIGHTS) for path in (made.folder, folder / "back"))
    same = sum(_same(before.get(name), value) for name, value in after.items())
    return {
        "is": "equal" if off < comparing.TOLERANCE else "other",
        "as": kind,
        "difference": off,
        "same": same,
        "tensors": len(after),
    }


def _same(one: np.ndarray | None, other: np.ndarray) -> bool:
    return one is not None and one.dtype == other.dtype and np.array_equal(one, other)


def _opened(
    folder: Path, library: str, spec: ModelSpec, images: np.ndarray
) -> tuple[str, np.ndarray]:
    """How the library opens a folder, strictly, and its tokens."""
    import torch

    pixels = making.pixels(images, spec.mean, spec.std)
    if library == "timm":
        model: Any = opened.open_folder(folder)
        with torch.no_grad():
            tokens = model.forward_features(pixels)
        kind = f"{type(model).__name__}, {model.pretrained_cfg['architecture']}"
        return kind, making.tokens(tokens, channels_first=making.is_map(model))
    model = _of_transformers(folder)
    with torch.no_grad():
        tokens = making.final_tokens(model, pixels, False)
    return type(model).__name__, making.tokens(tokens, channels_first=True)


def _of_transformers(folder: Path) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    new = {key for keys in info.values() for key in keys if "pooler." not in key}
    if new:
        raise AssertionError(f"{kind.__name__} lacks or has more: {sorted(new)[:5]}")
    return model.eval()
