"""Compares a model folder with the file it came from, both run on the same input.

The reference is the class of transformers for this network, running in torch, with the parameters
of the file (not of the folder). A Hugging Face file has the names this class expects, so its
tensors go in as they are; those of other files are renamed by our tables, which the tests check
against independent ones.
"""

from collections.abc import Sequence
import dataclasses
import os
from pathlib import Path
import tempfile
from typing import Any

from etils import epath
from flax import nnx
import jax
import numpy as np

from fd_jax import model_folder
from fd_jax.convert import families, importing, networks, trees
from fd_jax.convert.containers import safetensors_io
from fd_jax.convert.containers.opening import open_container
from fd_jax.convert.containers.tensors import DTYPES
from fd_jax.convert.formats import FORMATS
from fd_jax.convert.huggingface import HuggingFace
from fd_jax.convert.rules.names import summarize
from fd_jax.errors import ConversionError
from fd_jax.models import sizes
from fd_jax.models.spec import ModelSpec

TOLERANCE = 1e-4  # relative to the largest value, float32, of a whole network
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Compared:
    """Largest differences between a model folder and the reference.

    Attributes:
      parameters: how many arrays were compared with the file's, all bit for bit.
      untouched: how many tensors the reference took from the file under their own names.
      rows: (what, largest difference, largest value of the reference).
    """

    parameters: int
    untouched: int
    rows: list[tuple[str, float, float]]

    @property
    def agrees(self) -> bool:
        """Whether every row is within the tolerance."""
        return all(off <= TOLERANCE * largest for _, off, largest in self.rows)


def verify(
    source: str,
    path: str | os.PathLike[str],
    folder: epath.PathLike,
    *,
    part: str | None = None,
    allow_other_hash: bool = False,
    arch: str | None = None,
    facts: Sequence[str] = (),
) -> Compared:
    """Compares parameters bit for bit, and the features of every block with the reference.

    Args:
      source: name of the source of the file.
      path: the file or Hugging Face folder.
      folder: the model folder made from it.
      part: which network of the file.
      allow_other_hash: as in the import.
      arch: as in the import.
      facts: as in the import.

    Raises:
      ConversionError: torch or transformers is missing, or the parameters are not the file's.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConversionError(
            f"verify compares with torch; pip install torch transformers ({error})"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    spec, params = model_folder.load(folder)
    params = trees.flat(params)
    dtype = next(iter(params.values())).dtype.name
    made_from, _, made_part = spec.source.partition(":")
    if part is None and made_from == source and made_part and source in families.SOURCES:
        part = made_part
    # The reference's parameters come from the file, at the size and in the dtype of the folder.
    read = importing.read(
        source,
        path,
        part=part,
        image_size=spec.arch["image_size"],
        dtype=dtype,
        allow_other_hash=allow_other_hash,
        arch=arch,
        facts=facts,
    )
    _compare_parameters(trees.flat(read.params), params)
    shape = (1, *sizes.sides(spec.arch["image_size"]), 3)
    images = np.random.default_rng(_SEED).standard_normal(shape).astype(np.float32)
    own = _own_model(read, path, getattr(torch, dtype))
    if own is not None:
        model, layout, untouched = own
    else:
        with tempfile.TemporaryDirectory() as scratch:
            reference = Path(scratch) / "reference"
            layout = _write_reference(read, reference)
            untouched = _take_as_they_are(read, path, part, reference, DTYPES[dtype])
            model = transformers.AutoModel.from_pretrained(reference, dtype=torch.float32).eval()
    pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
    with torch.no_grad():
        theirs = [state.numpy() for state in _torch_tokens(model, layout, pixels)]
    ours = _our_tokens(spec, params, images)
    names = ["embedding", *(f"block {i}" for i in range(sum(networks.depths(spec)))), "final norm"]
    rows = [
        (name, float(np.abs(found - expected).max()), float(np.abs(expected).max()))
        for name, found, expected in zip(names, ours, theirs, strict=False)
    ]
    return Compared(len(params), untouched, rows)


def report(compared: Compared) -> str:
    """The comparison as a table."""
    lines = [f"{compared.parameters} parameters equal the file's, bit for bit"]
    if compared.untouched:
        lines.append(f"the reference holds {compared.untouched} tensors as they stand in the file")
    lines += ["largest difference after each part, and relative to the largest value:"]
    lines += [f"  {what:10} {off:.2e} {off / large:.2e}" for what, off, large in compared.rows]
    return "\n".join(lines)


def _own_model(
    read: importing.Imported, path: str | os.PathLike[str], dtype: Any
) -> tuple[Any, HuggingFace, int] | None:
    """The model that transformers makes of a file by its own config.json, if it has one.

    Returns:
      The model with weights rounded to `dtype`, the layout that says what its features are, and
      how many tensors it has; None for files of others, and for networks whose size was changed.
    """
    import torch
    import transformers

    style = families.STYLES.get(read.source.partition(":")[0])
    container = open_container(path)
    if style is None or not style.configs or read.resized or container.config is None:
        return None
    folder = container.files[0].parent
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    model = getattr(model, "vision_model", model)  # of two towers, the one that sees
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(dtype).to(torch.float32))
    layouts = [one for one in families.layouts(HuggingFace) if one.model_type in style.configs]
    return model, layouts[0], len(model.state_dict())


def _write_reference(read: importing.Imported, folder: Path) -> HuggingFace:
    """Writes the folder that the reference is opened from; returns the layout of its class."""
    params = {
        name: np.asarray(array, DTYPES["float32"])
        for name, array in trees.flat(read.params).items()
        if name.startswith(("encoder/", "fc_norm/"))
    }
    spec = dataclasses.replace(read.spec, classes=0, class_names=None)
    FORMATS["huggingface"].write(spec, params, folder)
    return families.layout(HuggingFace, spec, set(params), format="huggingface")[0]


def _take_as_they_are(
    read: importing.Imported, path, part: str | None, folder: Path, dtype: np.dtype
) -> int:
    """Puts a Hugging Face file's tensors into the reference by name, in the model folder's dtype.

    Positions that were resized stay as they are.

    Returns:
      How many tensors these are; 0 for other files, whose names the reference does not have.
    """
    source = families.SOURCES.get(read.source.partition(":")[0])
    if source is None or not source.hf:
        return 0
    _, theirs = source.match(open_container(path), importing.check_part(source, part))
    weights = folder / "model.safetensors"
    tensors = safetensors_io.read(weights).tensors
    same = {n for n, t in tensors.items() if n in theirs and theirs[n].shape == t.shape}
    arrays = {
        name: (theirs[name] if name in same else tensor).load().astype(dtype).astype(np.float32)
        for name, tensor in tensors.items()
    }
    safetensors_io.write(weights, arrays, {"format": "pt"})
    return len(same)


def _compare_parameters(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> None:
    wrong = sorted(expected.keys() ^ found.keys())
    wrong += [
        path
        for path in sorted(expected.keys() & found.keys())
        if not np.array_equal(expected[path], found[path])
    ]
    if wrong:
        raise ConversionError(
            "the model folder does not hold the parameters of the file: "
            f"{', '.join(summarize(wrong))}"
        )


def _our_tokens(
    spec: ModelSpec, params: dict[str, np.ndarray], images: np.ndarray
) -> list[np.ndarray]:
    definition, _ = spec.abstract()
    encoder = trees.encoder(params)

    @jax.jit
    def run(encoder: Any, images: jax.Array) -> list[jax.Array]:
        module: Any = nnx.merge(definition, encoder)
        maps = module.intermediates(images, range(sum(networks.depths(spec))))
        final = [module(images).tokens] if spec.arch.get("final_norm") else []
        return [module.embed(images), *(found.tokens for found in maps), *final]

    with jax.default_matmul_precision("highest"):
        return [np.asarray(tokens) for tokens in run(encoder, images)]


def _torch_tokens(model: Any, layout: HuggingFace, pixels: Any) -> list[Any]:
    """What enters the first block, what leaves each, and the normalised end."""
    caught: list[Any] = []

    def keep(_, arguments, output):
        if not caught:
            caught.append(arguments[0])
        caught.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(keep) for block in layout.blocks(model)]
    tokens = layout.final_tokens(model, model(pixels).last_hidden_state)
    for hook in hooks:
        hook.remove()
    return [_rows(x) for x in (*caught, tokens)]


def _rows(x: Any) -> Any:
    """The tokens of a map [B, D, H, W] as [B, H * W, D]; tokens as they are."""
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
